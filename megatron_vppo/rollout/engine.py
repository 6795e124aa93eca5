"""`RolloutEngine`: one vLLM engine, as the trainer rank that leads it sees it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor

from megatron_vppo.rollout.child import POLL_SECONDS, ChildProcess, EngineLost
from megatron_vppo.rollout.records import (
    SAMPLED,
    Completion,
    EngineSettings,
    Sampled,
    SampleRequest,
    SamplingSettings,
    SyncReport,
)
from megatron_vppo.rollout.session import Session
from megatron_vppo.rollout.transfer.bundle import TransferBuffer
from megatron_vppo.rollout.transfer.device_buffer import DeviceBuffer
from megatron_vppo.rollout.transfer.shared_buffer import SharedBuffer
from megatron_vppo.rollout.transfer.weight_sender import BUFFER_BYTES, WeightSender
from megatron_vppo.system.stop_signals import StopRequested

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
        self._session = Session(self._child)
        self._sender: WeightSender | None = None
        self._has_weights = self.settings.load_format != "empty"
        self._asleep: set[EngineMemory] = set()
        self._unfinished = 0
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
        self.begin_sampling(settings)
        self.ask(dict(enumerate(requests)))
        sampled: dict[tuple[int, int], Completion] = {}
        while self.unfinished:
            sampled |= {(one.number, one.sample): one.completion for one in self.take(POLL_SECONDS)}
            if stop_wanted():
                raise StopRequested
        self.end_sampling()
        return [[sampled[i, sample] for sample in range(len(request.seeds))] for i, request in enumerate(requests)]

    def begin_sampling(self, settings: SamplingSettings) -> None:
        """Begins to sample what `ask` brings. No other request is possible until `end_sampling`."""
        self._require_ready()
        self._require_awake("sample", "weights", "kv_cache")
        if not self._has_weights:
            raise RuntimeError("the rollout engine has no complete set of weights; call send_weights first")
        self._session.begin("sample", settings=settings)
        self._unfinished = 0

    def ask(self, requests: Mapping[int, SampleRequest]) -> None:
        """Asks for one completion for each seed of the requests, which are told apart by their numbers."""
        if requests:
            self._child.send(dict(requests))
            self._unfinished += sum(len(request.seeds) for request in requests.values())

    @property
    def unfinished(self) -> int:
        """The number of completions that were asked for and have not been taken."""
        return self._unfinished

    def take(self, seconds: float = 0.0) -> list[Sampled]:
        """Returns the completions that have ended since the last call, if any have within `seconds`."""
        answer = self._child.look(seconds, patient=self._unfinished == 0)
        if answer is None:
            return []
        kind, ended = answer
        if kind != SAMPLED:
            self._session.answered(kind, ended)
        self._unfinished -= len(ended)
        return ended

    def fileno(self) -> int:
        """Returns the descriptor that is readable when `take` will return at once."""
        return self._child.fileno()

    def end_sampling(self) -> list[Sampled]:
        """Returns what has ended since the last `take`, and with `keeps_unfinished` all that has not.

        Afterwards the engine takes other requests.
        """
        self._unfinished = 0
        return self._session.end_sampling()

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
