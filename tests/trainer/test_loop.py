"""The order of a run. Policy, sampler and validator only note that they were called: what is under test is the loop."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_vppo.config.schema import RunConfig
from megatron_vppo.observability.metrics import RunLog, read_metrics
from megatron_vppo.system.stop_signals import StopRequested
from megatron_vppo.system.watchdog import Watchdog
from megatron_vppo.trainer.loop import Run, is_due, train
from megatron_vppo.trainer.placement import Placement
from megatron_vppo.trainer.stopping import Durations


class Notes:
    def __init__(self) -> None:
        self.calls: list[str] = []
        self.unfinished: Any = None
        self.settled: list[str] = []

    def note(self, what: str, result: Any = None) -> Any:
        self.calls.append(what)
        return result


class Stops:
    """Asks for a stop at one call of a boundary or of a part of the step."""

    def __init__(self, at: str | None) -> None:
        self.at = at
        self.durations = Durations()

    def check(self, what: str) -> None:
        if what == self.at:
            raise StopRequested


def make_run(
    folder: Path, *, start_step: int, total_steps: int, stop: str | None = None, unfinished: Any = None, **trainer: Any
) -> tuple[Run, Notes]:
    """No group of this run ever has right and wrong answers.

    Args:
        stop: where it is asked to stop: 'before step 2', 'sample 2', 'validate 2'.
    """
    notes, stops = Notes(), Stops(stop)
    steps = iter(range(start_step, total_steps))

    def sample(step: int, log: RunLog) -> list[Any]:
        notes.note(f"sample {step}")
        stops.check(f"sample {step}")
        log.add("reward/accuracy", 0.25)
        return []

    def validate(step: int) -> dict[str, float]:
        notes.note("validate")
        stops.check(f"validate {step}")
        return {"val/accuracy": 0.5}

    def before_step() -> bool:
        return stop == f"before step {next(steps) + 1}"

    def save(step: int, *, unfinished_step: Any = None) -> None:
        notes.note(f"save {step} after {len(read_metrics(folder))} lines")
        notes.unfinished = unfinished_step

    def settle(*, wait: bool) -> float | None:
        notes.settled.append(f"{'wait' if wait else 'look'} after {notes.calls[-1]}")
        return 3.0 if wait else None

    config = RunConfig.model_validate(
        {"data": {"train_files": "x"}, "model": {"path": "y"}, "trainer": {"val_freq": 2, "save_freq": 2, **trainer}}
    )
    sync = {"weight_sync/checksums_ok": 1.0}
    parts: dict[str, Any] = {
        "policy": SimpleNamespace(hf_weights=lambda: iter(())),  # no step has anything to train on
        "sampler": SimpleNamespace(
            send_weights=lambda weights, version: notes.note(f"weights {version}", sync),
            close=lambda: notes.note("end engines"),
            take_restarts=lambda: 0,
        ),
        "collector": SimpleNamespace(
            groups=sample,
            place=lambda: len(notes.calls),
            go_back_to=lambda place: notes.note(f"back to before {notes.calls[place]}"),
        ),
        "validator": SimpleNamespace(run=validate),
        "checkpointer": SimpleNamespace(
            save=save, settle=settle, note_validation=lambda step, accuracy: notes.note(f"step {step}: {accuracy}")
        ),
        "recorder": SimpleNamespace(
            write=lambda *args: notes.note("record"), wait=lambda: notes.note("records on disk")
        ),
    }
    device: Any = None  # nothing leaves it
    stopping: Any = SimpleNamespace(
        before_step=before_step, durations=stops.durations, leaving=lambda: notes.note("leave")
    )
    run = Run(
        config=config,
        placement=Placement(device, None, offloads=(), engines_sleep=False, barrier=lambda: None),
        log=RunLog(folder, resume_step=(start_step if unfinished is None else start_step - 1) or None),
        watchdog=Watchdog(factor=10, least_seconds=60),
        start_step=start_step,
        total_steps=total_steps,
        stopping=stopping,
        unfinished_step=unfinished,
        **parts,
    )
    return run, notes


def test_steps_that_keep_nothing_are_counted_and_change_nothing(tmp_path: Path) -> None:
    run, notes = make_run(tmp_path, start_step=0, total_steps=3)
    assert train(run)
    # Lines are those of step 0 (validation) and of every step so far: written before the checkpoint.
    assert notes.calls == [
        "weights 0", "validate", "step 0: 0.5", "sample 1", "sample 2", "validate", "step 2: 0.5",
        "records on disk", "save 2 after 3 lines", "sample 3", "validate", "step 3: 0.5",
        "records on disk", "save 3 after 4 lines",
    ]  # fmt: skip
    lines = read_metrics(tmp_path)
    assert [line.get("rollout/skipped_steps") for line in lines] == [None, 1.0, 1.0, 1.0]
    assert lines[0]["weight_sync/checksums_ok"] == 1.0, "the first sync is reported with the first line"


def test_a_checkpoint_is_looked_for_at_every_step_and_waited_for_at_the_end(tmp_path: Path) -> None:
    run, notes = make_run(tmp_path, start_step=0, total_steps=2, save_freq=1, val_freq=-1, val_before_train=False)
    assert train(run)
    assert notes.settled == [
        "look after weights 0",
        "wait after sample 1",
        "look after save 1 after 1 lines",
        "wait after step 2: 0.5",
        "wait after save 2 after 2 lines",
    ], "a save waits for the one before, and that is no part of its own time"
    assert run.stopping.durations.longest("checkpoint") == 3.0, "a stop will take as long as writing does"


def test_a_stop_waits_for_the_checkpoint(tmp_path: Path) -> None:
    run, notes = make_run(tmp_path, start_step=0, total_steps=3, stop="sample 2", val_before_train=False)
    assert not train(run)
    assert notes.settled[-1] == "wait after save 1 after 1 lines"


def test_every_step_returns_freed_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the memory of a rank grows by what the allocator keeps of each step (tests/reliability/memory.py)."""
    run, notes = make_run(tmp_path, start_step=0, total_steps=3, save_freq=-1, val_freq=-1)
    monkeypatch.setattr("megatron_vppo.trainer.loop.return_freed_memory", lambda: notes.note("memory"))
    train(run)
    assert [call for call in notes.calls if call.startswith(("sample", "memory"))] == [
        "sample 1", "memory", "sample 2", "memory", "sample 3", "memory",
    ]  # fmt: skip


