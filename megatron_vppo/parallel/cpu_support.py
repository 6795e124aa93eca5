"""Patches with which Megatron Core (0.16 to 0.19) runs on a machine without CUDA.

Megatron names the CUDA device in many places; none of its mathematics needs it. All patches are here, and none is
applied if CUDA is available. Each says which code asks for it.
"""

from __future__ import annotations

import functools
import importlib
import types
from collections.abc import Callable
from typing import Any

import torch

_MODULES_THAT_NAME_CUDA = (
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.optimizer.optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.utils",
)
_FACTORIES = frozenset({"tensor", "zeros", "ones", "empty", "full"})
_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float16: "torch.cuda.HalfTensor",
}
_CPU = torch.device("cpu")
_enabled = False


def enable_cpu() -> bool:
    """Patches this process for Megatron on CPU, once, unless CUDA is available. True if the patches are in force."""
    global _enabled
    if torch.cuda.is_available():
        return False
    if _enabled:
        return True
    _enabled = True
    # Most modules ask for these: `torch.empty(..., device=torch.cuda.current_device())`, barriers with
    # `torch.cuda.synchronize()`, memory reports.
    _replace(torch.cuda, "current_device", lambda: _CPU)
    _replace(torch.cuda, "synchronize", _nothing())
    _replace(torch.cuda, "empty_cache", _nothing())
    # 0.19 asks for the stream before each gradient reduction, to wait for CUDA graphs. There are none.
    _replace(torch.cuda, "current_stream", _nothing())
    _replace(torch.cuda, "set_device", _nothing())
    _replace(torch.cuda.nvtx, "range_push", _nothing())
    _replace(torch.cuda.nvtx, "range_pop", _nothing())
    # Gradient norm, loss scale, token counters and found-inf flags are made with the literal `device="cuda"`. Only the
    # name `torch` within these modules is replaced. If torch's own factories were, `torch.device("meta")` would no
    # longer catch them, and transformers would load models with wrong buffers.
    for module in _MODULES_THAT_NAME_CUDA:
        _replace(importlib.import_module(module), "torch", _TorchOnCpu("torch"))
    # The optimizers move master weights and checkpoints with `.cuda()`, and sort parameters by the string `type()`.
    _replace(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    _replace(torch.Tensor, "type", _type_as_if_cuda(torch.Tensor.type))
    _disable_cuda_rng()
    return True


def _disable_cuda_rng() -> None:
    """Gives Megatron a CUDA generator without state.

    Activation recompute saves and restores the CUDA generator, and RNG forks ask for seeds of their own. There is no
    dropout in our models, so neither has anything to preserve: the state is empty, and forks do nothing.
    """
    from megatron.core.tensor_parallel import random as megatron_random

    empty = torch.empty(0, dtype=torch.uint8)
    _replace(megatron_random, "_get_cuda_rng_state", lambda *args, **kwargs: empty)
    _replace(megatron_random, "_set_cuda_rng_state", _nothing())
    megatron_random.initialize_rng_tracker(inference_rng_tracker=True)


def _nothing() -> Callable[..., None]:
    # Each place gets a function of its own: torch.compile keeps a table of torch's functions and refuses to find the
    # same function under two names.
    return lambda *args, **kwargs: None


def _replace(owner: Any, name: str, value: Any) -> None:
    setattr(owner, name, value)


class _TorchOnCpu(types.ModuleType):
    """torch, except that its factories make tensors on the CPU when asked for CUDA."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        if name in _FACTORIES:
            value = _without_cuda(value)
        setattr(self, name, value)
        return value


def _without_cuda(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return on_cpu


def _type_as_if_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None and self.dtype in _CUDA_TYPE_NAMES:
            return _CUDA_TYPE_NAMES[self.dtype]
        return original(self, dtype, *args, **kwargs)

    return type_
