"""A device that is pretended on a CPU, to count the waits, copies and kernels that a GPU would see.

    with PretendDevice() as device:
        policy = make_policy(device=DEVICE)
        device.take_over(policy.parameters())
        device.restart()
        policy.score(...)
    print(device.tally.waits)

`cpu:0` is the device and `cpu` the host. Torch treats them alike; here every storage carries a mark that says where it
lies: on the device if it was made there (`device=DEVICE`), copied there, or computed from something that lies there.
Counts are exact and do not depend on the machine's load.

The rules are those of PyTorch's CUDA backend:

- The host waits where it has to know a value or a number of values: `.item()` and what calls it (`float`, `bool`,
  `int`, an index that is a scalar), `tolist`, `nonzero`, boolean masks, `equal`, `unique`, `repeat_interleave` without
  `output_size`.
- A copy waits unless it is `non_blocking` and its host memory is pinned. A copy that also changes the dtype goes
  through memory that is not. An index in host memory is copied.
- Without a GPU torch refuses to pin. Here `pin_memory` works and marks the memory; `pin` marks what is pinned by other
  means.

Two things are not seen: collectives, and threads that were started before the context was entered.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from bench.causal_bias import made_outside_of_modes
from bench.pretended_memory import DEVICE, HOST, Recorder, goes_straight, is_pinned, mark, on_device

SOURCES = ("megatron_vppo", "megatron/core")
"""The folders whose lines are named."""

_WAITS = {
    "_local_scalar_dense": ".item()",
    "nonzero": "nonzero",
    "masked_select": "boolean mask",
    "equal": "equal",
    "allclose": "equal",
    "_unique2": "unique",
    "unique_dim": "unique",
    "unique_consecutive": "unique",
    "bincount": "bincount",
}
"""The names of operations that wait, and what they are called here."""
_NO_KERNEL = {
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "set_",
    "resize_",
    "_unsafe_view",
}
"""Operations without a kernel that torch does not list as views."""


class PretendDevice(Recorder):
    """A context that counts into `tally`, in this thread and in those that are started within it."""

    def __init__(self, *, sources: Sequence[str] = SOURCES) -> None:
        super().__init__(sources=sources)
        self._stack = ExitStack()

    def __enter__(self) -> PretendDevice:
        start = threading.Thread.start

        def start_counted(thread: threading.Thread) -> None:
            run = thread.run

            def counted() -> None:
                with self._modes():
                    run()

            thread.run = counted  # type: ignore[method-assign]
            start(thread)

        self._stack.enter_context(patch.object(threading.Thread, "start", start_counted))
        self._stack.enter_context(made_outside_of_modes())
        self._stack.enter_context(self._modes())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    @contextmanager
    def _modes(self) -> Iterator[None]:
        with _Operations(self), _Calls(self):
            yield

    def take_over(self, tensors: Iterable[Tensor]) -> None:
        """Puts tensors on the device that were made before or elsewhere, with everything that shares their memory."""
        for tensor in tensors:
            mark(tensor, on_device=True)

    def pin(self, tensor: Tensor) -> None:
        """Makes the tensor's memory pinned host memory."""
        mark(tensor, pinned=True)


