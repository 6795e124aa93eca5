"""The records of one step as flat arrays, so that another process can take them over and write them.

Shape suffix legend: B = responses; N = response tokens of the whole step, flat.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from megatron_vppo.observability.rollouts import ROLLOUTS, RolloutRecord, png_pair, write_rollouts
from megatron_vppo.observability.step_files import StepFiles

DECIMALS = 6
"""The digits that log-probs and dependencies keep behind the point."""


@dataclass(frozen=True)
class StepRecords:
    """One record per response, in order. A float array holds what the record's list does before it is rounded."""

    files: ClassVar[StepFiles] = ROLLOUTS
    heads: Sequence[RolloutRecord]
    """[B]; the fields that are no lists of tokens, without images."""
    lengths: Sequence[int]
    """[B]; the tokens of each response."""
    token_texts: Mapping[int, str]
    """The text of each token that occurs, special tokens included."""
    token_ids_N: np.ndarray
    """int32."""
    floats_N: Mapping[str, np.ndarray | None]
    """float32 or float64, by the name of the field; None for one that the run does not compute."""
    kept_N: np.ndarray
    """int8; 1 for a token that carries policy gradient."""
    images: Mapping[int, Sequence[tuple[Image.Image, Image.Image | None]]] = field(default_factory=dict)
    """The images of some responses, by their number, as (original, perturbed)."""

    def write(self, run_dir: Path, step: int) -> Path:
        """Writes the file of the step, completely or not at all."""
        return write_rollouts(run_dir, step, self.records())

    def records(self) -> Iterator[RolloutRecord]:
        """Yields the records as `write_rollouts` takes them."""
        start = 0
        for number, (head, length) in enumerate(zip(self.heads, self.lengths, strict=True)):
            span = slice(start, start + length)
            start += length
            token_ids = self.token_ids_N[span].tolist()
            tokens: dict[str, Any] = {
                "tokens": [self.token_texts[token] for token in token_ids],
                "token_ids": token_ids,
                **{name: None if array is None else _rounded(array[span]) for name, array in self.floats_N.items()},
                "kept": self.kept_N[span].tolist(),
            }
            record: Any = {name: tokens.get(name, head.get(name)) for name in _FIELDS if name in tokens or name in head}
            if number in self.images:
                record["images"] = [
                    png_pair(_png(original), None if perturbed is None else _png(perturbed))
                    for original, perturbed in self.images[number]
                ]
            yield record


_FIELDS = tuple(RolloutRecord.__annotations__)
"""The order of the fields in the file."""


def _rounded(array_N: np.ndarray) -> list[float]:
    """Rounds as Python's `round` does, all at once: the product of a float32 and 10^6 is exact in float64."""
    scale = 10.0**DECIMALS
    rounded: list[float] = (np.rint(array_N.astype(np.float64) * scale) / scale).tolist()
    return rounded


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
