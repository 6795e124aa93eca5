"""The chunks of a scoring pass: between two of them all ranks may leave it.

What is scored does not depend on them: a micro-batch reads nothing of its neighbours but features of images, and those
are kept from one chunk to the next. Every chunk costs a meeting of all ranks and fills and empties the pipeline once:
with p stages it takes the time of p - 1 micro-batches more. So a chunk has as many micro-batches as fit into its
time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from megatron_vppo.parallel.layout import Layout
from megatron_vppo.system.agreement import gathered

Boundary = Callable[[], None]
"""Called on every rank at the same place; raises an exception on all of them if they are to leave there."""
MicroBatch = TypeVar("MicroBatch")

FIRST_PER_STAGE = 4
"""The micro-batches of a chunk per pipeline stage, until it is known how long one takes."""


class ScoreChunks:
    """Cuts scoring passes by the time that a micro-batch took before."""

    def __init__(self, layout: Layout, *, seconds: float) -> None:
        """`seconds`: the time that a chunk may take."""
        self._layout = layout
        self._chunk_seconds = seconds
        self._micro_batch_seconds = 0.0

    def of(self, micro_batches: Sequence[MicroBatch], boundary: Boundary | None) -> Iterator[Sequence[MicroBatch]]:
        """Yields the chunks of this rank's micro-batches, and calls `boundary` between them; a collective.

        All ranks get the same number of chunks, though some may have fewer micro-batches: data-parallel ranks share
        whole groups. The last chunks of those may be empty.

        Args:
            boundary: None: nobody asks, and everything is one chunk.
        """
        if boundary is None:
            yield micro_batches
            return
        most = max(gathered(len(micro_batches)))
        done = 0
        while done < most:
            if done:
                boundary()
            size = self._size(most - done)
            chunk = micro_batches[done : done + size]
            began = time.monotonic()
            yield chunk
            if self._layout.device.type == "cuda":
                torch.cuda.synchronize()  # the chunk was launched; here it ends
            if chunk:
                self._micro_batch_seconds = (time.monotonic() - began) / len(chunk)
            done += size

    def _size(self, left: int) -> int:
        """Returns the micro-batches of the next chunk, as the slowest rank needs it; a collective.

        It is a multiple of the pipeline's size, which the interleaved schedule runs in any case. What is left is shared
        out evenly, so that the last chunk is worth its bubble.
        """
        stages, slowest = self._layout.pipeline, max(gathered(self._micro_batch_seconds))
        fitting = self._chunk_seconds / slowest if slowest else FIRST_PER_STAGE * stages
        chunks = max(1, math.ceil(left / max(fitting, stages)))
        return math.ceil(left / chunks / stages) * stages
