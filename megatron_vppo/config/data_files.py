"""The data files of a run, each with the settings that apply to it, under the names that they have in a run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath

from megatron_vppo.config.schema import DataConfig, DataFile

_ENDINGS = (".parquet", ".jsonl", ".json")


def files_of(data: DataConfig, split: str) -> dict[str, DataFile]:
    """Returns the files of 'train' or 'val' by their names in records and metrics; {} if there are none.

    A single path is 'train' or 'val'. The files of a list are 'train/NAME', with `name_of`. What a file leaves open is
    filled in from the settings of `data`. Names differ, see `check_data_files`.
    """
    given = data.train_files if split == "train" else data.val_files
    if given is None:
        return {}
    if isinstance(given, str):
        return {split: _filled(DataFile(path=given), data)}
    return {f"{split}/{name_of(file)}": _filled(file, data) for file in given}


def name_of(file: DataFile) -> str:
    """Returns the name of one of several files: its own, or else the last part of its path without the ending."""
    if file.name is not None:
        return file.name
    last = PurePath(re.sub(r"@[^/@]*$", "", file.path)).name
    return re.sub(r"[^A-Za-z0-9_.-]", "_", last.removesuffix(next((e for e in _ENDINGS if last.endswith(e)), "")))


def names_of(data: DataConfig, split: str) -> tuple[str, ...]:
    """Lists the names of several files, as metrics have them; () if there is one file or none."""
    return tuple(name.partition("/")[2] for name in files_of(data, split) if "/" in name)


def weights_of(data: DataConfig) -> tuple[float, ...] | None:
    """Returns the weights of the training files; None if every row counts alike."""
    weights = [file.weight for file in files_of(data, "train").values()]
    given = [weight for weight in weights if weight is not None]
    return tuple(given) if given and len(given) == len(weights) else None


def settings_of_files(data: DataConfig) -> Mapping[str, DataFile]:
    """Returns every file of the run by the setting that names it: 'data.train_files', 'data.val_files[1]'."""
    found: dict[str, DataFile] = {}
    for split in ("train", "val"):
        files = files_of(data, split)
        for number, (name, file) in enumerate(files.items()):
            found[f"data.{split}_files" + (f"[{number}]" if "/" in name else "")] = file
    return found


def _filled(file: DataFile, data: DataConfig) -> DataFile:
    names = ("prompt_key", "answer_key", "image_key", "image_dir", "image_place")
    open_ones = {name: getattr(data, name) for name in names if getattr(file, name) is None}
    return file.model_copy(update=open_ones)
