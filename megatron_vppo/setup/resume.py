"""The choice of the checkpoint that a run goes on from, and what to do if that one is damaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_vppo.config.schema import TrainerConfig
from megatron_vppo.data.stream import SavedPosition
from megatron_vppo.parallel.checkpoint_folder import STATE, check_whole, checkpoint_steps, read_state, step_folder
from megatron_vppo.setup.run_folder import RunFolder
from megatron_vppo.setup.unattended import older_instead
from megatron_vppo.system.records import parse_record
from megatron_vppo.weights.dist_metadata import DamagedCheckpoint


def check_resume(config: TrainerConfig) -> None:
    """Checks, without a rank or a model, that the run folder's checkpoint can be gone on from, if it has one.

    Raises:
        ValueError: see `chosen_step`; or it is damaged. The message then names another one that is whole.
    """
    folder = RunFolder.of(config)
    steps = checkpoint_steps(folder.checkpoints)
    step = chosen_step(config, folder, steps)

    def check(step: int) -> None:
        check_whole(folder.checkpoints, step)
        saved_position(folder, step)

    if step:
        try:
            check(step)
        except ValueError as error:
            if older_instead(error, step, steps, check, config=config) is None:
                raise with_way_out(error, step, steps, check) from error


def chosen_step(config: TrainerConfig, folder: RunFolder, steps: Sequence[int]) -> int:
    """Returns the step to go on from; 0 if there is no checkpoint.

    Args:
        steps: those that have a checkpoint, in rising order.

    Raises:
        ValueError: there is a checkpoint and trainer.resume=false, or there is none of trainer.resume_step.
    """
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


def saved_position(folder: RunFolder, step: int) -> SavedPosition:
    """Reads the place in the data from a checkpoint. Raises DamagedCheckpoint if there is none."""
    data = read_state(folder.checkpoints, step).get("data")
    try:
        return parse_record(SavedPosition, data)
    except ValueError as error:
        path = step_folder(folder.checkpoints, step) / STATE
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
