"""Hugging Face folder -> folder to train from.

An alias of `vppo convert hf-to-megatron`, for people who look for scripts; see its `--help`.
"""

import sys

from megatron_vppo.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", "hf-to-megatron", *sys.argv[1:]]))
