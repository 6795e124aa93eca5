"""Counts what a training step wastes, on a CPU: a table of bars, each with its limit and the number of now, as JSON.

    python tools/bench/waste.py > waste.json
    python tools/bench/waste.py --parts waits flops

All numbers but two are counted, not timed: they are the same on every machine, idle or not. tools/bench/README.md
explains them. Each part runs in a process of its own, since their process groups differ.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

from bench.machine import commit, versions

ROOT = Path(__file__).resolve().parents[2]
PARTS = {
    "flops": "bench.waste_flops",
    "waits": "bench.waste_waits",
    "images": "bench.waste_images",
    "packing": "bench.waste_packing",
    "widths": "bench.waste_widths",
    "export": "bench.waste_export",
    "engine": "bench.waste_engine",
    "between": "bench.waste_between",
}
"""Modules with a function of the part's name, which returns bars."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="parts of the table (all)")
    options = parser.parse_args(arguments)
    git = commit(ROOT)  # before it can change
    if len(options.parts) == 1:
        bars = measure(options.parts[0])
    else:
        bars = [bar for part in options.parts for bar in _in_its_own_process(part)]
    bars.sort(key=lambda bar: bar["bar"])
    print(json.dumps({"bars": bars, "versions": versions(), "git": git}, indent=1))


def measure(part: str) -> list[dict[str, Any]]:
    """Counts the bars of one part."""
    return [bar.report() for bar in getattr(importlib.import_module(PARTS[part]), part)()]


def _in_its_own_process(part: str) -> list[dict[str, Any]]:
    command = [sys.executable, __file__, "--parts", part]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    bars: list[dict[str, Any]] = json.loads(ended.stdout)["bars"]
    return bars


if __name__ == "__main__":
    main()
