"""Checkpoints that their keys name, and numbers that depend on several keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.importing.least import VPPO, import_keys


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_checkpoint_of_ours_is_taken_and_one_of_theirs_is_not(tmp_path: Path) -> None:
    for name, file in (("ours", "trainer_state.json"), ("theirs", "dataloader.pt")):
        (tmp_path / name / "global_step_5").mkdir(parents=True)
        (tmp_path / name / "global_step_5" / file).touch()
    config = import_keys({"trainer.load_checkpoint_path": "ours/global_step_5"}, tmp_path).config
    assert config.trainer.load_checkpoint_path == "ours/global_step_5"
    with pytest.raises(ValueError, match="theirs/global_step_5 is no checkpoint of ours"):
        import_keys({"trainer.load_checkpoint_path": "theirs/global_step_5"}, tmp_path)


def test_a_folder_of_checkpoints_keeps_its_place_if_it_ends_as_ours_do(tmp_path: Path) -> None:
    names = {"trainer.project_name": "p", "trainer.experiment_name": "e"}
    for given, taken in (("checkpoints/p/e", "checkpoints"), ("/a/b/p/e/", "/a/b"), ("p/e", ".")):
        config = import_keys(names | {"trainer.save_checkpoint_path": given}, tmp_path).config
        assert config.trainer.runs_dir == taken
    assert import_keys(names, tmp_path).config.trainer.runs_dir == "runs"


def test_devices_are_the_gpus_that_have_rows_of_their_own(tmp_path: Path) -> None:
    keys = VPPO | {"trainer.nnodes": "2", "trainer.n_gpus_per_node": "4", "worker.actor.ulysses_size": "2"}
    imported = import_keys(keys, tmp_path)
    assert imported.config.algorithm.reference_devices == 4
    assert "  reference_devices: 4  # theirs: 2 x 4 GPUs, 2 to a sequence\n" in imported.text
    off = import_keys(keys | {"algorithm.use_vppo_on_perception": "false"}, tmp_path).config
    assert off.algorithm.reference_devices is None


def test_rounds_are_counted_in_whole_batches(tmp_path: Path) -> None:
    keys = VPPO | {"data.rollout_batch_size": "256", "trainer.max_try_make_batch": "9"}
    imported = import_keys(keys | {"data.mini_rollout_batch_size": "64"}, tmp_path)
    assert imported.config.algorithm.max_try_make_batch == 3  # 9 x 64 = 576 prompts, and 3 x 256 = 768
    assert "max_try_make_batch: 3  # theirs: 9 rounds of 64 prompts\n" in imported.text
    assert import_keys(keys, tmp_path).config.algorithm.max_try_make_batch == 9


def test_the_warmup_is_rounded_down_as_theirs(tmp_path: Path) -> None:
    keys = {"worker.actor.optim.lr_warmup_ratio": "0.03", "trainer.max_steps": "130"}  # 3.9
    imported = import_keys(keys, tmp_path)
    assert "    lr_warmup_steps: 3  # theirs: 0.03 of 130 steps\n" in imported.text
    assert any(
        line.startswith("worker.actor.optim.lr_warmup_ratio = 0.03: step k of the 3") for line in imported.differs
    )


def test_the_rows_of_an_update_are_said_to_matter_where_they_do(tmp_path: Path) -> None:
    said = "  # results depend on it, as theirs do; for less memory set max_tokens_per_micro_batch\n"
    assert f"micro_batch_size_per_device_for_update: 4{said}" in import_keys(VPPO, tmp_path).text
    assert "micro_batch_size_per_device_for_update: 4\n" in import_keys({}, tmp_path).text


def test_micro_batches_by_tokens_say_what_they_are(tmp_path: Path) -> None:
    text = import_keys({}, tmp_path).text
    assert "  max_tokens_per_micro_batch: 4096  # theirs: 4 rows of 1024 tokens\n" in text
