"""Writes the digits data set: `problem`, `answer`, `images` rows in train.parquet and val.parquet.

    python tools/digits/make_data.py --out build/digits/data

Training and held-out images share no scan. `labels.json` says which scans and digits each row shows.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from digits.folder import build_once
from digits.pairs import PAIRS
from digits.rows import write_data
from digits.task import Task


def main(task: Task = PAIRS, *, noun: str = "pairs", description: str | None = __doc__) -> None:
    """Reads the command line and builds the data set of a task.

    Args:
        noun: what the options call the images of the task.
        description: the text of `--help`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(f"--train-{noun}", type=int, default=4096)
    parser.add_argument(f"--val-{noun}", type=int, default=512)
    parser.add_argument("--held-out", type=float, default=0.25, help="share of the scans kept for validation")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    arguments = {k: v for k, v in vars(options).items() if k != "out"}
    counts = {f"{split}_{noun}": arguments[f"{split}_{noun}"] for split in ("train", "val")}

    def build(folder: Path) -> dict[str, int]:
        train, val = counts.values()
        return counts | write_data(folder, task, train=train, val=val, held_out=options.held_out, seed=options.seed)

    start = time.perf_counter()
    result, reused = build_once(options.out, arguments, build)
    print(json.dumps({**result, "reused": reused, "seconds": round(time.perf_counter() - start, 1)}))


if __name__ == "__main__":
    main()
