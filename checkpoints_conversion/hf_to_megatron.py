"""Hugging Face folder -> folder to train from: `vppo convert hf-to-megatron`. `--help` lists the arguments."""

import sys

from megatron_vppo.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", "hf-to-megatron", *sys.argv[1:]]))
