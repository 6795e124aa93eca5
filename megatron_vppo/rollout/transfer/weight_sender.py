"""The trainer's half of the weight transfer: a stream of tensors in, vLLM's transfer session out.

Two buffers take turns, in shared host memory or on the GPU: while the engine loads one, the next tensors are packed
into the other. Beside them the trainer holds no copy of the weights.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_vppo.rollout.records import LiveWeight, SyncReport
from megatron_vppo.rollout.transfer.shared_buffer import aligned
from megatron_vppo.rollout.transfer.vllm_layout import (
    DigestKey,
    ExpectedDigests,
    StreamCheck,
    canonical_name,
    parameters_of,
)

DEFAULT_GROUP_BYTES = 256 << 20
"""Of one buffer. A single larger tensor makes its buffer grow to hold it."""


class WeightSession(Protocol):
    """One engine's control plane: vLLM's transfer session, its update step split in two so that packing overlaps."""

    def start_weight_update(self) -> None: ...

    def begin_update_weights(self, update_info: dict[str, Any]) -> None: ...

    def end_update_weights(self) -> None:
        """Wait for what `begin_update_weights` began; returns at once if nothing was."""

    def finish_weight_update(self, weight_version: str) -> None: ...

    def abort_weight_update(self) -> None: ...

    def live_digests(self) -> list[dict[str, str]]: ...


class TransferBuffer(Protocol):
    """Memory that this process writes and the engine's workers read."""

    capacity: int

    def grow(self, capacity: int) -> None:
        """Hold at least so many bytes; only while nothing is packed."""

    def write(self, tensor: Tensor, *, offset: int) -> None: ...

    def publish(self) -> dict[str, Any]:
        """Fields of the update info by which a worker finds the buffer. What was written is visible when it returns."""

    def free(self) -> None:
        """The transfer is over: nobody reads any more, and the next one begins with `grow`."""

    def close(self) -> None: ...


class _Group:
    """Tensors packed into one buffer, described as `weight_receiver.PackedUpdateInfo` wants it."""

    def __init__(self, buffer: TransferBuffer) -> None:
        self.buffer = buffer
        self._names: list[str] = []
        self._dtypes: list[str] = []
        self._shapes: list[list[int]] = []
        self._offsets: list[int] = []
        self.num_bytes = 0

    def has_room(self, tensor: Tensor) -> bool:
        return not self._names or self.num_bytes + aligned(tensor.nbytes) <= self.buffer.capacity

    def pack(self, name: str, tensor: Tensor) -> None:
        if not self._names:
            self.buffer.grow(aligned(tensor.nbytes))
        self.buffer.write(tensor, offset=self.num_bytes)
        self._names.append(name)
        self._dtypes.append(str(tensor.dtype).removeprefix("torch."))
        self._shapes.append(list(tensor.shape))
        self._offsets.append(self.num_bytes)
        self.num_bytes += aligned(tensor.nbytes)

    def update_info(self) -> dict[str, Any]:
        return {
            **self.buffer.publish(),
            "names": self._names,
            "dtypes": self._dtypes,
            "shapes": self._shapes,
            "offsets": self._offsets,
        }


class WeightSender:
    """Sends a model to one engine, again and again; whole, or without what did not change."""

    def __init__(
        self,
        session: WeightSession,
        *,
        buffers: tuple[TransferBuffer, TransferBuffer],
        workers: Sequence[Sequence[LiveWeight]],
        dtype: torch.dtype,
    ) -> None:
        """`workers`: what each of the engine's workers consists of; `dtype`: what they compute in."""
        self._session = session
        self._workers = workers
        self._dtype = dtype
        self._digests: Mapping[DigestKey, str] = {}
        self._present: frozenset[str] = frozenset()
        """Tensors that the engine now holds, as `canonical_name` spells them."""
        self._preserved: frozenset[str] = frozenset()
        self._buffers = buffers

    def preserve(self, names: Collection[str]) -> tuple[str, ...]:
        """From now on these tensors stay when the engine forgets its weights. Returns vLLM's names of what they make.

        Raises ValueError where vLLM holds one of them together with another tensor.
        """
        parameters = parameters_of(names, self._workers)
        self._preserved = frozenset(canonical_name(name) for name in names)
        return parameters

    def forget_weights(self) -> None:
        """The engine has forgotten its weights but for the preserved ones."""
        self._present &= self._preserved

    def send(
        self, stream: Iterator[tuple[str, Tensor]], *, version: int, verify: bool, kept: Collection[str] = ()
    ) -> SyncReport:
        """Send one complete model, but for the tensors named in `kept`, which an earlier stream brought.

        Verification also covers those that were verified then.

        A layer's tensors should be adjacent: vLLM keeps the tensors of incomplete layers in memory. Producing the
        stream is usually a collective of all trainer ranks, so on an error of ours it is run to its end before the
        error is raised.

        Raises:
            ValueError: a name of the stream is unknown, comes twice or is missing; or tensors are to be kept, but the
                engine does not have them: the last stream did not get through, or it forgot them while it slept.
            RuntimeError: the engine failed, or verification found a weight that differs.
        """
        try:
            return self._send(stream, version=version, verify=verify, kept=kept)
        except (ValueError, RuntimeError, OSError):
            deque(stream, maxlen=0)
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
                f"the rollout engine has no complete set of weights, of which some could be kept: {min(missing)} is "
                "not there"
            )
        self._present = frozenset()
        expected = (
            ExpectedDigests(
                self._workers, dtype=self._dtype, kept_parameters=check.kept_parameters, known=self._digests
            )
            if verify
            else None
        )
        verify_seconds = 0.0
        num_tensors = num_bytes = num_groups = 0
        spare, group = self._buffers[1], _Group(self._buffers[0])

        self._session.start_weight_update()
        try:
            for name, tensor in stream:
                parameter, part = check.take(name)
                if expected is not None:
                    hash_start = time.perf_counter()
                    expected.add(tensor, parameter=parameter, part=part)
                    verify_seconds += time.perf_counter() - hash_start
                if not group.has_room(tensor):
                    self._session.end_update_weights()  # of the group before: its buffer is free now
                    self._session.begin_update_weights(group.update_info())
                    num_groups += 1
                    spare, group = group.buffer, _Group(spare)
                group.pack(name, tensor)
                num_tensors += 1
                num_bytes += tensor.nbytes
                del tensor  # before the next one is made
            check.finish()
            self._session.end_update_weights()
            self._session.begin_update_weights(group.update_info())
            self._session.end_update_weights()
            num_groups += 1
        except BaseException:
            with contextlib.suppress(RuntimeError):  # where the engine is gone, the first error says more
                self._session.abort_weight_update()
            raise
        self._session.finish_weight_update(str(version))

        num_checksums = 0
        if expected is not None:
            compare_start = time.perf_counter()
            num_checksums = expected.compare(self._session.live_digests())
            self._digests = expected.digests()
            verify_seconds += time.perf_counter() - compare_start
        self._present = frozenset(check.places)
        return SyncReport(
            version=version,
            num_tensors=num_tensors,
            num_bytes=num_bytes,
            num_groups=num_groups,
            seconds=time.perf_counter() - start,
            verify_seconds=verify_seconds,
            num_checksums=num_checksums,
            checksums_ok=True if verify else None,
        )

    def close(self) -> None:
        for buffer in self._buffers:
            buffer.close()
