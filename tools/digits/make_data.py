"""Writes the digits data set: `problem`, `answer`, `images` rows in train.parquet and val.parquet.

    python tools/digits/make_data.py --out build/digits/data

Training and held-out images share no scan. `labels.json` says which scans and digits each row shows.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from digits.folder import build_once
from digits.pairs import QUESTION, Pair, Scans, draw_image, draw_pairs, load_scans, split_scans


def encoded_image(scans: Scans, pair: Pair) -> dict[str, Any]:
    """Draws the image of a pair as the PNG file that the data set stores."""
    buffer = io.BytesIO()
    draw_image(scans, pair).save(buffer, format="PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}


def write_rows(path: Path, scans: Scans, pairs: list[Pair]) -> dict[str, list[list[int]]]:
    """Writes one parquet file of the released data sets' schema; returns the labels of its rows, in order."""
    from datasets import Dataset, Features, Image, List, Value

    digits = [[int(scans.digits[p.left]), int(scans.digits[p.right])] for p in pairs]
    rows = {
        "problem": [QUESTION] * len(pairs),
        "answer": [str(a + b) for a, b in digits],
        "images": [[encoded_image(scans, p)] for p in pairs],
    }
    features = Features({"problem": Value("string"), "answer": Value("string"), "images": List(Image())})
    Dataset.from_dict(rows, features=features).to_parquet(str(path))
    return {"scans": [[p.left, p.right] for p in pairs], "digits": digits}


def write_data(out: Path, *, train_pairs: int, val_pairs: int, held_out: float, seed: int) -> dict[str, Any]:
    """Writes both files and their labels into the existing folder `out`; equal arguments write equal bytes."""
    scans = load_scans()
    train_scans, val_scans = split_scans(len(scans.digits), held_out=held_out, seed=seed)
    labels = {
        "train": write_rows(out / "train.parquet", scans, draw_pairs(train_scans, count=train_pairs, seed=seed + 1)),
        "val": write_rows(out / "val.parquet", scans, draw_pairs(val_scans, count=val_pairs, seed=seed + 2)),
    }
    (out / "labels.json").write_text(json.dumps(labels) + "\n")
    return {
        "train_pairs": train_pairs,
        "val_pairs": val_pairs,
        "train_scans": len(train_scans),
        "val_scans": len(val_scans),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--train-pairs", type=int, default=4096)
    parser.add_argument("--val-pairs", type=int, default=512)
    parser.add_argument("--held-out", type=float, default=0.25, help="share of the scans kept for validation")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    arguments = {k: v for k, v in vars(options).items() if k != "out"}
    start = time.perf_counter()
    result, reused = build_once(options.out, arguments, lambda folder: write_data(folder, **arguments))
    print(json.dumps({**result, "reused": reused, "seconds": round(time.perf_counter() - start, 1)}))


if __name__ == "__main__":
    main()
