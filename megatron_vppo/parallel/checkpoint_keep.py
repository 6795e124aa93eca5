"""The checkpoints that stay when a new one is there: the newest ones, and the best one besides."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import Field

from megatron_vppo.parallel.checkpoint_folder import checkpoint_steps, step_folder
from megatron_vppo.system.records import Record, parse_record
from megatron_vppo.system.whole import remove_folder, whole_file
from megatron_vppo.weights.dist_metadata import DamagedCheckpoint, naming

BEST = "best.json"


class Best(Record):
    """The checkpoint with the highest accuracy of validation; of equal ones the oldest."""

    step: int
    accuracy: float = Field(alias="val/accuracy")


def keep_checkpoints(folder: Path, *, step: int, accuracy: float | None, keep: int) -> None:
    """Notes the best checkpoint and removes those that need not stay, after that of `step` was written.

    Args:
        accuracy: that of the validation of this step; None: it was not validated.
        keep: the number of newest checkpoints that stay; -1: all.
    """
    best = _note_best(folder, step, accuracy)
    if keep == -1:
        return
    steps = [other for other in checkpoint_steps(folder) if other <= step]
    for old in steps[:-keep]:
        if old != best:
            remove_folder(step_folder(folder, old))


def read_best(folder: Path) -> Best | None:
    """Reads which checkpoint is the best one; None if none was validated.

    Raises:
        DamagedCheckpoint: the file cannot be read, or is not what was written there.
    """
    path = folder / BEST
    if not path.exists():
        return None
    with naming(path):
        text = path.read_bytes()
    remedy = "remove it, and the next validated checkpoint counts as the best one"
    try:
        return parse_record(Best, json.loads(text))
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path} is damaged ({error}); {remedy}") from error


def forget_best_after(folder: Path, step: int) -> None:
    """Forgets that a later checkpoint is the best one: it is set aside, and another may get its name."""
    best = read_best(folder)
    if best is not None and best.step > step:
        (folder / BEST).unlink()


def _note_best(folder: Path, step: int, accuracy: float | None) -> int | None:
    """Writes down the checkpoint of `step` if it is the best one now; returns the step of the best one."""
    best = read_best(folder)
    if best is not None and not step_folder(folder, best.step).is_dir():
        best = None
        (folder / BEST).unlink()
    if accuracy is not None and (best is None or accuracy > best.accuracy or best.step == step):
        best = Best.model_validate({"step": step, "val/accuracy": accuracy})
        with whole_file(folder / BEST) as file:
            file.write(json.dumps(best.model_dump(by_alias=True)).encode())
    return None if best is None else best.step
