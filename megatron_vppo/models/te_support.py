"""Whether TransformerEngine is here, and which FP8 recipes it can run on this machine's GPU. Imports it only to ask."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from megatron.core.utils import get_te_version, is_te_min_version

from megatron_vppo.models.options import Fp8Recipe


@dataclass(frozen=True)
class _Demand:
    """What a recipe wants."""

    te_version: str
    """The first with which Megatron runs it (megatron/core/fp8_utils.py)."""
    available: str
    """The function of `transformer_engine.pytorch` that knows whether this GPU has it, and why not."""
    chips: str


_DEMANDS: dict[Fp8Recipe, _Demand] = {
    "delayed": _Demand("1.0.0", "is_fp8_available", "Ada, Hopper (H100, H200, H800) or later"),
    "tensorwise": _Demand("2.2.0", "is_fp8_available", "Ada, Hopper (H100, H200, H800) or later"),
    "blockwise": _Demand("2.3.0", "is_fp8_block_scaling_available", "Hopper (H100, H200, H800) or later"),
    "mxfp8": _Demand("2.1.0", "is_mxfp8_available", "Blackwell"),
}


def has_transformer_engine() -> bool:
    """Whether it is installed; it is not imported, which takes seconds."""
    return importlib.util.find_spec("transformer_engine") is not None


def recipe_refusal(recipe: Fp8Recipe, *, on_gpu: bool) -> str | None:
    """What a recipe needs that this machine has not; None: it can run."""
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
