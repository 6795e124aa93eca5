"""The choices that the machine decides: the backend whose layers a model is built of, and the FP8 recipes that run."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from megatron_vppo.config.choices import BackendSetting, Dtype
from megatron_vppo.config.schema import RunConfig
from megatron_vppo.models.layers.te_support import APEX_GRADIENTS, has_transformer_engine, recipe_refusal
from megatron_vppo.models.options import Backend, Fp8Options, ModelOptions
from megatron_vppo.setup.by_machine import by_machine

GIB = 2**30
BFLOAT16_CAPABILITY = (8, 0)
"""The first compute capability with bfloat16: that of the A100."""
LEAST_RANK_BYTES = GIB // 4
"""Memory of a trainer rank before it holds a model. Measured: 0.42 GiB of its own, after its imports."""


@dataclass(frozen=True)
class Gpu:
    """The properties of the GPUs of a run that its checks depend on."""

    capability: tuple[int, int]
    """The compute capability, such as (9, 0)."""
    memory_bytes: int


def choose_backend(setting: BackendSetting, *, on_gpu: bool, dtype: Dtype) -> Backend:
    """Returns the backend that `model.backend` means on this machine, for a model of `model.dtype`.

    'auto' takes TransformerEngine for bfloat16 alone: its fused attention has no float32, and what it runs instead is
    slower than torch.

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
    """Returns the model's FP8 options; None if no phase uses FP8."""
    recipe = config.fp8.recipe
    if recipe is None or not config.fp8.scope:
        return None
    return Fp8Options(recipe=recipe, bf16_layers_at_ends=config.fp8.bf16_layers_at_ends)


def check_fp8_hardware(config: RunConfig, *, on_gpu: bool) -> None:
    """Raises ValueError, with what is needed, if `fp8.recipe` cannot run here."""
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
    """Collects the options by which the model is built on this machine.

    Raises:
        ValueError: this machine cannot do what is set.
    """
    check_fp8_hardware(config, on_gpu=on_gpu)
    backend = choose_backend(config.model.backend, on_gpu=on_gpu, dtype=config.model.dtype)
    return options_with(config, backend=backend, on_gpu=on_gpu)


def options_with(config: RunConfig, *, backend: Backend, on_gpu: bool) -> ModelOptions:
    """Collects the options by which the model is built of the layers of `backend`, wherever that may be."""
    parallel = config.parallel
    return ModelOptions(
        pipeline_layers=parallel.pipeline_layers,
        virtual_stages=parallel.virtual_pipeline_model_parallel_size,
        sequence_parallel=by_machine(config, on_gpu=on_gpu).sequence_parallel,
        recompute=parallel.recompute,
        vision_split=parallel.vision_split,
        frozen=frozenset(config.model.freeze),
        backend=backend,
        fp8=fp8_options(config),
    )


def check_dtype(config: RunConfig, *, capability: tuple[int, int]) -> None:
    """Refuses bfloat16 on GPUs without it; vLLM would, once it starts.

    Args:
        capability: the compute capability of the GPUs, such as (9, 0).
    """
    if config.model.dtype == "bfloat16" and capability < BFLOAT16_CAPABILITY:
        needed, found = (".".join(map(str, version)) for version in (BFLOAT16_CAPABILITY, capability))
        raise ValueError(
            f"model.dtype=bfloat16 needs GPUs of compute capability {needed} (A100) or later, and these have {found}; "
            "set model.dtype=float32"
        )


def check_host_memory(config: RunConfig, *, ranks: int, engines: int, total_bytes: int) -> None:
    """Refuses more ranks and KV caches on CPU than the machine has memory for, however small the model is.

    Args:
        ranks: trainer ranks on this machine.
        engines: the number of engines.
        total_bytes: the machine's memory.
    """
    workers = engines * config.rollout.tensor_parallel_size
    needed = ranks * LEAST_RANK_BYTES + workers * int(config.rollout.cpu_kv_cache_gib * GIB)
    if needed > total_bytes:
        raise ValueError(
            f"{ranks} trainer ranks (parallel.*_size) of {LEAST_RANK_BYTES / GIB} GiB at least and the KV caches of "
            f"{workers} engine workers (rollout.cpu_kv_cache_gib {config.rollout.cpu_kv_cache_gib:g} each) need "
            f"{needed / GIB:.1f} GiB, but this machine has {total_bytes / GIB:.1f} GiB; lower one of them"
        )


def slower_without(backend: Backend) -> list[str]:
    """Lists the reasons why the layers of `backend` are slower than TransformerEngine's; none for those themselves."""
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


def shares_prompts(config: RunConfig) -> bool:
    """Returns True if responses share their prompt: context-parallel ranks cut whole rows, and share none."""
    return config.parallel.shared_prefix and config.parallel.context_parallel_size == 1


def prompts_apart(config: RunConfig) -> str | None:
    """Returns a note for a run whose responses read their prompt each for itself though they could share it."""
    if not config.parallel.shared_prefix or shares_prompts(config):
        return None
    return (
        f"parallel.context_parallel_size={config.parallel.context_parallel_size}: ranks cut whole rows, so responses "
        "do not share their prompt "
        "(parallel.shared_prefix has no effect)"
    )


def groups_cut(config: RunConfig) -> str | None:
    """Returns a note for a run whose micro-batches hold parts of groups, which each read the prompt again."""
    actor, n = config.actor, config.rollout.n
    names = ("micro_batch_size_per_device_for_update", "micro_batch_size_per_device_for_experience")
    cut = [f"actor.{name}={getattr(actor, name)}" for name in names if getattr(actor, name) < n]
    if not shares_prompts(config) or actor.max_tokens_per_micro_batch is not None or not cut:
        return None
    return (
        f"{' and '.join(cut)}: cuts groups of rollout.n={n} responses, and the language model reads the prompt "
        f"again for each part; set {n} or more, or fill micro-batches by tokens (actor.max_tokens_per_micro_batch)"
    )


def slower_layers(config: RunConfig, *, on_gpu: bool) -> str | None:
    """Returns a warning, with reasons, for a run on GPUs without TransformerEngine's layers; None for any other."""
    backend = choose_backend(config.model.backend, on_gpu=on_gpu, dtype=config.model.dtype)
    if not on_gpu or not (reasons := slower_without(backend)):
        return None
    return "\n- ".join(["model.backend=torch is slower than TransformerEngine's layers:", *reasons])
