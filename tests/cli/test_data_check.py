"""`vppo data check` as a user sees it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_vppo.cli.main import main
from tests.data.images import noise_image


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        noise_image(40, 30, seed=number).save(tmp_path / f"{number}.png")

    def write(name: str, *lines: tuple[str, str]) -> None:
        content = [{"problem": f"<image>{text}", "answer": "3", "images": [image]} for text, image in lines]
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in content))

    write("train.jsonl", ("how many?", "1.png"), ("which?", "2.png"), ("which?", "2.png"))
    write("test.jsonl", ("How many?", "1.png"), ("where?", "2.png"))
    write("broken.jsonl", ("how many?", "3.png"), ("which?", "2.png"))
    return tmp_path


def test_one_set(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", "train.jsonl", "--workers", "1"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "train.jsonl: 3 of 3 rows usable"
    assert "  images: 3 rows with 1" in out and "  width: min 40, p10 40, median 40, p90 40, max 40" in out
    assert out[-2:] == ["  the same rows: 1", "    1, 2"]


def test_rows_of_a_test_set_in_the_training_set_are_found(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "check", "test.jsonl", "--against", "train.jsonl", "--workers", "1"]
    assert main([*words, "--json", "out.json", "--html", "out.html"]) == 1
    out = capsys.readouterr().out
    assert "in train.jsonl as well:\n  the same question about the same images: 1\n    row 0 is row 0\n" in out
    assert "the same images, another question: 1" in out
    report = json.loads(Path("out.json").read_text())
    assert report["shared"] == {"same": [[0, 0]], "images": [[1, 1]], "question": []}
    assert "row 0 is row 0 of the other" in Path("out.html").read_text()


def test_broken_rows_are_named_and_end_with_status_one(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", "broken.jsonl", "--workers", "1"]) == 1
    assert "    broken.jsonl, row 0: image 0 cannot be read: No such file" in capsys.readouterr().out
    assert main(["data", "check", "nowhere.jsonl"]) == 2
    assert "nowhere.jsonl" in capsys.readouterr().err
