"""Local copies of benchmarks for tests: two or three rows in the form of the real ones, images of 28 x 28."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from megatron_vppo.config.choices import BenchmarkSource
from megatron_vppo.evaluation.question import Question
from megatron_vppo.evaluation.suite import Benchmark, read_questions


def png(color: str) -> bytes:
    """An image of one colour, by which tests tell images apart."""
    file = io.BytesIO()
    Image.new("RGB", (28, 28), color).save(file, format="PNG")
    return file.getvalue()


def stored(color: str) -> dict[str, Any]:
    """An image as `datasets` stores it in parquet."""
    return {"bytes": png(color), "path": f"{color}.png"}


def colors(question: Question) -> list[str]:
    """The colours of a question's images, in their order."""
    names = {(255, 0, 0): "red", (0, 0, 255): "blue", (0, 128, 0): "green"}
    found = []
    for image in question.images:
        pixel = Image.open(io.BytesIO(image.read())).getpixel((0, 0))
        assert isinstance(pixel, tuple)
        found.append(names[int(pixel[0]), int(pixel[1]), int(pixel[2])])
    return found


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def questions_of(source: BenchmarkSource, path: Path | str, **settings: Any) -> list[Question]:
    questions, _ = read_questions(Benchmark(name="tiny", source=source, path=str(path), **settings), on_bad_row="error")
    return questions
