"""The trainer's half of the weight transfer: it takes a stream of tensors and drives vLLM's transfer session.

Two buffers take turns, in shared host memory or on the GPU. While the engine loads one, the next tensors are gathered
into the other:

    buffer 1   pack A | engine loads A |  pack C        | engine loads C
    buffer 2          |  pack B        | engine loads B |  pack D         ...

A buffer is packed again only after the engine has loaded it (`end_update_weights`). Besides the two
buffers the trainer holds no copy of the weights.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_vppo.rollout.records import LiveWeight, SyncReport
from megatron_vppo.rollout.transfer.bundle import (
    Bundle,
    GatheringStream,
    TransferBuffer,
    buffer_capacity,
    drain,
    pieces_of,
)
from megatron_vppo.rollout.transfer.vllm_layout import (
    DigestKey,
    ExpectedDigests,
    StreamCheck,
    canonical_name,
    parameters_of,
)

BUFFER_BYTES = 2 << 30
"""The size of one buffer, about (`buffer_capacity`). Every buffer costs a round trip: the stream of the GPU is awaited,
and the engine's processes and workers are asked."""
SHARE_OF_FREE_MEMORY = 4
"""A buffer takes at most this fraction of the memory that is free, if its largest tensor fits in it."""


class WeightSession(Protocol):
    """vLLM's transfer session of one engine, with its update step split in two, so that packing can go on meanwhile."""

    def start_weight_update(self) -> None: ...

    def begin_update_weights(self, update_info: dict[str, Any]) -> None: ...

    def end_update_weights(self) -> None:
        """Waits for the engine to load the last buffer; returns at once if there is none."""

    def finish_weight_update(self, weight_version: str) -> None: ...

    def abort_weight_update(self) -> None: ...

    def live_digests(self) -> list[dict[str, str]]: ...


@dataclass
class _Counts:
    """The tensors, bytes and buffers of one transfer so far, and the seconds that hashing took."""

    tensors: int = 0
    bytes: int = 0
    buffers: int = 0
    hash_seconds: float = 0.0


