"""The choice of the checkpoint that a run goes on from, and what to do if that one is damaged."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_vppo.config.schema import TrainerConfig
from megatron_vppo.data.stream import SavedPosition
from megatron_vppo.parallel.checkpoint_folder import (
    STATE,
    SavedState,
    check_whole,
    checkpoint_steps,
    read_state,
    step_folder,
)
from megatron_vppo.parallel.checkpoint_keep import read_best
from megatron_vppo.setup.attempts import has_begun
from megatron_vppo.setup.run_folder import RunFolder
from megatron_vppo.setup.unattended import older_instead
from megatron_vppo.system.records import parse_record
from megatron_vppo.weights.dist_metadata import DamagedCheckpoint


def check_resume(config: TrainerConfig) -> None:
    """Checks, without a rank or a model, the checkpoint that the run goes on from or starts from, if there is one.

    Raises:
        ValueError: see `chosen_step`, `check_origin` and `given_checkpoint`; or it is damaged. The message then names
            another one of the run folder that is whole.
    """
    folder = RunFolder.of(config).checkpoints
    steps = checkpoint_steps(folder)
    step = chosen_step(config, RunFolder.of(config), steps)
    read_best(folder)

    def check(step: int) -> None:
        check_whole(folder, step)
        saved_position(folder, step)

    if step:
        try:
            check(step)
        except ValueError as error:
            older = older_instead(error, step, steps, check, config=config)
            if older is None:
                raise with_way_out(error, step, steps, check) from error
            step = older
        check_origin(config, folder, step)
    elif config.load_checkpoint_path is not None:
        folder, step = given_checkpoint(config.load_checkpoint_path)
        check(step)


def chosen_step(config: TrainerConfig, folder: RunFolder, steps: Sequence[int]) -> int:
    """Returns the step to go on from; 0 if there is no checkpoint.

    A SLURM job that was requeued goes on from what it has written itself, whatever trainer.resume and
    trainer.resume_step say: they chose where the job began.

    Args:
        steps: those that have a checkpoint, in rising order.

    Raises:
        ValueError: there is a checkpoint and trainer.resume=false, or there is none of trainer.resume_step.
    """
    if has_begun(folder.root):
        return max(steps, default=0)
    if steps and not config.resume:
        raise ValueError(
            f"trainer.resume=false, but {folder.root} holds the checkpoint of step {steps[-1]}, which a new run "
            "would mix with its own; set another trainer.experiment_name, or remove the folder"
        )
    if config.resume_step is None:
        return max(steps, default=0)
    if config.resume_step not in steps:
        there = f"those of steps {', '.join(map(str, steps))}; set one of them" if steps else "none"
        raise ValueError(
            f"trainer.resume_step={config.resume_step}: there is no such checkpoint. {folder.checkpoints} has {there}, "
            "or leave the setting out"
        )
    return config.resume_step


def given_checkpoint(path: str) -> tuple[Path, int]:
    """Returns the folder of checkpoints and the step that trainer.load_checkpoint_path names.

    Raises:
        ValueError: it is not the folder of a checkpoint; names one that is, if the folder has any.
    """
    given = Path(path).absolute()
    match = re.fullmatch(r"global_step_(0|[1-9][0-9]*)", given.name)
    if match and given.is_dir():
        return given.parent, int(match[1])
    newest = [(folder, max(checkpoint_steps(folder), default=None)) for folder in (given, given / "checkpoints")]
    found = [step_folder(folder, step) for folder, step in newest if step is not None]
    there = f"it has {found[0]}; set that" if found else "set a folder .../checkpoints/global_step_N"
    raise ValueError(f"trainer.load_checkpoint_path: {given} is not the folder of a checkpoint; {there}")


def check_origin(config: TrainerConfig, folder: Path, step: int) -> None:
    """Checks that a run folder's checkpoint is one of a run that began with trainer.load_checkpoint_path, if it is set.

    Raises:
        ValueError: the run of the folder began otherwise, so that the setting would have no effect.
    """
    if config.load_checkpoint_path is None:
        return
    given, began = str(Path(config.load_checkpoint_path).absolute()), started_from(folder, step)
    if began != given:
        raise ValueError(
            f"trainer.load_checkpoint_path={given}, but {folder} holds the checkpoint of step {step} of a run that "
            f"began with {began or 'model.path'}; leave the setting out to go on from step {step}, or set another "
            "trainer.experiment_name to start a new run"
        )


def started_from(folder: Path, step: int) -> str | None:
    """Reads the checkpoint of another run that the run of this one began with. Raises DamagedCheckpoint."""
    return parse_record(SavedState, read_state(folder, step)).started_from


def saved_position(folder: Path, step: int) -> SavedPosition:
    """Reads the place in the data from a checkpoint. Raises DamagedCheckpoint if there is none."""
    data = read_state(folder, step).get("data")
    try:
        return parse_record(SavedPosition, data)
    except ValueError as error:
        path = step_folder(folder, step) / STATE
        raise DamagedCheckpoint(f"{path} is damaged: 'data' in it {error}") from error


def with_way_out(error: ValueError, step: int, steps: Sequence[int], check: Callable[[int], object]) -> ValueError:
    """Returns the error of the checkpoint of `step`, with another one that the run can go on from and how to do so.

    Args:
        steps: those that have a checkpoint, in rising order.
        check: raises ValueError if the checkpoint of a step cannot be gone on from.
    """
    for other in reversed([other for other in steps if other != step]):
        try:
            check(other)
        except ValueError:
            continue
        return ValueError(f"{error}. The checkpoint of step {other} is whole; trainer.resume_step={other} takes it")
    if isinstance(error, DamagedCheckpoint):
        return ValueError(
            f"{error}. There is no other whole checkpoint; set another trainer.experiment_name to start from the "
            "beginning"
        )
    return error
