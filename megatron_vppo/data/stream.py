"""The order in which prompts are trained on, and where a run is in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from megatron_vppo.algorithm.types import Prompt
from megatron_vppo.data.mixture import mixed_order, most_in_a_stretch, shares_of
from megatron_vppo.data.prompt_sets import PromptSets
from megatron_vppo.system.records import Record, parse_record


@dataclass(frozen=True, slots=True)
class StreamPosition:
    """A place in the order of prompts."""

    epoch: int
    offset: int
    """The number of prompts of this epoch that were handed out."""


class SavedPosition(Record):
    """A place in the order of prompts as a checkpoint keeps it, with the data, seed and shuffling it is valid for."""

    epoch: int = Field(ge=0)
    offset: int = Field(ge=0)
    seed: int
    shuffle: bool
    num_prompts: int
    files: list[list[str | int | float | None]] | None = None
    """Name, prompts and weight of each of several files; None if there is one."""


class PromptStream:
    """An endless sequence of prompts, epoch after epoch. The order follows from the seed and the epoch alone."""

    def __init__(
        self, prompts: PromptSets, *, seed: int, shuffle: bool, weights: tuple[float, ...] | None = None
    ) -> None:
        """`weights`: those that files are mixed by (mixture.py); None: every prompt comes once in an epoch."""
        self._prompts, self._seed, self._shuffle, self._weights = prompts, seed, shuffle, weights
        self.position = StreamPosition(epoch=0, offset=0)
        self._order = self._epoch_order(0)

    def steps_per_epoch(self, k: int) -> int:
        """Returns the number of full draws of k prompts in one epoch."""
        return len(self._prompts) // k

    def check_draws(self, k: int) -> None:
        """Raises ValueError if k prompts in a row cannot all be different."""
        prompts = self._prompts
        if k > len(prompts):
            raise ValueError(f"data.rollout_batch_size={k}, but {prompts.source} has {len(prompts)} usable rows")
        if self._weights is None:
            return
        for one, needed in zip(prompts.sets, most_in_a_stretch(prompts.sizes, self._weights, k), strict=True):
            if needed > len(one):
                raise ValueError(
                    f"data.rollout_batch_size={k} has up to {needed} prompts of {one.dataset.source} by its weight, "
                    f"which has {len(one)} usable rows; lower its weight, or the batch"
                )

    def next(self, k: int) -> list[Prompt]:
        """Draws the next k prompts, all different. If fewer are left of an epoch they are dropped, as by the authors.

        Raises ValueError as `check_draws`.
        """
        self.check_draws(k)
        if self.position.offset + k > len(self._prompts):
            self.move_to(StreamPosition(self.position.epoch + 1, 0))
        start = self.position.offset
        self.position = StreamPosition(self.position.epoch, start + k)
        return [self._prompts[int(i)] for i in self._order[start : start + k]]

    def prompt_of_row(self, split: str, row: int) -> Prompt:
        """Returns the prompt of a row of a data file. Raises KeyError if there is none."""
        return self._prompts.of_row(split, row)

    def describe(self) -> str | None:
        """Says what an epoch takes of each of several files; None if there is one."""
        sets, sizes = self._prompts.sets, self._prompts.sizes
        if len(sets) == 1:
            return None
        shares = sizes if self._weights is None else shares_of(sizes, self._weights)
        parts = [
            f"{share} of {one.split} ({share / size:.2f} times its {size})"
            for one, share, size in zip(sets, shares, sizes, strict=True)
        ]
        return f"an epoch is {len(self._prompts)} prompts: {', '.join(parts)}"

    def move_to(self, position: StreamPosition) -> None:
        """Goes on from there."""
        if position.epoch != self.position.epoch:
            self._order = self._epoch_order(position.epoch)
        self.position = position

    def state_dict(self) -> dict[str, Any]:
        """Returns the position as plain numbers: the fields of SavedPosition."""
        return {"epoch": self.position.epoch, "offset": self.position.offset, **self._identity()}

    def check(self, saved: SavedPosition) -> None:
        """Raises ValueError if the position is one of other data, of another seed or of another shuffling."""
        written = saved.model_dump()
        for name, value in self._identity().items():
            if written[name] != value:
                raise ValueError(
                    f"the checkpoint's data position is for {name}={written[name]}, this run has {name}={value}: "
                    "resume with the data, data.shuffle and trainer.seed it was made with, or set another "
                    "trainer.experiment_name"
                )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken.

        Raises ValueError if it is no position, or if the data, seed or shuffling differ.
        """
        saved = parse_record(SavedPosition, state)
        self.check(saved)
        self.move_to(StreamPosition(saved.epoch, saved.offset))

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "shuffle": self._shuffle,
            "num_prompts": len(self._prompts),
            "files": self._files() if len(self._prompts.sets) > 1 else None,
        }

    def _files(self) -> list[list[str | int | float | None]]:
        sets = self._prompts.sets
        weights = self._weights or (None,) * len(sets)
        return [[one.split, len(one), weight] for one, weight in zip(sets, weights, strict=True)]

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        if self._weights is not None and len(self._prompts.sets) > 1:
            return mixed_order(self._prompts.sizes, self._weights, seed=self._seed, epoch=epoch, shuffle=self._shuffle)
        if not self._shuffle:
            return np.arange(len(self._prompts))
        return np.random.Generator(np.random.PCG64([self._seed, epoch])).permutation(len(self._prompts))
