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
    assert "test.jsonl and train.jsonl:\n  the same question about the same images: 1\n    row 0 is row 0\n" in out
    assert "the same images, another question: 1" in out
    report = json.loads(Path("out.json").read_text())
    found = {"same": [[0, 0]], "images": [[1, 1]], "question": []}
    assert report["shared"] == [{"one": "test.jsonl", "other": "train.jsonl", **found}]
    assert "row 0 is row 0 of the other" in Path("out.html").read_text()


def test_broken_rows_are_named_and_end_with_status_one(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", "broken.jsonl", "--workers", "1"]) == 1
    assert "    broken.jsonl, row 0: image 0 cannot be read: No such file" in capsys.readouterr().out
    assert main(["data", "check", "nowhere.jsonl"]) == 2
    assert "nowhere.jsonl" in capsys.readouterr().err


def test_all_files_of_a_run_with_their_own_settings(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mixture, one of whose files is LLaMA-Factory's, and whose validation has a row of each."""
    turns = [{"role": "user", "content": "where?"}, {"role": "assistant", "content": "3"}]
    (rows / "talk.json").write_text(json.dumps([{"messages": turns, "image": "2.png"}]))
    talk = "{path: talk.json, weight: 3, prompt_key: messages, image_key: image, image_place: first}"
    (rows / "run.yaml").write_text(
        f"model: {{path: none}}\ndata:\n  train_files: [{{path: train.jsonl, weight: 1}}, {talk}]\n"
        "  val_files: test.jsonl\n"
    )
    assert main(["data", "check", "--config", "run.yaml", "--workers", "1", "--json", "out.json"]) == 1
    report = json.loads(Path("out.json").read_text())
    assert [(one["source"], one["usable"]) for one in report["sets"]] == [
        ("train.jsonl", 3), ("talk.json", 1), ("test.jsonl", 2),
    ]  # fmt: skip
    assert [(one["one"], one["other"], one["same"]) for one in report["shared"]] == [
        ("train.jsonl", "talk.json", []),
        ("train.jsonl", "test.jsonl", [[0, 0]]),
        ("talk.json", "test.jsonl", [[0, 1]]),
    ]
    assert "talk.json and test.jsonl:\n  the same question about the same images: 1" in capsys.readouterr().out
    for words in (["data", "check"], ["data", "check", "train.jsonl", "--config", "run.yaml"]):
        assert main(words) == 2
        assert "takes a PATH, or the file of a run by --config" in capsys.readouterr().err
    assert main(["data", "check", "--config", "run.yaml", "--against", "test.jsonl", "--image-key", "image"]) == 2
    assert "--config takes no --image-key and --against: the file of the run" in capsys.readouterr().err
