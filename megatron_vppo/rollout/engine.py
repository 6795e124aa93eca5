"""`RolloutEngine`: one vLLM engine, as the trainer rank that leads it sees it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from megatron_vppo.rollout.child import ChildProcess, EngineLost
from megatron_vppo.rollout.records import (
    Completion,
    EngineSettings,
    Outcome,
    SampleRequest,
    SamplingSettings,
    SyncReport,
)
from megatron_vppo.rollout.transfer.bundle import TransferBuffer
from megatron_vppo.rollout.transfer.device_buffer import DeviceBuffer
from megatron_vppo.rollout.transfer.shared_buffer import SharedBuffer
from megatron_vppo.rollout.transfer.weight_sender import BUFFER_BYTES, WeightSender

EngineMemory = Literal["weights", "kv_cache"]
"""The parts of an engine's GPU memory that it can give back."""


class RolloutEngine:
    """The client of one vLLM engine in a process of its own.

    The constructor only starts the process, so that the trainer can build its model meanwhile. Call `wait_ready` before
    the first use. Every failure is a RuntimeError with the end of the engine's log, and an `EngineLost` if another
    process could do better (`restart`). Use the client in a `with`, or call `close`; if the trainer ends without
    either, the engine ends by itself.
    """

    def __init__(
        self,
        settings: EngineSettings,
        *,
        log_path: Path,
        buffer_bytes: int = BUFFER_BYTES,
        silence_seconds: float | None = None,
    ) -> None:
        """
        Args:
            log_path: the file that the engine's output is appended to.
            buffer_bytes: the size of each of the two buffers for weights, about.
            silence_seconds: the time without a sign of progress after which the engine counts as lost; None: never.
        """
        self.settings = settings
        self.log_path = log_path
        self._buffer_bytes = buffer_bytes
        self._silence_seconds = silence_seconds
        self._preserved: frozenset[str] = frozenset()
        self._start()

    def _start(self) -> None:
        self._child = ChildProcess(self.settings, log_path=self.log_path, silence_seconds=self._silence_seconds)
        self._session = _Session(self._child)
        self._sender: WeightSender | None = None
        self._has_weights = self.settings.load_format != "empty"
        self._asleep: set[EngineMemory] = set()
        self._finalizer = weakref.finalize(self, self._child.close)

    @property
    def pid(self) -> int:
        return self._child.pid

    def wait_ready(self, *, timeout_seconds: float, stop_wanted: Callable[[], bool] = lambda: False) -> None:
        """Returns once the engine has loaded.

        Raises:
            RuntimeError: it has not within the time; it is ended.
            StopRequested: `stop_wanted` became true meanwhile.
        """
        if self._sender is not None:
            return
        try:
            _, workers = self._child.receive(timeout_seconds=timeout_seconds, stop_wanted=stop_wanted)
        except RuntimeError:
            self.close()
            raise
        self._sender = WeightSender(
            self._session,
            buffers=(self._buffer(len(workers)), self._buffer(len(workers))),
            buffer_bytes=self._buffer_bytes,
            workers=workers,
            dtype=getattr(torch, self.settings.dtype),
        )

    def restart(self, *, timeout_seconds: float, stop_wanted: Callable[[], bool] = lambda: False) -> None:
        """Ends what is left of the process, and returns once another one has loaded in its place.

        It sleeps, if it can. It has no weights but those of its folder. Raises as `wait_ready` does.
        """
        self.close(goodbye=False)
        self._start()
        self.wait_ready(timeout_seconds=timeout_seconds, stop_wanted=stop_wanted)
        if self.settings.can_sleep:
            self.sleep()
        if self._preserved:
            self.preserve(self._preserved)

    @property
    def has_weights(self) -> bool:
        """True if the engine holds a complete set of weights, awake or asleep."""
        return self._has_weights

    def _buffer(self, num_workers: int) -> TransferBuffer:
        if self.settings.weight_transfer == "shm":
            return SharedBuffer()
        device = torch.device("cuda", torch.cuda.current_device())
        return DeviceBuffer(device=device, num_readers=num_workers)

    def generate(
        self,
        requests: Sequence[SampleRequest],
        settings: SamplingSettings,
        *,
        stop_wanted: Callable[[], bool] = lambda: False,
    ) -> list[list[Completion]]:
        """Samples one completion for each seed of each request, in order.

        Raises StopRequested if `stop_wanted` becomes true meanwhile. The engine is then of no further use: close it.
        """
        self._require_ready()
        self._require_awake("generate", "weights", "kv_cache")
        if not self._has_weights:
            raise RuntimeError("the rollout engine has no complete set of weights; call send_weights first")
        self._session.begin("generate", requests=list(requests), settings=settings)
        return self._session.end(stop_wanted=stop_wanted)

    def send_weights(
        self, stream: Iterator[tuple[str, Tensor]], *, version: int, verify: bool, kept: Collection[str] = ()
    ) -> SyncReport:
        """Replaces the engine's weights by those of a stream of (Hugging Face name, tensor).

        Tensors may be on any device and of any floating dtype. Afterwards completions carry `version`, and nothing
        that the engine cached from the old weights is left. After an error `generate` refuses until a whole transfer
        succeeds.

        Args:
            verify: compare the digest of every weight that the engine now computes with to the one expected from the
                stream.
            kept: weights that do not come; the engine keeps those that it has.

        Raises as `WeightSender.send` does.
        """
        sender = self._require_ready()
        self._require_awake("send_weights", "weights")
        self._has_weights = False
        report = sender.send(stream, version=version, verify=verify, kept=kept)
        self._has_weights = True
        return report

    def preserve(self, names: Collection[str]) -> None:
        """Makes the engine keep these tensors (Hugging Face names) when it forgets its weights in its sleep."""
        self._preserved = frozenset(names)
        parameters = self._require_ready().preserve(names)
        self._session.call("preserve_over_sleep", parameters=list(parameters))

    def sleep(self, *, keep_weights: bool = False) -> None:
        """Gives back the GPUs' memory, except for what every CUDA process needs.

        An engine that is lost meanwhile, or while it wakes, is reported by the next request that has a result.

        Args:
            keep_weights: True: the weights wait in host memory. False: they are forgotten, except for the preserved
                ones, and all others have to be sent after `wake`. The KV cache is forgotten in both cases.
        """
        sender = self._require_ready()
        if not self.settings.can_sleep:
            raise RuntimeError("the rollout engine was started without can_sleep, so it keeps its memory")
        self._require_awake("sleep", "weights")
        with contextlib.suppress(EngineLost):
            self._session.call("sleep", keep_weights=keep_weights)
        self._asleep = {"weights", "kv_cache"}
        if not keep_weights:
            self._has_weights = False
            sender.forget_weights()

    def wake(self, tag: EngineMemory) -> None:
        """Takes a part of the memory again. Weights that were forgotten come back as memory without meaning."""
        self._require_ready()
        if tag not in self._asleep:
            raise RuntimeError(f"wake: the rollout engine already holds its {tag}")
        with contextlib.suppress(EngineLost):
            self._session.call("wake", tag=tag)
        self._asleep.remove(tag)

    def live_digests(self) -> list[dict[str, str]]:
        """Returns, for each worker, the digest of every weight that it now computes with, read back from its kernels.

        Quantised weights are left out.
        """
        self._require_ready()
        self._require_awake("live_digests", "weights")
        return self._session.live_digests()

    def close(self, *, goodbye: bool = True) -> None:
        """Ends the engine and all of its processes. Idempotent.

        Args:
            goodbye: True: an engine that is idle has time to end by itself.
        """
        idle = self._sender is not None and not self._session.busy
        if self._sender is not None:
            self._sender.close()
        if self._finalizer.detach() is not None:
            self._child.close(goodbye=("shutdown", {}) if idle and goodbye else None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _require_awake(self, what: str, *tags: EngineMemory) -> None:
        if missing := self._asleep.intersection(tags):
            raise RuntimeError(f"{what}: the rollout engine sleeps; wake its {' and '.join(sorted(missing))} first")

    def _require_ready(self) -> WeightSender:
        if self._sender is None:
            raise RuntimeError("the rollout engine is still starting; call wait_ready first")
        return self._sender


class _Session:
    """Sends requests to the engine, one at a time; the `WeightSession` of weight_sender.py."""

    def __init__(self, child: ChildProcess) -> None:
        self._child = child
        self.busy = False
        """True from a request until its answer."""

    def call(self, method: str, **arguments: Any) -> Any:
        self.begin(method, **arguments)
        return self.end()

    def begin(self, method: str, **arguments: Any) -> None:
        if self.busy:
            raise RuntimeError(f"{method}: the rollout engine still works on another request")
        self._child.send((method, arguments))
        self.busy = True

    def end(self, *, stop_wanted: Callable[[], bool] = lambda: False) -> Any:
        outcome: Outcome
        try:
            outcome, result = self._child.receive(stop_wanted=stop_wanted)
        except EngineLost:
            self.busy = False  # the next request says so again
            raise
        self.busy = False
        if outcome == "broken":
            raise self._child.lost(f"cannot go on: {result}")
        if outcome == "refused":
            raise self._child.refusal(result)
        return result

    def start_weight_update(self) -> None:
        self.call("start_weight_update")

    def begin_update_weights(self, update_info: dict[str, Any]) -> None:
        self.begin("update_weights", update_info=update_info)

    def end_update_weights(self) -> None:
        if self.busy:
            self.end()

    def finish_weight_update(self, weight_version: str) -> None:
        self.call("finish_weight_update", weight_version=weight_version)

    def abort_weight_update(self) -> None:
        self.end_update_weights()
        self.call("abort_weight_update")

    def live_digests(self) -> list[dict[str, str]]:
        return self.call("live_digests")
