"""What the machine can do, and so how the model is built: of which backend's layers, with which FP8 recipe."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Literal

from megatron.core.utils import get_te_version, is_te_min_version

from megatron_vppo.config.schema import RunConfig
from megatron_vppo.models.options import Backend, Fp8Options, Fp8Recipe, ModelOptions
from megatron_vppo.models.transformer_config import APEX_GRADIENTS


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


def choose_backend(setting: Literal["auto", "te", "torch"], *, on_gpu: bool) -> Backend:
    """The backend that `model.backend` means on this machine.

    Raises:
        ValueError: 'te' without a GPU or without TransformerEngine.
    """
    if setting == "torch" or (setting == "auto" and not (on_gpu and has_transformer_engine())):
        return "torch"
    if not on_gpu:
        raise ValueError("model.backend=te: TransformerEngine runs on NVIDIA GPUs alone, and none is seen; set 'auto'")
    if not has_transformer_engine():
        raise ValueError(
            "model.backend=te, but TransformerEngine is not installed; install transformer-engine[pytorch] for this "
            "CUDA, or set model.backend=torch"
        )
    return "te"


def fp8_options(config: RunConfig) -> Fp8Options | None:
    """None where no phase uses FP8."""
    recipe = config.fp8.recipe
    if recipe is None or not config.fp8.scope:
        return None
    return Fp8Options(recipe=recipe, bf16_layers_at_ends=config.fp8.bf16_layers_at_ends)


def recipe_refusal(recipe: Fp8Recipe, *, on_gpu: bool) -> str | None:
    """What a recipe needs that this machine has not; None: it can run."""
    demand = _DEMANDS[recipe]
    if not on_gpu:
        return f"an NVIDIA GPU ({demand.chips}), and none is seen"
    if not has_transformer_engine():
        return "TransformerEngine, which is not installed"
    if not is_te_min_version(demand.te_version):
        return f"TransformerEngine {demand.te_version}, and {get_te_version()} is installed"
    known, reason = getattr(importlib.import_module("transformer_engine.pytorch"), demand.available)(return_reason=True)
    return None if known else f"{demand.chips}: {reason}"


def check_fp8_hardware(config: RunConfig, *, on_gpu: bool) -> None:
    """Raises ValueError where `fp8.recipe` cannot run here, with what it needs."""
    options = fp8_options(config)
    if options is None:
        return
    recipe, refusal = options.recipe, recipe_refusal(options.recipe, on_gpu=on_gpu)
    if refusal is not None:
        emulation = "" if on_gpu else ". `vppo fp8-fidelity` emulates it here and shows what it would change"
        raise ValueError(f"fp8.recipe={recipe} needs {refusal}; take another recipe, or set it to null{emulation}")
    if choose_backend(config.model.backend, on_gpu=on_gpu) != "te":
        raise ValueError(f"fp8.recipe={recipe} goes with layers of TransformerEngine; leave model.backend at 'auto'")
    if config.model.dtype != "bfloat16":
        raise ValueError(f"fp8.recipe={recipe} goes with model.dtype=bfloat16, not {config.model.dtype}")


def model_options(config: RunConfig, *, on_gpu: bool) -> ModelOptions:
    """How the model is to be laid out and run on this machine.

    Raises:
        ValueError: it cannot do what is set.
    """
    check_fp8_hardware(config, on_gpu=on_gpu)
    parallel = config.parallel
    return ModelOptions(
        pipeline_layers=parallel.pipeline_layers,
        virtual_stages=parallel.virtual_pipeline_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        recompute=parallel.recompute,
        vision_split=parallel.vision_split,
        frozen=frozenset(config.model.freeze),
        backend=choose_backend(config.model.backend, on_gpu=on_gpu),
        fp8=fp8_options(config),
    )


def slower_without(backend: Backend) -> list[str]:
    """What a GPU run of the torch backend misses, one line each; nothing of TransformerEngine's."""
    if backend == "te":
        return []
    lines = [
        "norms and projections are separate kernels, and rotary angles are applied by several",
        "attention of context-parallel ranks gathers all keys and values instead of passing them round",
        "no FP8",
    ]
    if importlib.util.find_spec(APEX_GRADIENTS) is None:
        lines.append("weight gradients are added up in fp32 by a kernel of their own (NVIDIA Apex would fuse it)")
    return lines
