"""One rank of a world that does not exist: real sizes, ranks and modules; nothing is sent, and no tensor has memory.

Ranks are those of torch's fake process group, one after the other in this process. Weights, gradients and activations
are on the meta device, where a tensor has a shape and no values. Token ids, positions and indices are real and on the
CPU, because packing and masks depend on their values.

All patches that this takes are here. They are in force inside the `with` blocks alone, and serve torch 2.9 to 2.13 and
Megatron Core 0.16 to 0.19:

- Megatron makes gloo groups next to those of the default backend, and gloo would wait for the other ranks. They become
  fake groups as well (`_fake_gloo_groups`).
- Megatron makes gradient buffers on `torch.cuda.current_device()` (`meta_device`).
- Where TransformerEngine or Apex is installed, Megatron takes their Adam, which asks for a GPU at once. Its state is as
  large as that of torch's (`meta_device`).
- Most operations want an index or a mask on the device of the data (`_IndicesFollow`).
- Attention and RMSNorm have no fused kernel on meta: torch would put them together from operations that keep all
  attention scores, and two fp32 copies of a norm's input. `_attention` and `_rms_norm` keep what CUDA's kernels keep.
- Context-parallel attention marks its masks by a class of tensor that a dispatch mode cannot make (`meta_device`).
- The vocabulary head compiles its passes where logits are not on a CPU; here they run as they are (`meta_device`).

Shape suffix legend: A = pieces of an attention bucket; H = attention heads of this rank; Q = query positions of a
bucket; L = key length of a bucket: tokens of one packed sequence; E = values per attention head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import optimizer as megatron_optimizer
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from megatron_vppo.config.schema import ParallelConfig
from megatron_vppo.models.layers import attention
from megatron_vppo.parallel.cpu_support import enable_cpu
from megatron_vppo.parallel.layout import Layout, destroy_layout, init_layout

META = torch.device("meta")
aten = torch.ops.aten


@contextmanager
def fake_rank(parallel: ParallelConfig, *, rank: int, world_size: int) -> Iterator[Layout]:
    """Makes this process rank `rank` of `world_size`, with the groups that a run with these settings would have.

    Raises:
        RuntimeError: this process has process groups already, or sees GPUs, whose settings it would change.
    """
    if dist.is_initialized() or not enable_cpu():
        raise RuntimeError("a fake world needs a process without process groups and without GPUs in sight")
    with _fake_gloo_groups():
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            yield init_layout(
                tensor=parallel.tensor_model_parallel_size,
                pipeline=parallel.pipeline_model_parallel_size,
                context=parallel.context_parallel_size,
                virtual_stages=parallel.virtual_pipeline_model_parallel_size,
                vision_split=parallel.vision_split,
                data=parallel.data_parallel_size,
                timeout_seconds=parallel.collective_timeout_seconds,
            )
        finally:
            destroy_layout()


@contextmanager
def meta_device() -> Iterator[None]:
    """Makes Megatron's buffers on the meta device, and lets operations mix meta tensors with indices on the CPU."""
    with (
        _replaced(torch.cuda, "current_device", lambda: META),
        _replaced(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", True),
        _replaced(F, "scaled_dot_product_attention", _attention),
        _replaced(F, "rms_norm", _rms_norm),
        _replaced(attention, "causal_lower_right", lambda queries, keys: None),
        torch.compiler.set_stance("force_eager"),
        _IndicesFollow(),
    ):
        yield


def _fake_gloo_groups() -> Any:
    make = dist.new_group

    def new_group(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("backend") == "gloo":
            kwargs["backend"] = "fake"
        return make(*args, **kwargs)

    return _replaced(dist, "new_group", new_group)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


# --- Operations on meta -----------------------------------------------------------------------------------------------


class _IndicesFollow(TorchDispatchMode):
    """Moves CPU tensors to meta where an operation would refuse them next to meta tensors."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func.overloadpacket not in _TAKE_CPU_TENSORS:
            flat, spec = tree_flatten((args, kwargs))
            devices = {value.device.type for value in flat if isinstance(value, Tensor)}
            if devices == {"cpu", "meta"}:
                moved = [value.to(META) if isinstance(value, Tensor) else value for value in flat]
                args, kwargs = tree_unflatten(moved, spec)
        return func(*args, **kwargs)


_TAKE_CPU_TENSORS = frozenset({aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten.copy_})
"""Operations in which both may meet. A mask as an index has to stay on the CPU, where its ones are counted."""


def _attention(query_AHQE: Tensor, key_AHLE: Tensor, value_AHLE: Tensor, **options: Any) -> Tensor:
    """Stands for F.scaled_dot_product_attention; no option changes a shape."""
    if query_AHQE.device != META:
        return _TORCH_ATTENTION(query_AHQE, key_AHLE, value_AHLE, **options)
    return _FlashAttention.apply(query_AHQE, key_AHLE, value_AHLE)


def _rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor, eps: float) -> Tensor:
    """Stands for F.rms_norm."""
    return _FusedRmsNorm.apply(x, weight) if x.device == META else _TORCH_RMS_NORM(x, shape, weight, eps)


_TORCH_ATTENTION, _TORCH_RMS_NORM = F.scaled_dot_product_attention, F.rms_norm


class _FlashAttention(torch.autograd.Function):
    """Attention that keeps what a flash kernel keeps: inputs, output, and one fp32 number per query and head."""

    @staticmethod
    def forward(ctx: Any, query_AHQE: Tensor, key_AHLE: Tensor, value_AHLE: Tensor) -> Tensor:
        pieces, heads, queries, values = query_AHQE.shape
        output_AHQE = query_AHQE.new_empty(pieces, queries, heads, values).transpose(1, 2)  # laid out as by the kernel
        logsumexp_AHQ = query_AHQE.new_empty(query_AHQE.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query_AHQE, key_AHLE, value_AHLE, output_AHQE, logsumexp_AHQ)
        return output_AHQE

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class _FusedRmsNorm(torch.autograd.Function):
    """RMSNorm that keeps what CUDA's kernel keeps: its input, the weight, and one fp32 number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)
