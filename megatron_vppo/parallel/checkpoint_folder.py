"""The folder `checkpoints` of a run: its steps, the check that one is whole, and those that a resume passes over.

Nothing here needs a rank or a model, so a folder can be looked at before any process is started.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from pathlib import Path
from typing import Any, Literal

from megatron_vppo.system.records import Record, parse_record
from megatron_vppo.weights.dist_metadata import DIST_CKPT, DamagedCheckpoint, naming
from megatron_vppo.weights.load import check_dist_ckpt

STATE = "trainer_state.json"


class SavedSizes(Record):
    """The layout that wrote a checkpoint, under the names of the settings. A run may go on under any other."""

    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    pipeline_layers: list[int]
    vision_split: str
    freeze: list[str]
    backend: str


class SavedState(SavedSizes):
    """The fields of STATE that every checkpoint has. The loop adds its own."""

    step: int
    optimizer: Literal["by parameter", "none"] | None = None
    """The form of the optimizer's state. None: that of older versions, which `SavedSizes` must equal to be read."""
    optimizer_updates: int = 0
    """The updates that the optimizer's moments come from; unknown in older checkpoints."""
    started_from: str | None = None
    """The checkpoint of another run that the run began with, as an absolute path; None: it began with model.path."""
    plain_think_tokens: bool = False
    """The setting of this name: the model was trained with the tokenizer that this makes of its folder's."""


def checkpoint_steps(folder: Path) -> list[int]:
    """Returns the steps that have a checkpoint, damaged or not, in rising order; found from the folders themselves.

    Raises DamagedCheckpoint if the folder cannot be read, or is a link that leads nowhere: whatever is in it must not
    be taken for nothing.
    """
    if not os.path.lexists(folder):
        return []
    with naming(folder, missing=f"{folder} is a link to {os.path.realpath(folder)}, which is not there"):
        names = [path.name for path in folder.iterdir()]
    matches = (re.fullmatch(r"global_step_(0|[1-9][0-9]*)", name) for name in names)
    return sorted(int(match[1]) for match in matches if match)


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"global_step_{step}"


def check_whole(folder: Path, step: int) -> dict[str, Any]:
    """Checks everything of a checkpoint that can be checked without reading the values of tensors.

    Returns:
        Its STATE.

    Raises:
        DamagedCheckpoint: something is missing or damaged; names the file.
    """
    state = read_state(folder, step)
    check_dist_ckpt(step_folder(folder, step) / DIST_CKPT)
    return state


def read_state(folder: Path, step: int) -> dict[str, Any]:
    """Reads STATE of a checkpoint.

    Raises:
        DamagedCheckpoint: it cannot be read, is not what was written there, or is that of another step.
    """
    path = step_folder(folder, step) / STATE
    state, saved = _read(path)
    if saved.step != step:
        raise DamagedCheckpoint(f"{path} is that of step {saved.step}, its folder that of step {step}")
    return state


def saved_state(checkpoint: Path) -> SavedState | None:
    """Reads STATE of a folder of whatever name; None if it has none, as a converted folder.

    Raises DamagedCheckpoint as `read_state`.
    """
    path = checkpoint / STATE
    return _read(path)[1] if path.exists() else None


def _read(path: Path) -> tuple[dict[str, Any], SavedState]:
    with naming(path):
        text = path.read_bytes()
    try:
        state: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path} is not JSON ({error})") from error
    try:
        saved = parse_record(SavedState, state)
    except ValueError as error:
        raise DamagedCheckpoint(f"{path} is damaged: it {error}") from error
    return state, saved


def set_aside_after(folder: Path, step: int) -> list[Path]:
    """Renames the checkpoints of later steps, so that none of them is found as the newest or written over.

    Returns:
        Their new paths, in rising order of the steps.
    """
    return [_set_aside(step_folder(folder, later)) for later in checkpoint_steps(folder) if later > step]


def _set_aside(path: Path) -> Path:
    names = itertools.chain([f"set_aside_{path.name}"], (f"set_aside_{path.name}.{n}" for n in itertools.count(2)))
    target = next(free for name in names if not (free := path.with_name(name)).exists())
    return path.rename(target)
