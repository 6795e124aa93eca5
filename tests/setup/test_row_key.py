"""The key of a check of all rows: each thing that the outcome depends on changes it, and a second start finds it."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_vppo.config.schema import RunConfig
from megatron_vppo.data import prompts
from megatron_vppo.models.model_files import open_model_files
from megatron_vppo.setup.inputs import RunInputs, open_inputs, read_prompts
from megatron_vppo.setup.row_key import FOLDER, key_parts, row_cache
from tests.models.whole import save_whole_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    save_whole_folder(folder)
    return folder


def write_rows(path: Path, *problems: str) -> None:
    path.write_text("".join(json.dumps({"problem": text, "answer": "1"}) + "\n" for text in problems))


def config_of(folder: Path, model: Path, **sections: dict[str, Any]) -> RunConfig:
    data = {"train_files": str(folder / "rows.jsonl"), "on_bad_row": "skip", **sections.pop("data", {})}
    trainer = {"runs_dir": str(folder / "runs")}
    return RunConfig.model_validate(
        {"data": data, "model": {"path": str(model), "dtype": "float32"}, "trainer": trainer, **sections}
    )


def inputs_of(config: RunConfig, model: Path) -> RunInputs:
    return open_inputs(config, open_model_files(model))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every time that rows are really checked."""
    calls: list[int] = []
    real = prompts.of_rows
    monkeypatch.setattr(prompts, "of_rows", lambda *job, **shares: calls.append(1) or real(*job, **shares))
    return calls


def test_a_second_start_reads_what_the_first_has_found(tmp_path: Path, model: Path, counted: list[int]) -> None:
    write_rows(tmp_path / "rows.jsonl", "a question", "", "a question " * 200)
    config = config_of(tmp_path, model, data={"max_prompt_length": 300})
    first, second = (read_prompts(config, inputs_of(config, model), "train").sets[0] for _ in range(2))
    assert len(counted) == 1
    assert list(first) == list(second) and first.rows == second.rows == (0,)
    assert first.report.summary() == second.report.summary()
    assert first.report.too_long == second.report.too_long == (2,)
    (kept,) = (tmp_path / "runs" / FOLDER).iterdir()
    kept.write_bytes(kept.read_bytes()[:200])
    assert list(read_prompts(config, inputs_of(config, model), "train")) == list(first)
    assert len(counted) == 2, "a damaged file is checked again, and written anew"
    assert list(read_prompts(config, inputs_of(config, model), "train")) == list(first)
    assert len(counted) == 2


def test_a_bad_row_that_stops_a_run_is_found_at_every_start(tmp_path: Path, model: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", "a question", "")
    config = config_of(tmp_path, model, data={"on_bad_row": "error"})
    for _ in range(2):
        with pytest.raises(ValueError, match="row 1: column 'problem' holds no text"):
            read_prompts(config, inputs_of(config, model), "train")


def test_every_part_of_the_key_counts(tmp_path: Path, model: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", "one", "two", "three")
    (tmp_path / "template").write_text("{{ content }} now")
    (tmp_path / "pictures").mkdir()
    config = config_of(tmp_path, model)
    inputs = inputs_of(config, model)

    def key(config: RunConfig, inputs: RunInputs) -> str:
        cache = row_cache(config, inputs.datasets["train"], inputs.builder)
        assert cache is not None
        return cache.key

    keys = {"as it is": key(config, inputs)}
    assert key(config, inputs_of(config, model)) == keys["as it is"], "the same at the next start"
    for name, data in {
        "template": {"format_prompt": str(tmp_path / "template")},
        "system prompt": {"system_prompt": "Be brief."},
        "columns": {"prompt_key": "answer"},
        "rows": {"train_files": f"{tmp_path / 'rows.jsonl'}@train[:2]"},
        "folder of images": {"image_dir": str(tmp_path / "pictures")},
        "length": {"max_prompt_length": 77},
        "bad rows": {"on_bad_row": "error"},
        "pixels": {"min_pixels": 100_352},
    }.items():
        other = config_of(tmp_path, model, data=data)
        keys[name] = key(other, inputs_of(other, model))
    many = config_of(tmp_path, model, rollout={"max_images_per_prompt": 3})
    keys["images"] = key(many, inputs)
    own = config_of(tmp_path, model, reward={"reward_function": "mine.py:grade"})
    keys["extras of rows"] = key(own, inputs)
    resize = config_of(tmp_path, model, algorithm={"resize": "easyr1"})
    keys["resize"] = key(resize, inputs_of(resize, model))

    processor = inputs.builder.processor
    processor.tokenizer.add_tokens(["<new>"])
    keys["tokenizer"] = key(config, inputs)
    processor.chat_template = processor.chat_template + " "
    keys["chat template"] = key(config, inputs)

    rows = tmp_path / "rows.jsonl"
    times = (rows.stat().st_atime_ns, rows.stat().st_mtime_ns)
    write_rows(rows, "one", "TWO", "three")
    os.utime(rows, ns=times)
    keys["content of the same size and date"] = key(config, inputs)
    assert len(set(keys.values())) == len(keys), keys


def test_code_and_libraries_count(tmp_path: Path, model: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", "one")
    config = config_of(tmp_path, model)
    inputs = inputs_of(config, model)
    parts = key_parts(config, inputs.datasets["train"], inputs.builder)
    assert parts is not None
    assert {"sources", "transformers", "tokenizers", "jinja2", "pillow", "python"} <= parts["versions"].keys()
    assert set(parts["geometry"]) == {field.name for field in dataclasses.fields(inputs.builder.geometry)}


def test_what_cannot_be_known_is_not_kept(tmp_path: Path, model: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", "one")
    config = config_of(tmp_path, model)
    inputs = inputs_of(config, model)
    (tmp_path / "rows.jsonl").rename(tmp_path / "moved")
    assert row_cache(config, inputs.datasets["train"], inputs.builder) is None