def test_a_resumed_run_does_not_validate_again_before_training(tmp_path: Path) -> None:
    run, notes = make_run(tmp_path, start_step=2, total_steps=3, save_freq=-1)
    train(run)
    assert notes.calls == [
        "weights 2",
        "sample 3",
        "validate",
        "step 3: 0.5",
        "records on disk",
        "save 3 after 1 lines",
    ]


def test_a_finished_run_only_sends_its_weights(tmp_path: Path) -> None:
    run, notes = make_run(tmp_path, start_step=3, total_steps=3)
    train(run)
    assert notes.calls == ["weights 3"]


@pytest.mark.parametrize("step, freq, due", [(5, 5, True), (4, 5, False), (7, 5, True), (3, -1, False), (7, -1, True)])
def test_due_every_so_many_steps_and_after_the_last(step: int, freq: int, due: bool) -> None:
    assert is_due(step, freq, total_steps=7) is due


# --- Stops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "calls", "lines"),
    [
        ("before step 1", ["weights 0", "leave", "end engines", "records on disk"], 0),
        (
            "before step 2",
            ["weights 0", "sample 1", "leave", "end engines", "records on disk", "save 1 after 1 lines"],
            1,
        ),
        (
            "sample 2",
            ["weights 0", "sample 1", "sample 2", "back to before sample 2", "leave", "end engines",
             "records on disk", "save 1 after 1 lines"],
            1,
        ),
        (
            "sample 3",  # the checkpoint of step 2 is there
            ["weights 0", "sample 1", "sample 2", "validate", "step 2: 0.5",
             "records on disk", "save 2 after 2 lines", "sample 3",
             "back to before sample 3", "leave", "end engines", "records on disk"],
            2,
        ),
    ],
)  # fmt: skip
def test_a_stop_saves_the_last_step_that_is_done(stop: str, calls: list[str], lines: int, tmp_path: Path) -> None:
    run, notes = make_run(tmp_path, start_step=0, total_steps=3, stop=stop, val_before_train=False)
    assert not train(run)
    assert notes.calls == calls and len(read_metrics(tmp_path)) == lines
    assert notes.unfinished is None


def test_a_validation_that_was_cut_off_is_done_first_and_its_line_is_written_then(tmp_path: Path) -> None:
    run, notes = make_run(tmp_path, start_step=0, total_steps=3, stop="validate 2", val_before_train=False)
    assert not train(run)
    assert notes.calls[2:] == [
        "sample 2", "validate", "leave", "end engines", "records on disk", "save 2 after 1 lines",
    ]  # fmt: skip
    unfinished = json.loads(json.dumps(notes.unfinished))  # as a checkpoint keeps it
    run.log.close()

    run, notes = make_run(tmp_path, start_step=2, total_steps=3, unfinished=unfinished, val_freq=-1)
    assert train(run)
    assert notes.calls == [
        "weights 2",
        "validate",
        "step 2: 0.5",
        "sample 3",
        "validate",
        "step 3: 0.5",
        "records on disk",
        "save 3 after 3 lines",
    ]
    first, second, third = read_metrics(tmp_path)
    assert [line["step"] for line in (first, second, third)] == [1, 2, 3]
    assert (second["reward/accuracy"], second["val/accuracy"]) == (0.25, 0.5)
    assert second.keys() == {*third, "weight_sync/checksums_ok"}, "the first sync is reported with the first line"


def test_a_stop_before_training_is_not_lost(tmp_path: Path) -> None:
    run, notes = make_run(tmp_path, start_step=0, total_steps=3, stop="validate 0")
    assert not train(run)
    assert notes.calls == ["weights 0", "validate", "leave", "end engines", "records on disk"]
    assert read_metrics(tmp_path) == []
