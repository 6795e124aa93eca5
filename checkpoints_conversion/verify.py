"""The comparison of a conversion with its source, bit by bit.

An alias of `vppo convert verify`, for people who look for scripts; see its `--help`.
"""

import sys

from megatron_vppo.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", "verify", *sys.argv[1:]]))
