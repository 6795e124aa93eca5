"""The moves of a trainer rank's weights, gradients and optimizer state to host memory and back.

The memory behind the tensors (their storages) leaves, not the tensors. So parameters stay views of Megatron's buffers,
`main_grad` a view of another buffer, and optimizer shards views of the tensors they were cut from.

Gradients use Megatron's own function, which frees their buffers and brings them back as zeros. Weights and optimizer
state use ours, because of two faults in Megatron 0.16 to 0.19. `offload_to_cpu` of a buffer leaves out frozen
parameters and those of the ordinary optimizer. `offload_to_cpu` of an optimizer gives every fp32 weight new memory: the
optimizer's shard is then a second copy, and no longer a view of the model's weight.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor

from megatron_vppo.config.choices import MEMORY_PARTS, MemoryPart
from megatron_vppo.models.layers.te_support import drop_fp8_copies
from megatron_vppo.parallel.training import Trainable


class TrainerMemory:
    """The device memory that a rank's training holds permanently, which is all but activations."""

    def __init__(self, trainable: Trainable) -> None:
        self._trainable = trainable
        self._host: dict[MemoryPart, _HostCopy] = {"params": _HostCopy(), "optimizer": _HostCopy()}
        self._away: set[MemoryPart] = set()

    def offload(self, parts: Collection[MemoryPart]) -> None:
        """Copies these parts to host memory and frees their device memory. Gradients are not copied: they are lost.

        Raises:
            RuntimeError: one of them is away already.
        """
        self._check(parts, away=False)
        if "grads" in parts:
            for ddp in self._trainable.ddps:
                ddp.offload_grad_buffers(synchronize=torch.cuda.is_available(), empty_cache=False)
        # The optimizer goes first. Tensors whose memory is also the weights' are left to the weights, and they are
        # recognised by its address, which the weights have only as long as they are on the device.
        if "optimizer" in parts:
            self._host["optimizer"].offload(optimizer_tensors(self._trainable))
        if "params" in parts:
            self._host["params"].offload(weight_tensors(self._trainable))
            for stage in self._trainable.stages:
                drop_fp8_copies(stage)
        self._away |= set(parts)
        self.empty_cache()

    def reload(self, parts: Collection[MemoryPart]) -> None:
        """Brings these parts back into the same tensors; gradients as zeros.

        Raises:
            RuntimeError: one of them is on the device already.
        """
        self._check(parts, away=True)
        if "params" in parts:
            self._host["params"].reload()
        if "optimizer" in parts:
            self._host["optimizer"].reload()
        if "grads" in parts:
            for ddp in self._trainable.ddps:
                ddp.restore_grad_buffers(synchronize=False)
        self._away -= set(parts)

    def empty_cache(self) -> None:
        """Frees device memory that torch holds without using it, such as that of the last pass's activations."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _check(self, parts: Collection[MemoryPart], *, away: bool) -> None:
        if wrong := [part for part in MEMORY_PARTS if part in parts and (part in self._away) != away]:
            raise RuntimeError(f"{', '.join(wrong)} of the trainer: {'on the device' if away else 'away'} already")


class _HostCopy:
    """The contents of some storages while these hold no memory. The host memory is kept for the next time."""

    def __init__(self) -> None:
        self._pairs: list[tuple[torch.UntypedStorage, Tensor]] = []

    def offload(self, tensors: Iterable[Tensor]) -> None:
        """Copies each storage once, however many of the tensors are views of it, and frees its memory."""
        kept = iter([host for _, host in self._pairs])
        self._pairs = []
        for storage in storages_of(tensors):
            host = next(kept, None)
            if host is None or host.numel() != storage.nbytes():
                on_device = storage.device.type == "cuda"
                host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=on_device)
            host.copy_(_bytes_of(storage), non_blocking=True)
            self._pairs.append((storage, host))
        _wait_for_copies()
        for storage, _ in self._pairs:
            storage.resize_(0)

    def reload(self) -> None:
        for storage, host in self._pairs:
            storage.resize_(host.numel())
            _bytes_of(storage).copy_(host, non_blocking=True)
        _wait_for_copies()


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _wait_for_copies() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def storages_of(tensors: Iterable[Tensor]) -> Iterator[torch.UntypedStorage]:
    """Returns the storages of tensors, each once, in the order of their first tensor; without empty ones."""
    seen: set[int] = set()
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            yield storage


def weight_tensors(trainable: Trainable) -> Iterator[Tensor]:
    """Returns the model's parameters, frozen ones included, and its buffers."""
    for stage in trainable.stages:
        yield from stage.parameters()
        yield from stage.buffers()


def optimizer_tensors(trainable: Trainable) -> Iterator[Tensor]:
    """Returns the optimizer's moments and fp32 weights, except those in the model's own weights or on the host."""
    device = next(weight_tensors(trainable)).device
    weights = {storage.data_ptr() for storage in storages_of(weight_tensors(trainable))}
    for part in getattr(trainable.optimizer, "chained_optimizers", [trainable.optimizer]):
        if part.optimizer is None:  # this rank trains nothing
            continue
        own = (parameter for group in part.optimizer.param_groups for parameter in group["params"])
        state = (value for values in part.optimizer.state.values() for value in values.values())
        for tensor in (*own, *state):
            if not isinstance(tensor, Tensor) or tensor.device != device:
                continue
            if tensor.untyped_storage().data_ptr() not in weights:
                yield tensor
