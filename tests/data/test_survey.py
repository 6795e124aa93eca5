"""The survey of a data set: broken rows by name, and rows that are the same by content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_vppo.data import survey as survey_module
from megatron_vppo.data.dataset import VisionDataset
from megatron_vppo.data.survey import Survey, quantiles, shared, survey
from tests.data.images import noise_image
from tests.data.rows import open_rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """a.png and its pixels as WebP; the same as JPEG, which are other pixels; b.png; half of a.png."""
    a = noise_image(40, 30, seed=1)
    a.save(tmp_path / "a.png")
    a.save(tmp_path / "a.webp", lossless=True)
    a.save(tmp_path / "a.jpg", quality=50)
    noise_image(64, 48, seed=2).save(tmp_path / "b.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    return tmp_path


def row(problem: str, *images: str) -> dict[str, Any]:
    return {"problem": problem, "answer": "3", "images": list(images)}


def opened(folder: Path, *rows: dict[str, Any]) -> VisionDataset:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_rows(str(folder / "rows.jsonl"))


def surveyed(folder: Path, *rows: dict[str, Any]) -> Survey:
    return survey(opened(folder, *rows), workers=1)


def test_broken_rows_are_named_and_the_others_are_counted(folder: Path) -> None:
    found = surveyed(
        folder, row("<image>How many?", "a.png"), row("<image>What?", "half.png"), row("no mark", "b.png"),
        row("<image> and <image>?", "a.png", "b.png"), row("2+2?"), {"problem": "?", "answer": "", "images": []},
    )  # fmt: skip
    assert (found.rows, [one.row for one in found.usable]) == (6, [0, 3, 4])
    assert [error.row for error in found.broken] == [1, 2, 5]
    reasons = [str(error) for error in found.broken]
    assert "image 0 is unreadable or truncated" in reasons[0]
    assert "the problem has 0 '<image>' for 1 image(s)" in reasons[1]
    assert dict(found.images_per_row) == {0: 1, 1: 1, 2: 1}
    assert found.usable[1].sizes == ((40, 30), (64, 48))
    assert {one.tokens for one in found.usable} == {None}


def test_rows_are_compared_by_pixels_and_words(folder: Path) -> None:
    one = surveyed(
        folder, row("<image>How  MANY?", "a.png"), row("How many? <image>", "a.webp"), row("<image>How many?", "a.jpg"),
        row("<image>Which?", "a.png"), row("<image>How many?", "b.png"), row("2+2?"), row("3+3?"),
    )  # fmt: skip
    assert one.repeated == [[0, 1]]
    other = surveyed(folder, row("5+5?"), row("<image>how many?", "a.webp"), row("<image>Where?", "b.png"), row("2+2?"))
    found = shared(one, other)
    assert found.same == ((0, 1), (1, 1), (5, 3))
    assert found.images == ((3, 1), (4, 2))
    assert found.question == ((2, 1),), "the JPEG is another picture"
    assert shared(other, one).same == ((1, 0), (3, 5)), "the first of those that are the same"


@pytest.mark.extended
def test_workers_change_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey_module, "_LEAST_ROWS_PER_WORKER", 1)
    monkeypatch.setattr(survey_module, "_ROWS_PER_CHUNK", 2)
    rows = [row(f"<image>{number}?", name) for number, name in enumerate(["a.png", "half.png", "b.png"] * 3)]
    alone, together = (survey(opened(folder, *rows), workers=workers) for workers in (1, 2))
    assert together.usable == alone.usable
    assert list(map(str, together.broken)) == list(map(str, alone.broken)) and len(alone.broken) == 3


def test_quantiles_by_hand() -> None:
    assert quantiles(range(101)) == {"min": 0, "p10": 10, "median": 50, "p90": 90, "max": 100}
    assert quantiles([7]) == dict.fromkeys(("min", "p10", "median", "p90", "max"), 7)
    assert quantiles([]) == {}


def test_an_image_in_grey_levels_is_the_same_in_colours(folder: Path) -> None:
    Image.new("L", (9, 9), 77).save(folder / "grey.png")
    Image.new("RGB", (9, 9), (77, 77, 77)).save(folder / "colour.png")
    assert surveyed(folder, row("<image>?", "grey.png"), row("<image>?", "colour.png")).repeated == [[0, 1]]
