"""The order of a run. Policy, sampler and validator only note that they were called: what is under test is the loop."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_vppo.config.schema import RunConfig
from megatron_vppo.observability.metrics import RunLog, read_metrics
from megatron_vppo.trainer.loop import Run, is_due, train
from megatron_vppo.trainer.placement import Placement


class Notes:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def note(self, what: str, result: Any = None) -> Any:
        self.calls.append(what)
        return result


def make_run(folder: Path, *, start_step: int, total_steps: int, **trainer: Any) -> tuple[Run, Notes]:
    """No group of this run ever has right and wrong answers."""
    notes = Notes()
    config = RunConfig.model_validate(
        {"data": {"train_files": "x"}, "model": {"path": "y"}, "trainer": {"val_freq": 2, "save_freq": 2, **trainer}}
    )
    sync = {"weight_sync/checksums_ok": 1.0}
    parts: dict[str, Any] = {
        "policy": SimpleNamespace(hf_weights=lambda: iter(())),  # no step has anything to train on
        "sampler": SimpleNamespace(send_weights=lambda weights, version: notes.note(f"weights {version}", sync)),
        "collector": SimpleNamespace(groups=lambda step, log: notes.note(f"sample {step}", [])),
        "validator": SimpleNamespace(run=lambda: notes.note("validate", {"val/accuracy": 0.5})),
        "checkpointer": SimpleNamespace(
            save=lambda step: notes.note(f"save {step} after {len(read_metrics(folder))} lines"),
            note_validation=lambda step, accuracy: notes.note(f"step {step}: {accuracy}"),
        ),
        "recorder": SimpleNamespace(write=lambda *args: notes.note("record")),
    }
    device: Any = None  # nothing leaves it
    return Run(
        config=config,
        placement=Placement(device, None, offloads=(), engines_sleep=False, barrier=lambda: None),
        log=RunLog(folder, resume_step=start_step or None),
        start_step=start_step,
        total_steps=total_steps,
        **parts,
    ), notes


def test_steps_that_keep_nothing_are_counted_and_change_nothing(tmp_path: Path) -> None:
    run, notes = make_run(tmp_path, start_step=0, total_steps=3)
    train(run)
    # Lines are those of step 0 (validation) and of every step so far: written before the checkpoint.
    assert notes.calls == [
        "weights 0", "validate", "sample 1", "sample 2", "validate", "step 2: 0.5", "save 2 after 3 lines",
        "sample 3", "validate", "step 3: 0.5", "save 3 after 4 lines",
    ]  # fmt: skip
    lines = read_metrics(tmp_path)
    assert [line.get("rollout/skipped_steps") for line in lines] == [None, 1.0, 1.0, 1.0]
    assert lines[0]["weight_sync/checksums_ok"] == 1.0, "the first sync is reported with the first line"


def test_a_resumed_run_does_not_validate_again_before_training(tmp_path: Path) -> None:
    run, notes = make_run(tmp_path, start_step=2, total_steps=3, save_freq=-1)
    train(run)
    assert notes.calls == ["weights 2", "sample 3", "validate", "step 3: 0.5", "save 3 after 1 lines"]


def test_a_finished_run_only_sends_its_weights(tmp_path: Path) -> None:
    run, notes = make_run(tmp_path, start_step=3, total_steps=3)
    train(run)
    assert notes.calls == ["weights 3"]


@pytest.mark.parametrize("step, freq, due", [(5, 5, True), (4, 5, False), (7, 5, True), (3, -1, False), (7, -1, True)])
def test_due_every_so_many_steps_and_after_the_last(step: int, freq: int, due: bool) -> None:
    assert is_due(step, freq, total_steps=7) is due
