"""Model, rows and files that are here, and those that are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_vppo.launching.files import see_files, see_model
from tests.launching.runs import four_layers, run_config


def rows_file(folder: Path, **columns: str) -> Path:
    path = folder / "rows.jsonl"
    row = {"problem": "1 + 1 = ?", "answer": "2", "images": [], **columns}
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(5)))
    return path


def test_a_released_model_needs_no_folder() -> None:
    seen = see_model("Qwen/Qwen2.5-VL-72B-Instruct")
    assert seen.hf_config.text_config.num_hidden_layers == 80
    assert not seen.finding.ok
    assert "Qwen2.5-VL-72B-Instruct is not on this machine; its published configuration was used" in seen.finding.text


def test_any_other_model_has_to_be_here() -> None:
    with pytest.raises(ValueError, match=r"model.path=me/mine: no such folder.*known: Qwen/Qwen2.5-VL-3B-Instruct, "):
        see_model("me/mine")


def test_a_folder_is_opened_as_a_run_opens_it(tmp_path: Path) -> None:
    four_layers().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not whole"):
        see_model(str(tmp_path))


def test_rows_and_files_that_are_here(tmp_path: Path) -> None:
    reward, template = tmp_path / "reward.py", tmp_path / "template.jinja"
    for path in (reward, template):
        path.write_text("")
    rows = rows_file(tmp_path)
    seen = see_files(
        run_config(
            data={"train_files": str(rows), "val_files": f"{rows}@train[:2]", "format_prompt": str(template)},
            reward={"reward_function": f"{reward}:grade"},
        )
    )
    assert seen.train_rows == 5 and all(finding.ok for finding in seen.findings)
    assert [finding.text for finding in seen.findings] == [
        f"data.train_files: {rows}, 5 rows",
        f"data.val_files: {rows}@train[:2], 2 rows",
        f"data.format_prompt: {template}",
        f"reward.reward_function: {reward}",
    ]


def test_files_that_are_elsewhere_are_a_warning_each(tmp_path: Path) -> None:
    seen = see_files(
        run_config(
            data={"train_files": "someone/rows", "val_files": "/nowhere/val.parquet", "image_dir": "/nowhere/images"},
            reward={"reward_function": "/nowhere/reward.py:grade"},
        )
    )
    assert seen.train_rows is None and not any(finding.ok for finding in seen.findings)
    hub, val, images, reward = (finding.text for finding in seen.findings)
    assert hub == "data.train_files: someone/rows is not on this machine; ranks read it from the hub, or from its cache"
    for text, setting in ((val, "data.val_files"), (images, "data.image_dir"), (reward, "reward.reward_function")):
        assert text.startswith(f"{setting}: ") and text.endswith("this machine does not see it, and the nodes have to")


def test_what_is_here_and_wrong_ends_the_dry_run(tmp_path: Path) -> None:
    config = run_config(data={"train_files": str(rows_file(tmp_path)), "answer_key": "solution"})
    with pytest.raises(ValueError, match="no column 'solution'"):
        see_files(config)
    with pytest.raises(ValueError, match=r"data\.background"):
        see_files(run_config(data={"background": "no colour"}))
