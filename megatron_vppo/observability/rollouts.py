"""What the model answered: <run>/rollouts/step_N.jsonl.zst, one record per response, compressed JSON lines."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

import zstandard

from megatron_vppo.observability.json_lines import dump_line, parse_lines, replaced_file


class RolloutRecord(TypedDict, total=False):
    """One response. Lists are per response token, all of the same length; logs are nats.

    A value that the run does not compute (no second view, a response that was not trained on) is None or left out.
    """

    split: str
    row: int
    """Row of the data set; (split, row) identifies the prompt."""
    sample: int
    """Index among the samples of the prompt."""
    problem: str
    answer: str
    """Ground truth."""
    response: str
    """Text without special tokens."""
    tokens: list[str]
    """Each token as text, special tokens included."""
    token_ids: list[int]
    rollout_logps: list[float]
    """As the rollout engine reported them."""
    old_logps: list[float]
    """By the trainer before the update, given the original image."""
    masked_logps: list[float] | None
    """The same given the perturbed image."""
    dependency: list[float] | None
    """Visual dependency, nats."""
    kept: list[int] | None
    """1 where the token carries policy gradient."""
    reward: float
    accuracy: float
    """In [0, 1]."""
    reward_error: str | None
    reward_metrics: dict[str, float]
    advantage: float | None
    """Of the group, before the scale."""
    scale: float | None
    """Factor of the advantage from the trajectory's visual dependency."""
    finish_reason: str
    """'stop' or 'length'."""
    images: list[dict[str, str]]
    """Per picture {"original": png, "masked": png} as base64, see `png_pair`; on the first few records only."""


PER_TOKEN_FIELDS = ("token_ids", "rollout_logps", "old_logps", "masked_logps", "dependency", "kept")


def rollout_path(run_dir: str | Path, step: int) -> Path:
    return Path(run_dir) / "rollouts" / f"step_{step}.jsonl.zst"


def write_rollouts(run_dir: str | Path, step: int, records: Iterable[RolloutRecord]) -> Path:
    """Write the records of a step, whole or not at all, in place of those of an earlier attempt at the step.

    Raises:
        ValueError: the per-token lists of a record differ in length.
    """
    path = rollout_path(run_dir, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as file, zstandard.ZstdCompressor(level=6).stream_writer(file, closefd=False) as packed:
        for index, record in enumerate(records):
            _check_lengths(record, where=f"step {step}, record {index}")
            packed.write(dump_line(record).encode())
    return path


def read_rollouts(path: str | Path) -> Iterator[dict[str, Any]]:
    """The records of one file, as written; non-finite numbers are strings (see json_lines)."""
    with open(path, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as unpacked:
        yield from parse_lines(io.TextIOWrapper(unpacked, encoding="utf-8"))


def rollout_steps(run_dir: str | Path) -> list[int]:
    """Steps that have a file, ascending."""
    names = (re.fullmatch(r"step_(\d+)\.jsonl\.zst", path.name) for path in (Path(run_dir) / "rollouts").glob("step_*"))
    return sorted(int(match[1]) for match in names if match)


def cut_rollouts_after(run_dir: str | Path, step: int) -> None:
    """Delete the files of later steps, which a resumed run computes again."""
    for later in rollout_steps(run_dir):
        if later > step:
            rollout_path(run_dir, later).unlink()


def png_pair(original_png: bytes, masked_png: bytes | None) -> dict[str, str]:
    """One entry of `images`, from the bytes of two PNG files."""
    pair = {"original": base64.b64encode(original_png).decode()}
    if masked_png is not None:
        pair["masked"] = base64.b64encode(masked_png).decode()
    return pair


def _check_lengths(record: Mapping[str, Any], *, where: str) -> None:
    tokens = record.get("tokens")
    for name in PER_TOKEN_FIELDS:
        values = record.get(name)
        if tokens is not None and values is not None and len(values) != len(tokens):
            raise ValueError(f"{where}: {len(values)} {name} for {len(tokens)} tokens")
