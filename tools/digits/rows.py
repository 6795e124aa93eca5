"""The data set of a task: `problem`, `answer`, `images` rows in train.parquet and val.parquet."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from digits.scans import Scans, draw_image, draw_scans, load_scans, split_scans
from digits.task import Task


def encoded_image(scans: Scans, chosen: tuple[int, ...], *, columns: int) -> dict[str, Any]:
    """Draws an image of the chosen scans as the PNG file that the data set stores."""
    buffer = io.BytesIO()
    draw_image(scans, chosen, columns=columns).save(buffer, format="PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}


def write_rows(path: Path, task: Task, scans: Scans, drawn: list[tuple[int, ...]]) -> dict[str, list[list[int]]]:
    """Writes one parquet file of the released data sets' schema; returns the labels of its rows, in order."""
    from datasets import Dataset, Features, Image, List, Value

    digits = [[int(scans.digits[scan]) for scan in chosen] for chosen in drawn]
    rows = {
        "problem": [task.question] * len(drawn),
        "answer": [str(task.answer(shown)) for shown in digits],
        "images": [[encoded_image(scans, chosen, columns=task.columns)] for chosen in drawn],
    }
    features = Features({"problem": Value("string"), "answer": Value("string"), "images": List(Image())})
    Dataset.from_dict(rows, features=features).to_parquet(str(path))
    return {"scans": [list(chosen) for chosen in drawn], "digits": digits}


def write_data(out: Path, task: Task, *, train: int, val: int, held_out: float, seed: int) -> dict[str, int]:
    """Writes both files and their labels into the existing folder `out`; equal arguments write equal bytes.

    Args:
        train, val: the rows of either file.
        held_out: the share of the scans kept for validation. Training and held-out images share none.
        seed: the seed of the split and of both draws.

    Returns:
        The scans of either file.
    """
    scans = load_scans()
    train_scans, val_scans = split_scans(len(scans.digits), held_out=held_out, seed=seed)
    labels = {
        split: write_rows(
            out / f"{split}.parquet", task, scans, draw_scans(own, each=task.digits, count=count, seed=seed + offset)
        )
        for split, own, count, offset in (("train", train_scans, train, 1), ("val", val_scans, val, 2))
    }
    (out / "labels.json").write_text(json.dumps(labels) + "\n")
    return {"train_scans": len(train_scans), "val_scans": len(val_scans)}
