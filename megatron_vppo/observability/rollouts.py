"""The recorded responses of a run: <run>/rollouts/step_N.jsonl.zst, compressed JSON lines, one per response."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

from megatron_vppo.observability.step_files import StepFiles, read_records


class RolloutRecord(TypedDict, total=False):
    """One response. Lists have one entry per response token. Log-probs are in nats.

    A value that the run does not compute (without a perturbed view, or for a response that was not trained on) is None
    or left out. The names of the fields are those of the file, and stay.
    """

    split: str
    row: int
    """The row of the data set. (split, row) identifies the prompt."""
    sample: int
    """The index among the responses of the prompt."""
    problem: str
    answer: str
    """The ground truth."""
    response: str
    """The response as text, without special tokens."""
    tokens: list[str]
    """The text of each token, special tokens included."""
    token_ids: list[int]
    rollout_logps: list[float]
    """The log-probs that the rollout engine reported."""
    old_logps: list[float]
    """The trainer's log-probs before the update, given the original images."""
    masked_logps: list[float] | None
    """The same, given the perturbed images."""
    dependency: list[float] | None
    """The visual dependency, in the unit of its kind: nats, except for visual_focus and top1_drop."""
    kept: list[int] | None
    """1 for a token that carries policy gradient, otherwise 0."""
    reward: float
    accuracy: float
    """A number in [0, 1]."""
    reward_error: str | None
    reward_metrics: dict[str, float]
    advantage: float | None
    """The advantage within the group, before `scale`, which with shaping_in 'reward' is part of it already."""
    scale: float | None
    """The factor of the advantage or of the reward (shaping_in), from the dependency of the response."""
    finish_reason: str
    """'stop' or 'length'."""
    carried_tokens: int
    """The tokens at its beginning that an earlier step sampled, with older weights."""
    images: list[dict[str, str]]
    """One entry per image, {"original": png, "masked": png} in base64 (see `png_pair`); in the first records only."""


PER_TOKEN_FIELDS = ("token_ids", "rollout_logps", "old_logps", "masked_logps", "dependency", "kept")


ROLLOUTS = StepFiles("rollouts")
rollout_path = ROLLOUTS.path
rollout_steps = ROLLOUTS.steps
cut_rollouts_after = ROLLOUTS.cut_after
read_rollouts = read_records


def write_rollouts(run_dir: str | Path, step: int, records: Iterable[RolloutRecord]) -> Path:
    """Writes the records of a step, completely or not at all. They replace those of an earlier attempt at the step.

    Raises:
        ValueError: the per-token lists of a record differ in length.
    """
    return ROLLOUTS.write(run_dir, step, _of_equal_lengths(records, step))


def png_pair(original_png: bytes, perturbed_png: bytes | None) -> dict[str, str]:
    """Builds one entry of `images` from the bytes of two PNG files."""
    pair = {"original": base64.b64encode(original_png).decode()}
    if perturbed_png is not None:
        pair["masked"] = base64.b64encode(perturbed_png).decode()
    return pair


def _of_equal_lengths(records: Iterable[RolloutRecord], step: int) -> Iterator[RolloutRecord]:
    """Yields the records. Raises ValueError at one whose lists of tokens differ in length."""
    for index, record in enumerate(records):
        fields: Mapping[str, Any] = record
        tokens = fields.get("tokens")
        for name in PER_TOKEN_FIELDS:
            values = fields.get(name)
            if tokens is not None and values is not None and len(values) != len(tokens):
                raise ValueError(f"step {step}, record {index}: {len(values)} {name} for {len(tokens)} tokens")
        yield record