class _Calls(TorchFunctionMode):
    """Sees what torch resolves before it comes to an operation: moves between two names of the same CPU."""

    def __init__(self, device: PretendDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__get__" and getattr(func, "__self__", None) is Tensor.device:
            return DEVICE if on_device(args[0]) else func(*args, **kwargs)
        if name in {"to", "cpu", "cuda"} and isinstance(args[0], Tensor):
            return self._move(name, args[0], args[1:], kwargs)
        if name in {"tolist", "numpy", "__array__"} and on_device(args[0]):
            self._device.copy_to_host(args[0].nbytes, blocking=True)
            with _disable_current_modes():
                return func(*args, **kwargs)
        if name in {"tensor", "as_tensor", "asarray", "new_tensor"}:
            return self._from_values(func, args, kwargs, like=args[0] if name == "new_tensor" else None)
        return func(*args, **kwargs)

    def _move(self, name: str, tensor: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        """Stands for Tensor.to, .cpu and .cuda."""
        flags = [argument for argument in args if isinstance(argument, bool)]
        non_blocking = kwargs.get("non_blocking", flags[0] if flags else False)
        copy = kwargs.get("copy", flags[1] if len(flags) > 1 else False)
        to, dtype = kwargs.get("device"), kwargs.get("dtype") or tensor.dtype
        for argument in args:
            if isinstance(argument, torch.dtype):
                dtype = argument
            elif isinstance(argument, Tensor):
                to, dtype = DEVICE if on_device(argument) else HOST, argument.dtype
            elif isinstance(argument, str | torch.device):
                to = argument
        if name != "to":
            to = DEVICE if name == "cuda" else HOST
        here = on_device(tensor)
        there = here if to is None else torch.device(to) == DEVICE
        if here == there:
            return tensor.to(dtype=dtype, copy=copy)
        straight = non_blocking and goes_straight(tensor, dtype)
        with _disable_current_modes():
            moved = tensor.to(dtype=dtype, copy=True)
        if there:
            self._device.copy_to_device(moved.nbytes, blocking=not (straight and is_pinned(tensor)))
            mark(moved, on_device=True)
        else:
            # Torch itself pins the memory that it makes for such a copy.
            self._device.copy_to_host(tensor.nbytes, blocking=not straight)
            mark(moved, pinned=straight)
        return moved

    def _from_values(
        self, func: Callable[..., Tensor], args: Sequence[Any], kwargs: Mapping[str, Any], *, like: Tensor | None
    ) -> Tensor:
        """Stands for torch.tensor and its kin, which fill host memory and copy it."""
        device = kwargs.get("device")
        there = torch.device(device) == DEVICE if device is not None else like is not None and on_device(like)
        source = args[0] if like is None else args[1]
        is_there = isinstance(source, Tensor) and on_device(source)
        made = func(*args, **kwargs)
        if there and not is_there:
            self._device.copy_to_device(made.nbytes, blocking=True)
        if there or not isinstance(source, Tensor):
            mark(made, on_device=there)
        return made


class _Operations(TorchDispatchMode):
    """Sees every operation, those of backward passes as well."""

    def __init__(self, device: PretendDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name == "is_pinned":
            return is_pinned(inputs[0])
        if name == "_pin_memory":
            pinned = inputs[0].clone()
            mark(pinned, pinned=True)
            return pinned
        pins = bool(kwargs.pop("pin_memory", False))
        made_at = kwargs.get("device")
        there = torch.device(made_at) == DEVICE if made_at is not None else any(map(on_device, inputs))
        if name == "copy_" and on_device(inputs[0]) != on_device(inputs[1]):
            self._copy(inputs[0], inputs[1], non_blocking=len(args) > 2 and bool(args[2]))
        else:
            self._count(func, name, args, kwargs, there=there)
        results = func(*args, **kwargs)
        known = [tensor.untyped_storage() for tensor in inputs]
        for made in tree_leaves(results):
            if isinstance(made, Tensor) and not any(made.untyped_storage() is storage for storage in known):
                mark(made, on_device=there, pinned=pins)
        return results

    def _copy(self, target: Tensor, source: Tensor, *, non_blocking: bool) -> None:
        """Counts a copy between host and device."""
        straight = non_blocking and goes_straight(source, target.dtype) and target.is_contiguous()
        if on_device(target):
            num_bytes = target.element_size() * source.numel()
            self._device.copy_to_device(num_bytes, blocking=not (straight and is_pinned(source)))
        else:
            self._device.copy_to_host(source.nbytes, blocking=not (straight and is_pinned(target)))

    def _count(self, func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], *, there: bool) -> None:
        if not there:
            self._device.operation(name, on_device=False)
            return
        if not func.is_view and name not in _NO_KERNEL and name != "detach":
            self._device.operation(name, on_device=True)
        if name in _WAITS:
            self._device.wait(_WAITS[name])
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            self._device.wait("repeat_interleave")
        elif name in {"index", "index_put", "index_put_", "_index_put_impl_"}:
            self._index(args[0], args[1], args[2] if len(args) > 2 else None)

    def _index(self, tensor: Tensor, indices: Sequence[Tensor | None], value: Tensor | None) -> None:
        masks = [index for index in indices if index is not None and index.dtype in {torch.bool, torch.uint8}]
        fills = value is not None and value.numel() == 1 and not on_device(value)
        if masks and fills:
            return  # torch turns it into masked_fill
        if any(map(on_device, masks)):
            self._device.wait("boolean mask")
        for index in indices:
            if index is None or on_device(index) or not on_device(tensor):
                continue
            is_mask = index.dtype in {torch.bool, torch.uint8}
            places = int(index.sum()) * index.dim() if is_mask else index.numel()
            self._device.copy_to_device(8 * places, blocking=True)
