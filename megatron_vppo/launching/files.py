"""The model, the rows and the files of a run, as far as this machine sees them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download

from megatron_vppo.config.data_files import files_of
from megatron_vppo.config.schema import DataFile, RunConfig
from megatron_vppo.data.sources import check_source
from megatron_vppo.models.hf_config import HfConfig
from megatron_vppo.models.model_files import open_model_files
from megatron_vppo.planning.published import PUBLISHED, published_config
from megatron_vppo.setup.inputs import background_color, open_file
from megatron_vppo.setup.model_folder import model_folder
from megatron_vppo.setup.preflight import missing_file, own_files

NOT_SEEN = "this machine does not see it, and the nodes have to"


@dataclass(frozen=True)
class FileFinding:
    """A line about one setting that names a file."""

    ok: bool
    """False: a warning. The run may still find on its nodes what is not here."""
    text: str


@dataclass(frozen=True)
class SeenModel:
    hf_config: HfConfig
    finding: FileFinding


@dataclass(frozen=True)
class SeenFiles:
    findings: tuple[FileFinding, ...]
    train_rows: int | None
    """The rows of the training data before any is left out; None if they are not on this machine."""


def see_model(path: str) -> SeenModel:
    """Opens the model's folder as a run does. A released model of the hub needs no folder: its configuration is known.

    Raises:
        ValueError: a folder that is not whole, or neither a folder nor a released model. Nothing is downloaded.
    """
    if Path(path).is_dir():
        files = open_model_files(model_folder(path))
        return SeenModel(files.hf_config, FileFinding(True, f"model.path: {path} is whole"))
    released = {model.hub_id: model for model in PUBLISHED.values()}
    reason = "not on this machine"
    try:
        files = open_model_files(Path(snapshot_download(path, local_files_only=True)))
        return SeenModel(files.hf_config, FileFinding(True, f"model.path: {path} is whole, in the hub's cache"))
    except (OSError, ValueError) as error:  # not in the cache, only in part, or no name of a repository
        if path not in released:
            raise ValueError(
                f"model.path={path}: no such folder, not whole in the hub's cache ({error}), and not one of the "
                f"released models whose sizes are known: {', '.join(released)}"
            ) from error
    return SeenModel(
        published_config(released[path].name),
        FileFinding(False, f"model.path: {path} is {reason}; its published configuration was used"),
    )


def see_files(config: RunConfig) -> SeenFiles:
    """Looks for everything else that the settings name. What is here is checked as `vppo train` checks it.

    Raises:
        ValueError: a file that is here is damaged, or lacks a column; or a colour that is none.
    """
    background_color(config.data)
    findings: list[FileFinding] = []
    train_rows: list[int | None] = []
    for split in ("train", "val"):
        for name, file in files_of(config.data, split).items():
            finding, rows = _see_rows(config, name, file)
            findings.append(finding)
            train_rows += [rows] if split == "train" else []
    findings += _see_own_files(config)
    seen = [rows for rows in train_rows if rows is not None]
    return SeenFiles(tuple(findings), sum(seen) if len(seen) == len(train_rows) else None)


def _see_rows(config: RunConfig, name: str, file: DataFile) -> tuple[FileFinding, int | None]:
    setting, source = f"data.{name.partition('/')[0]}_files", file.path
    try:
        location = check_source(source).location
    except ValueError as error:
        return FileFinding(False, f"{setting}: {error}; {NOT_SEEN}"), None
    if not Path(location).exists():
        text = f"{setting}: {source} is not on this machine; ranks read it from the hub, or from its cache"
        return FileFinding(False, text), None
    rows = len(open_file(config, name, file))
    return FileFinding(True, f"{setting}: {source}, {rows} rows"), rows


def _see_own_files(config: RunConfig) -> Iterator[FileFinding]:
    for setting, path in own_files(config).items():
        missing = missing_file(setting, path)
        yield FileFinding(False, f"{missing}; {NOT_SEEN}") if missing else FileFinding(True, f"{setting}: {path}")
