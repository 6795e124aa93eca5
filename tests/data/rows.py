"""Data sets as the tests open them: with the column names that the schema has as defaults."""

from __future__ import annotations

from typing import Any

from megatron_vppo.data.dataset import VisionDataset, open_dataset


def open_rows(source: str, **options: Any) -> VisionDataset:
    columns = {"problem_key": "problem", "answer_key": "answer", "image_key": "images", "image_place": "marks"}
    return open_dataset(source, **{**columns, **options})
