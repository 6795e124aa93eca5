"""Converted folder or training checkpoint -> Hugging Face folder.

An alias of `vppo convert megatron-to-hf`, for people who look for scripts; see its `--help`.
"""

import sys

from megatron_vppo.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", "megatron-to-hf", *sys.argv[1:]]))
