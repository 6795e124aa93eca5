"""Compares a conversion with its source, bit by bit: `vppo convert verify`. `--help` lists the arguments."""

import sys

from megatron_vppo.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", "verify", *sys.argv[1:]]))
