"""`RolloutEngine`: one vLLM engine, as the trainer rank that leads it sees it."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from megatron_vppo.rollout.child import ChildProcess
from megatron_vppo.rollout.records import Completion, EngineSettings, SampleRequest, SamplingSettings, SyncReport
from megatron_vppo.rollout.transfer.device_buffer import DeviceBuffer
from megatron_vppo.rollout.transfer.shared_buffer import SharedBuffer
from megatron_vppo.rollout.transfer.weight_sender import DEFAULT_GROUP_BYTES, TransferBuffer, WeightSender

EngineMemory = Literal["weights", "kv_cache"]
"""What an engine holds of its GPUs' memory and can give back."""


class RolloutEngine:
    """Client of one vLLM engine in a process of its own.

    The constructor only launches, so the trainer can build its model meanwhile; `wait_ready` before the first use.
    Every failure is a RuntimeError that holds the end of the engine's log. Use it in a `with`, or call `close`; if
    the trainer dies without either, the engine ends by itself.
    """

    def __init__(self, settings: EngineSettings, *, log_path: Path, group_bytes: int = DEFAULT_GROUP_BYTES) -> None:
        """`log_path`: where the engine's output is appended; `group_bytes`: of each of the two buffers for weights."""
        self.settings = settings
        self._group_bytes = group_bytes
        self._child = ChildProcess(settings, log_path=log_path)
        self._session = _Session(self._child)
        self._sender: WeightSender | None = None
        self._has_weights = settings.load_format != "empty"
        self._asleep: set[EngineMemory] = set()
        self._finalizer = weakref.finalize(self, self._child.close)

    @property
    def pid(self) -> int:
        return self._child.pid

    def wait_ready(self, *, timeout_seconds: float) -> None:
        """Return once the engine has loaded. RuntimeError if it does not within the time; it is then ended."""
        if self._sender is not None:
            return
        try:
            _, workers = self._child.receive(timeout_seconds=timeout_seconds)
        except RuntimeError:
            self.close()
            raise
        self._sender = WeightSender(
            self._session,
            buffers=(self._buffer(len(workers)), self._buffer(len(workers))),
            workers=workers,
            dtype=getattr(torch, self.settings.dtype),
        )

    def _buffer(self, num_workers: int) -> TransferBuffer:
        if self.settings.weight_transfer == "shm":
            return SharedBuffer(self._group_bytes)
        device = torch.device("cuda", torch.cuda.current_device())
        return DeviceBuffer(self._group_bytes, device=device, num_readers=num_workers)

    def generate(self, requests: Sequence[SampleRequest], settings: SamplingSettings) -> list[list[Completion]]:
        """Per request one completion for each of its seeds, in order."""
        self._require_ready()
        self._require_awake("generate", "weights", "kv_cache")
        if not self._has_weights:
            raise RuntimeError("the rollout engine has no complete set of weights; call send_weights first")
        return self._session.call("generate", requests=list(requests), settings=settings)

    def send_weights(
        self, stream: Iterator[tuple[str, Tensor]], *, version: int, verify: bool, kept: Collection[str] = ()
    ) -> SyncReport:
        """Replace all weights by those of the stream of (Hugging Face name, tensor), but for those named in `kept`.

        Tensors may be on any device and of any floating dtype. Afterwards completions carry `version`, and nothing
        that the engine cached from the old weights is left. With `verify` the digest of every weight that the engine
        now computes with is compared with the one expected from the stream. After an error `generate` refuses until a
        whole load succeeds.

        Raises: see WeightSender.send.
        """
        sender = self._require_ready()
        self._require_awake("send_weights", "weights")
        self._has_weights = False
        report = sender.send(stream, version=version, verify=verify, kept=kept)
        self._has_weights = True
        return report

    def preserve(self, names: Collection[str]) -> None:
        """These tensors (Hugging Face names) stay when the engine forgets its weights in its sleep."""
        parameters = self._require_ready().preserve(names)
        self._session.call("preserve_over_sleep", parameters=list(parameters))

    def sleep(self, *, keep_weights: bool = False) -> None:
        """Give the GPUs' memory back, all but what a CUDA process needs to be there.

        Args:
            keep_weights: they wait in host memory; otherwise they are forgotten, but for the preserved ones, and a
                whole load has to come after `wake`. Whatever else the engine holds is forgotten in both cases.
        """
        sender = self._require_ready()
        if not self.settings.can_sleep:
            raise RuntimeError("the rollout engine was started without can_sleep, so it keeps its memory")
        self._require_awake("sleep", "weights")
        self._session.call("sleep", keep_weights=keep_weights)
        self._asleep = {"weights", "kv_cache"}
        if not keep_weights:
            self._has_weights = False
            sender.forget_weights()

    def wake(self, tag: EngineMemory) -> None:
        """Take this part of the memory again. Weights that were forgotten come back as memory without meaning."""
        self._require_ready()
        if tag not in self._asleep:
            raise RuntimeError(f"wake: the rollout engine already holds its {tag}")
        self._session.call("wake", tag=tag)
        self._asleep.remove(tag)

    def live_digests(self) -> list[dict[str, str]]:
        """Per worker, the digest of every weight that it now computes with, read back from its kernels. Quantised
        weights are left out.
        """
        self._require_ready()
        self._require_awake("live_digests", "weights")
        return self._session.live_digests()

    def close(self) -> None:
        """End the engine and all of its processes. Idempotent."""
        idle = self._sender is not None and not self._session.busy
        if self._sender is not None:
            self._sender.close()
        if self._finalizer.detach() is not None:
            self._child.close(goodbye=("shutdown", {}) if idle else None)

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
    """Requests to the engine: one at a time, in order. The WeightSession of weight_sender."""

    def __init__(self, child: ChildProcess) -> None:
        self._child = child
        self.busy = False
        """A request was sent whose answer has not come."""

    def call(self, method: str, **arguments: Any) -> Any:
        self._begin(method, **arguments)
        return self._end()

    def _begin(self, method: str, **arguments: Any) -> None:
        if self.busy:
            raise RuntimeError(f"{method}: the rollout engine still works on another request")
        self._child.send((method, arguments))
        self.busy = True

    def _end(self) -> Any:
        succeeded, result = self._child.receive()
        self.busy = False
        if not succeeded:
            raise self._child.failure(f"refused: {result}")
        return result

    def start_weight_update(self) -> None:
        self.call("start_weight_update")

    def begin_update_weights(self, update_info: dict[str, Any]) -> None:
        self._begin("update_weights", update_info=update_info)

    def end_update_weights(self) -> None:
        if self.busy:
            self._end()

    def finish_weight_update(self, weight_version: str) -> None:
        self.call("finish_weight_update", weight_version=weight_version)

    def abort_weight_update(self) -> None:
        self.end_update_weights()
        self.call("abort_weight_update")

    def live_digests(self) -> list[dict[str, str]]:
        return self.call("live_digests")
