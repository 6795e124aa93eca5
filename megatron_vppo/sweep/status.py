"""The state of a run of a sweep, read from its folder. No other record is kept of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_vppo.config.load import load_config
from megatron_vppo.config.schema import RunConfig
from megatron_vppo.observability.metrics import read_metrics
from megatron_vppo.setup.attempts import is_finished
from megatron_vppo.setup.run_folder import RunFolder
from megatron_vppo.sweep.plan import SweepRun

RunState = Literal["not begun", "unfinished", "finished", "other settings"]
_COUNTING = ("trainer.total_steps", "trainer.total_epochs", "trainer.load_checkpoint_path", "trainer.seed")
"""The settings of a section that otherwise says where and how a run trains, and not what."""


@dataclass(frozen=True)
class RunStatus:
    state: RunState
    step: int | None
    """The last step that has ended; None: none has."""
    differences: tuple[str, ...] = ()
    """The settings that the folder's run was made with, where they are others."""


def status_of(run: SweepRun) -> RunStatus:
    """Looks into the folder of a run.

    Its settings count as others if one of them differs that says what is trained. All of `parallel` may differ, and of
    `trainer` what is not in _COUNTING: a run goes on under another layout, and with another `save_freq`.
    """
    saved = RunFolder.of(run.config.trainer).config
    lines = read_metrics(run.folder)
    step = int(lines[-1]["step"]) if lines else None
    if not saved.is_file():
        return RunStatus("not begun", step)
    if differences := tuple(_differences(saved, run.config)):
        return RunStatus("other settings", step, differences)
    return RunStatus("finished" if is_finished(run.folder) else "unfinished", step)


def check_settings(runs: Sequence[SweepRun], states: Mapping[str, RunStatus]) -> None:
    """Refuses to mix runs that were made with other settings, as they are in the folder of a sweep that was changed.

    Raises:
        ValueError: naming each of them with its differences.
    """
    others = [run for run in runs if states[run.name].state == "other settings"]
    if others:
        listed = [f"{run.folder}: {'; '.join(states[run.name].differences)}" for run in others]
        heading = (
            "runs of the same names were made with other settings; remove their folders, or set another 'name:' in the "
            "sweep file"
        )
        raise ValueError("\n  - ".join([heading, *listed]))


def _differences(saved: Path, config: RunConfig) -> Iterator[str]:
    try:
        then = dict(_leaves(load_config(saved).model_dump(mode="json")))
    except ValueError as error:
        yield str(error)
        return
    for name, now in _leaves(config.model_dump(mode="json")):
        section = name.partition(".")[0]
        if (section in ("trainer", "parallel") and name not in _COUNTING) or then.get(name) == now:
            continue
        yield f"{name} was {then.get(name)!r} and is {now!r}"


def _leaves(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
