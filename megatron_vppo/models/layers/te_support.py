"""TransformerEngine on this machine: is it installed, which FP8 recipes run on this GPU, what holds its memory.

TransformerEngine itself is imported only to ask about a recipe; that takes seconds.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megatron.core.utils import get_te_version, is_te_min_version
from torch import Tensor, nn

from megatron_vppo.config.choices import Fp8Recipe


@dataclass(frozen=True)
class _Demand:
    """The requirements of a recipe."""

    te_version: str
    """The first version of TransformerEngine with which Megatron runs it (megatron/core/fp8_utils.py)."""
    available: str
    """The function of `transformer_engine.pytorch` that says if this GPU can run it, and if not, why."""
    chips: str
    """GPUs that can run it, in words."""


_DEMANDS: dict[Fp8Recipe, _Demand] = {
    "delayed": _Demand("1.0.0", "is_fp8_available", "Ada, Hopper (H100, H200, H800) or later"),
    "tensorwise": _Demand("2.2.0", "is_fp8_available", "Ada, Hopper (H100, H200, H800) or later"),
    "blockwise": _Demand("2.3.0", "is_fp8_block_scaling_available", "Hopper (H100, H200, H800) or later"),
    "mxfp8": _Demand("2.1.0", "is_mxfp8_available", "Blackwell"),
}


def has_transformer_engine() -> bool:
    """Returns True if it is installed, its part for torch included. Does not import it."""
    parts = ("transformer_engine", "transformer_engine_torch")
    return all(importlib.util.find_spec(part) is not None for part in parts)


def recipe_refusal(recipe: Fp8Recipe, *, on_gpu: bool) -> str | None:
    """Returns the missing requirement of a recipe on this machine, or None."""
    demand = _DEMANDS[recipe]
    if not on_gpu:
        return f"an NVIDIA GPU ({demand.chips}), and none is seen"
    if not has_transformer_engine():
        return "TransformerEngine, which is not installed"
    if not is_te_min_version(demand.te_version):
        return f"TransformerEngine {demand.te_version}, and {get_te_version()} is installed"
    import transformer_engine.pytorch as te

    known, reason = getattr(te, demand.available)(return_reason=True)
    return None if known else f"{demand.chips}: {reason}"


def drop_fp8_copies(model: nn.Module) -> None:
    """Frees the 8-bit copies of weights that layers keep from one micro-batch to the next.

    The first micro-batch of every schedule makes new copies, so between schedules they only take memory.
    TransformerEngine (2.9 to 2.20) has no public way to drop them.
    """
    for module in model.modules():
        getattr(module, "_fp8_workspaces", {}).clear()


@contextmanager
def amaxes_untouched(models: Sequence[nn.Module]) -> Iterator[None]:
    """Puts the amaxes from which 'delayed' takes its scales back as they were on opening; on closing.

    A pass without gradients takes no new scales, but leaves its amaxes to the next pass with gradients
    (TransformerEngine 2.9 to 2.20: `autocast_exit`, `reduce_and_update_fp8_tensors`), and a checkpoint holds them. So
    the update after a pass that was cut off and done again would have other scales than the one after a whole pass.
    """
    before = {id(history): (history, history.clone()) for history in _amax_histories(models)}
    try:
        yield
    finally:
        for history in _amax_histories(models):
            if id(history) in before:
                history.copy_(before[id(history)][1])
            else:
                history.zero_()  # a layer makes it in its first pass in FP8


def _amax_histories(models: Sequence[nn.Module]) -> list[Tensor]:
    """Returns the histories [passes, operands] of the layers that have run in FP8 with recipe 'delayed'."""
    tables = [getattr(module, "fp8_meta", {}) for model in models for module in model.modules()]
    states = [table["scaling_fwd"] for table in tables if "scaling_fwd" in table]
    return [state.amax_history for state in states if hasattr(state, "amax_history")]


APEX_GRADIENTS = "fused_weight_gradient_mlp_cuda"
"""The module of NVIDIA Apex that accumulates weight gradients in fp32 inside the matrix product."""


def packed_arguments(
    bounds: Tensor, longest: int, key_bounds: Tensor | None = None, longest_keys: int | None = None
) -> dict[str, Any]:
    """Returns what TransformerEngine's attention, and Megatron's wrapper of it, have to be told of packed sequences.

    Args:
        bounds: int32 [sequences + 1]: where the queries of each begin, and the end of the last.
        longest: the queries of the longest.
        key_bounds, longest_keys: the same of the keys. None: they are those of the queries.
    """
    keys = bounds if key_bounds is None else key_bounds
    return {
        "qkv_format": "thd",
        # The same tensor in both places says that there is no padding between sequences, without a look at its values.
        "cu_seqlens_q": bounds,
        "cu_seqlens_q_padded": bounds,
        "cu_seqlens_kv": keys,
        "cu_seqlens_kv_padded": keys,
        "max_seqlen_q": longest,
        "max_seqlen_kv": longest if longest_keys is None else longest_keys,
    }
