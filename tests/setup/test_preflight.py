"""The checks before any process starts, in the order in which a run needs what they check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_vppo.config.schema import RunConfig
from megatron_vppo.models.read_config import read_hf_config
from megatron_vppo.setup.preflight import check_before_launch, check_run
from tests.models.whole import save_whole_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_whole_folder(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"problem": "?", "answer": "1"}\n')
    return tmp_path


def config_of(folder: Path, **sections: dict[str, Any]) -> RunConfig:
    lengths = {"max_prompt_length": 300, "max_response_length": 20}
    data = {"train_files": str(folder / "rows.jsonl"), **lengths, **sections.pop("data", {})}
    model = {"path": str(folder / "model"), "dtype": "float32"}
    return RunConfig.model_validate({"data": data, "model": model, **sections})


def test_ranks_that_a_launcher_started_are_checked_as_well(folder: Path) -> None:
    check_run(config_of(folder), read_hf_config(folder / "model"), world_size=2, on_gpu=False)
    pipeline = {"pipeline_model_parallel_size": 4}
    check_run(config_of(folder, parallel=pipeline), read_hf_config(folder / "model"), world_size=4, on_gpu=False)
    with pytest.raises(ValueError, match="4 ranks per model copy does not divide 2 ranks"):
        check_run(config_of(folder, parallel=pipeline), read_hf_config(folder / "model"), world_size=2, on_gpu=False)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"rollout": {"weight_transfer": "ipc"}}, "rollout.weight_transfer is ipc"),
        ({"parallel": {"tensor_model_parallel_size": 4}}, "6 attention heads"),
        ({"rollout": {"num_engines": 5}}, "rollout.num_engines=5"),
        ({"rollout": {"top_k": 300}}, "rollout.top_k 300"),
        ({"data": {"val_files": "no.jsonl"}}, r"no\.jsonl does not exist"),
        ({"data": {"image_dir": "no"}}, r"data\.image_dir: there is no folder /.*/no$"),
    ],
)
def test_every_part_is_checked(folder: Path, sections: dict[str, dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_run(config_of(folder, **sections), read_hf_config(folder / "model"), world_size=4, on_gpu=False)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "the file has no rows"),
        ('{"question": "?", "answer": "1"}\n', "'problem'"),
        ("[1]\n", "no row can be read"),
    ],
)
def test_data_without_rows_or_columns_is_seen_before_ranks_start(folder: Path, rows: str, message: str) -> None:
    (folder / "rows.jsonl").write_text(rows)
    with pytest.raises(ValueError, match=message):
        check_before_launch(config_of(folder))


def test_a_damaged_checkpoint_is_seen_before_ranks_start(folder: Path) -> None:
    newest = folder / "p" / "e" / "checkpoints" / "global_step_4"
    newest.mkdir(parents=True)
    (newest / "trainer_state.json").write_text("{")
    trainer = {"runs_dir": str(folder), "project_name": "p", "experiment_name": "e"}
    with pytest.raises(ValueError, match=r"global_step_4/trainer_state\.json is not JSON .*no other whole checkpoint"):
        check_before_launch(config_of(folder, trainer=trainer))
