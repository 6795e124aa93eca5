"""What the machine can do, and so how the model is built: of which backend's layers, with which FP8 recipe."""

from __future__ import annotations

import importlib.util

from megatron_vppo.config.choices import BackendSetting, Dtype
from megatron_vppo.config.schema import RunConfig
from megatron_vppo.models.layers.te_support import APEX_GRADIENTS, has_transformer_engine, recipe_refusal
from megatron_vppo.models.options import Backend, Fp8Options, ModelOptions


def choose_backend(setting: BackendSetting, *, on_gpu: bool, dtype: Dtype) -> Backend:
    """The backend that `model.backend` means on this machine, for a model of `model.dtype`.

    TransformerEngine's fused attention takes 16 bits; what it does in float32 is slower than torch.

    Raises:
        ValueError: 'te' in float32, without a GPU, or without TransformerEngine.
    """
    possible = on_gpu and dtype == "bfloat16" and has_transformer_engine()
    if setting == "torch" or (setting == "auto" and not possible):
        return "torch"
    if dtype != "bfloat16":
        raise ValueError(f"model.backend=te goes with model.dtype=bfloat16, not {dtype}; set 'auto'")
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


def check_fp8_hardware(config: RunConfig, *, on_gpu: bool) -> None:
    """Raises ValueError where `fp8.recipe` cannot run here, with what it needs."""
    options = fp8_options(config)
    if options is None:
        return
    recipe, refusal = options.recipe, recipe_refusal(options.recipe, on_gpu=on_gpu)
    if refusal is not None:
        emulation = "" if on_gpu else ". `vppo fp8-fidelity` emulates it here and shows what it would change"
        raise ValueError(f"fp8.recipe={recipe} needs {refusal}; take another recipe, or set it to null{emulation}")
    if config.model.dtype != "bfloat16":
        raise ValueError(f"fp8.recipe={recipe} goes with model.dtype=bfloat16, not {config.model.dtype}")
    if choose_backend(config.model.backend, on_gpu=on_gpu, dtype=config.model.dtype) != "te":
        raise ValueError(f"fp8.recipe={recipe} goes with layers of TransformerEngine; leave model.backend at 'auto'")


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
        backend=choose_backend(config.model.backend, on_gpu=on_gpu, dtype=config.model.dtype),
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
