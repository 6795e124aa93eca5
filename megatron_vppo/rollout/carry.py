"""Groups that a step began and did not need: the next step goes on with them, if rollout.unfinished is 'carry'.

    step 7    prompt 31:  sample 0  "The sum is 12."  ended      sample 1  "I see three"  unfinished
    step 8    prompt 31:  sample 0  as it is                     sample 1  "I see three" + " boxes ..."

A response then has tokens of several weights. Each keeps the log-prob that its own weights gave it, so that
algorithm.rollout_correction_cap weighs it by how far the policy has moved since.
"""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import Field

from megatron_vppo.algorithm.types import Prompt, Response
from megatron_vppo.rollout.records import UNFINISHED, Ask
from megatron_vppo.rollout.seeds import continued_seed
from megatron_vppo.system.records import Record, parse_record

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CarriedGroup:
    """A group that a step began, as far as it came."""

    prompt: Prompt
    seeds: tuple[int | None, ...]
    """The seeds of all of its responses."""
    responses: Mapping[int, Response]
    """By their samples: those that have ended, and those that are unfinished, with the reason UNFINISHED."""

    @property
    def ended(self) -> list[Response]:
        """The responses that need nothing more, as the next step takes them."""
        return [one for one in self.responses.values() if one.finish_reason != UNFINISHED]

    @property
    def missing(self) -> tuple[int, ...]:
        """The samples that are still to be sampled, or a part of them."""
        ended = {one.sample for one in self.ended}
        return tuple(sample for sample in range(len(self.seeds)) if sample not in ended)

    def begun(self, sample: int) -> Sequence[int]:
        """Returns the tokens that a missing response has already."""
        return self.responses[sample].token_ids if sample in self.responses else ()

    def ask(self) -> Ask:
        """Returns what an engine is asked: the missing responses, in order."""
        begun = tuple(self.begun(sample) for sample in self.missing)
        seeds = tuple(
            continued_seed(self.seeds[sample], tokens=len(tokens))
            for sample, tokens in zip(self.missing, begun, strict=True)
        )
        return Ask(self.prompt, seeds, begun)


class SavedResponse(Record):
    """A response of a carried group as a checkpoint keeps it."""

    sample: int = Field(ge=0)
    token_ids: list[int]
    logps: list[float]
    finish_reason: str
    weight_version: int


class SavedGroup(Record):
    """A carried group as a checkpoint keeps it."""

    split: str = "train"
    """The name of its data file; checkpoints from before there could be several lack it."""
    row: int = Field(ge=0)
    prompt: str
    """A hash of the prompt that the tokens answer."""
    seeds: list[int | None]
    responses: list[SavedResponse]


class SavedCarry(Record):
    """All carried groups as a checkpoint keeps them."""

    groups: list[SavedGroup]


NOTHING_CARRIED: dict[str, Any] = {"groups": []}
"""The state of a Carry without groups."""


class PromptsByRow(Protocol):
    """The prompts of a run."""

    def prompt_of_row(self, split: str, row: int) -> Prompt:
        """Returns the prompt of a row of a data file. Raises KeyError if there is none."""


class Carry:
    """The groups that the next step goes on with, on rank 0."""

    def __init__(self, prompts: PromptsByRow | None) -> None:
        """`prompts`: None where nothing is carried."""
        self._prompts = prompts
        self.groups: tuple[CarriedGroup, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        """Returns the groups as plain numbers: the fields of SavedCarry."""
        return {
            "groups": [
                {
                    "split": group.prompt.split,
                    "row": group.prompt.row,
                    "prompt": _prompt_hash(group.prompt),
                    "seeds": list(group.seeds),
                    "responses": [_saved(one) for one in group.responses.values()],
                }
                for group in self.groups
            ]
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken, without groups whose rows make another prompt now, or none.

        Raises ValueError if it is no such state.
        """
        saved = parse_record(SavedCarry, state).groups
        found = [group for one in saved if (group := self._group(one)) is not None]
        if left := len(saved) - len(found):
            logger.warning("%d carried groups are left behind: their rows make other prompts now, or none", left)
        self.groups = tuple(found)

    def _group(self, saved: SavedGroup) -> CarriedGroup | None:
        assert self._prompts is not None, "groups are carried on rank 0"
        try:
            prompt = self._prompts.prompt_of_row(saved.split, saved.row)
        except KeyError:
            return None
        if _prompt_hash(prompt) != saved.prompt:
            return None
        responses = {
            one.sample: Response(
                prompt, 0, one.sample, array("i", one.token_ids), array("d", one.logps),
                one.finish_reason, one.weight_version, len(one.token_ids),
            )
            for one in saved.responses
        }  # fmt: skip
        return CarriedGroup(prompt, tuple(saved.seeds), responses)


def _prompt_hash(prompt: Prompt) -> str:
    parts = (prompt.compact_token_ids, prompt.grids_thw, prompt.answer)
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _saved(response: Response) -> dict[str, Any]:
    return {
        "sample": response.sample,
        "token_ids": list(response.token_ids),
        "logps": list(response.rollout_logps),
        "finish_reason": response.finish_reason,
        "weight_version": response.weight_version,
    }