class WeightSender:
    """Sends a model to one engine, again and again; whole, or without the tensors that do not change."""

    def __init__(
        self,
        session: WeightSession,
        *,
        buffers: tuple[TransferBuffer, TransferBuffer],
        buffer_bytes: int = BUFFER_BYTES,
        workers: Sequence[Sequence[LiveWeight]],
        dtype: torch.dtype,
    ) -> None:
        """
        Args:
            buffer_bytes: see BUFFER_BYTES.
            workers: the weights of each of the engine's workers.
            dtype: the dtype that they compute in.
        """
        self._session = session
        self._workers = workers
        self._dtype = dtype
        self._digests: Mapping[DigestKey, str] = {}
        self._present: frozenset[str] = frozenset()
        """The tensors that the engine now holds, as `canonical_name` spells them."""
        self._preserved: frozenset[str] = frozenset()
        self._buffers = buffers
        self._buffer_bytes = buffer_bytes

    def preserve(self, names: Collection[str]) -> tuple[str, ...]:
        """Notes that these tensors stay when the engine forgets its weights; returns vLLM's names of their parameters.

        Raises ValueError if vLLM stacks one of them together with a tensor that is not named.
        """
        parameters = parameters_of(names, self._workers)
        self._preserved = frozenset(canonical_name(name) for name in names)
        return parameters

    def forget_weights(self) -> None:
        """Notes that the engine has forgotten its weights, except for the preserved ones."""
        self._present &= self._preserved

    def send(
        self, stream: Iterator[tuple[str, Tensor]], *, version: int, verify: bool, kept: Collection[str] = ()
    ) -> SyncReport:
        """Sends one model.

        A layer's tensors should be adjacent, because vLLM keeps the tensors of incomplete layers in memory. Making the
        stream is usually a collective of all trainer ranks, so after an error it is still run to its end before the
        error is raised.

        Args:
            verify: compare the weights that the engine then computes with to those sent.
            kept: tensors that do not come, because the engine has them from an earlier transfer. With `verify` they
                are compared with their digests from the last transfer that was verified, if there was one.

        Raises:
            ValueError: a name is unknown, comes twice or is missing. Or a tensor is to be kept that the engine does not
                have, because the last transfer failed or it forgot the tensor in its sleep.
            RuntimeError: the engine failed, or verification found a weight that differs.
        """
        try:
            return self._send(stream, version=version, verify=verify, kept=kept)
        except (ValueError, RuntimeError, OSError):
            drain(stream)
            raise
        finally:
            for buffer in self._buffers:
                buffer.free()

    def _send(
        self, stream: Iterator[tuple[str, Tensor]], *, version: int, verify: bool, kept: Collection[str]
    ) -> SyncReport:
        start = time.perf_counter()
        check = StreamCheck(self._workers, kept=kept)
        if missing := check.kept - self._present:
            raise ValueError(
                f"the rollout engine has no complete set of weights, so it cannot keep some: {min(missing)} is not "
                "there; send all of them"
            )
        self._present = frozenset()
        expected = self._expected_digests(check) if verify else None
        counts = self._transfer(stream, check, expected)
        self._session.finish_weight_update(str(version))

        num_checksums, verify_seconds = 0, counts.hash_seconds
        if expected is not None:
            compare_start = time.perf_counter()
            num_checksums = expected.compare(self._session.live_digests())
            self._digests = expected.digests()
            verify_seconds += time.perf_counter() - compare_start
        self._present = frozenset(check.places)
        return SyncReport(
            version=version,
            num_tensors=counts.tensors,
            num_bytes=counts.bytes,
            num_buffers=counts.buffers,
            seconds=time.perf_counter() - start,
            verify_seconds=verify_seconds,
            num_checksums=num_checksums,
            checksums_ok=True if verify else None,
        )

    def _transfer(
        self, stream: Iterator[tuple[str, Tensor]], check: StreamCheck, expected: ExpectedDigests | None
    ) -> _Counts:
        """Gathers the stream into the two buffers in turn and lets the engine load each that is full."""
        counts = _Counts()
        capacity = self._capacity(stream)
        bundle, spare = self._empty(self._buffers[0], capacity), self._buffers[1]
        self._session.start_weight_update()
        try:
            for piece in pieces_of(stream):
                places = [check.take(name) for name in piece.names]
                if not bundle.has_room(piece):
                    self._session.end_update_weights()  # the engine has loaded the spare buffer
                    self._session.begin_update_weights(bundle.update_info())
                    counts.buffers += 1
                    bundle, spare = self._empty(spare, capacity), bundle.buffer
                views = bundle.pack(piece)
                if expected is not None:
                    hash_start = time.perf_counter()
                    for (parameter, part), shape, view in zip(places, piece.shapes, views, strict=True):
                        expected.add(view.reshape(shape), parameter=parameter, part=part)
                    counts.hash_seconds += time.perf_counter() - hash_start
                counts.tensors += len(views)
                counts.bytes += sum(view.nbytes for view in views)
                del piece, views  # before the next one is made
            check.finish()
            self._session.end_update_weights()
            self._session.begin_update_weights(bundle.update_info())
            self._session.end_update_weights()
            counts.buffers += 1
        except BaseException:
            with contextlib.suppress(RuntimeError):  # if the engine is gone, the first error says more
                self._session.abort_weight_update()
            raise
        return counts

    def _capacity(self, stream: Iterator[tuple[str, Tensor]]) -> int:
        sizes = stream.piece_bytes if isinstance(stream, GatheringStream) else ()
        affordable = self._buffers[0].free_bytes // SHARE_OF_FREE_MEMORY
        return buffer_capacity(sizes, limit=self._buffer_bytes, affordable=affordable)

    def _empty(self, buffer: TransferBuffer, capacity: int) -> Bundle:
        buffer.grow(capacity)
        return Bundle(buffer)

    def _expected_digests(self, check: StreamCheck) -> ExpectedDigests:
        return ExpectedDigests(
            self._workers, dtype=self._dtype, kept_parameters=check.kept_parameters, known=self._digests
        )

    def close(self) -> None:
        for buffer in self._buffers:
            buffer.close()
