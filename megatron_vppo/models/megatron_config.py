"""Hugging Face configuration -> Megatron configurations of the two towers. Checks that the layout fits the model."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

from megatron_vppo.config.choices import Fp8Recipe, Recompute, VisionSplit
from megatron_vppo.models.family import Family
from megatron_vppo.models.hf_config import HfConfig, head_dim
from megatron_vppo.models.layers.te_support import APEX_GRADIENTS
from megatron_vppo.models.options import Backend, Fp8Options, ModelOptions
from megatron_vppo.models.precision import AMAX_HISTORY
from megatron_vppo.weights.padded_widths import padded_share

VISION_NORM_EPSILON = 1e-6
"""The architectures fix it; their configurations have no field for it."""


def stage_layers(
    hf_config: HfConfig,
    *,
    family: Family,
    pipeline: int,
    pipeline_layers: tuple[int, ...] | None,
    virtual_stages: int = 1,
) -> tuple[int, ...]:
    """Returns the number of language layers of each pipeline stage, in the order of the model.

    Args:
        virtual_stages: stages that each of the `pipeline` ranks holds.

    Raises:
        ValueError: the layers do not divide evenly and no split is given; the split does not add up; or the first stage
            has fewer layers than there are deepstack features to add.
    """
    layers = _split_layers(hf_config, stages=pipeline * virtual_stages, pipeline_layers=pipeline_layers)
    needed = family.deepstack_layers(hf_config)
    if layers[0] < needed:
        raise ValueError(
            f"the first pipeline stage has {layers[0]} language layers, but the first {needed} take features of the "
            f"vision tower, which lies there; use fewer stages, or give the first stage at least {needed} layers by "
            "parallel.pipeline_layers"
        )
    return layers


def _split_layers(hf_config: HfConfig, *, stages: int, pipeline_layers: tuple[int, ...] | None) -> tuple[int, ...]:
    layers = hf_config.text_config.num_hidden_layers
    if layers < stages:
        raise ValueError(
            f"{layers} layers are too few for {stages} pipeline stages; each needs at least one, so lower "
            "parallel.pipeline_model_parallel_size (times its virtual stages)"
        )
    if pipeline_layers is None:
        if layers % stages:
            even = [layers // stages + (stage < layers % stages) for stage in range(stages)]
            raise ValueError(
                f"{layers} layers do not divide over {stages} pipeline stages; set parallel.pipeline_layers, "
                f"for example {even}"
            )
        return (layers // stages,) * stages
    if len(pipeline_layers) != stages or sum(pipeline_layers) != layers or min(pipeline_layers) < 1:
        raise ValueError(
            f"parallel.pipeline_layers = {list(pipeline_layers)} must have {stages} entries (the pipeline size, times "
            f"the virtual stages of each rank), each at least 1, that sum to {layers} (the layers of the model)"
        )
    return tuple(pipeline_layers)


def check_tensor_parallel(hf_config: HfConfig, *, tensor: int, vision_split: VisionSplit) -> None:
    """Checks that the tensor-parallel size divides everything that is split by it.

    Raises:
        ValueError: the first size of the language model or the vision tower that it does not divide.
    """
    text, vision = hf_config.text_config, hf_config.vision_config
    sizes = {
        "attention heads": text.num_attention_heads,
        "key-value heads": text.num_key_value_heads,
        "MLP width": text.intermediate_size,
    }
    if vision_split == "tensor":
        sizes |= {
            "vision attention heads": vision.num_heads,
            "vision MLP width": vision.intermediate_size,
            "vision merger width": vision.hidden_size * vision.spatial_merge_size**2,
        }
    for name, size in sizes.items():
        if size % tensor:
            fitting = [
                t
                for t in range(1, min(tensor, text.num_attention_heads + 1))
                if all(s % t == 0 for s in sizes.values())
            ]
            whole_tower = ", or parallel.vision_split=images" if name.startswith("vision") else ""
            raise ValueError(
                f"{size} {name} cannot be split over parallel.tensor_model_parallel_size = {tensor}; "
                f"set it to one of {fitting} and use pipeline or data parallelism for the other devices{whole_tower}"
            )


def language_config(
    hf_config: HfConfig,
    *,
    family: Family,
    tensor: int,
    context: int,
    stages: tuple[int, ...],
    options: ModelOptions,
    dtype: torch.dtype,
    device: torch.device,
) -> TransformerConfig:
    """Makes Megatron's configuration of the language model.

    Args:
        tensor, context: ranks that the model and its tokens are split over.
        stages: language layers of each stage, virtual ones included.
    """
    text = hf_config.text_config
    pipeline = len(stages) // options.virtual_stages
    placement = [["decoder"] * layers for layers in stages]
    placement[0].insert(0, "embedding")
    placement[-1].append("loss")
    return TransformerConfig(
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        ffn_hidden_size=text.intermediate_size,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_key_value_heads,
        kv_channels=head_dim(text),
        layernorm_epsilon=text.rms_norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=family.qkv_bias,
        qk_layernorm=family.qk_norm,
        tensor_model_parallel_size=tensor,
        sequence_parallel=options.sequence_parallel and tensor > 1,
        context_parallel_size=context,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=options.virtual_stages if options.virtual_stages > 1 else None,
        # Batched communication would put activations and gradients of the same two ranks into one batch, if the
        # pipeline has two ranks.
        overlap_p2p_comm=options.virtual_stages > 1,
        batch_p2p_comm=options.virtual_stages == 1,
        pipeline_model_parallel_layout=placement if pipeline > 1 else None,
        pipeline_dtype=dtype,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # there are no experts; the default is refused with variable lengths
        **_common(dtype=dtype, device=device, activation=F.silu, options=options),
        **_fp8(options.fp8),
    )


def vision_config(
    hf_config: HfConfig,
    *,
    family: Family,
    tensor: int,
    options: ModelOptions,
    dtype: torch.dtype,
    device: torch.device,
) -> TransformerConfig:
    """Makes Megatron's configuration of the vision tower, all of which lies on the first pipeline stage.

    The width of its MLP is padded with zeros (docs/adr/0024-padded-widths.md).

    Args:
        tensor: ranks that the tower is split over.
    """
    vision = hf_config.vision_config
    return TransformerConfig(
        num_layers=vision.depth,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=padded_share(vision.intermediate_size, tensor) * tensor,
        num_attention_heads=vision.num_heads,
        kv_channels=vision.hidden_size // vision.num_heads,
        layernorm_epsilon=VISION_NORM_EPSILON,
        add_bias_linear=True,
        tensor_model_parallel_size=tensor,
        **family.vision_options,
        **_common(dtype=dtype, device=device, activation=family.vision_options["activation_func"], options=options),
    )


_RECOMPUTATION: dict[Recompute, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


_FP8_FORMAT: Mapping[Fp8Recipe, str] = MappingProxyType(
    {"tensorwise": "hybrid", "delayed": "hybrid", "blockwise": "e4m3", "mxfp8": "e4m3"}
)
"""The FP8 formats of each recipe. 'hybrid': gradients are E5M2, because one scale per tensor needs its range."""


def _fp8(options: Fp8Options | None) -> dict[str, Any]:
    if options is None:
        return {}
    ends = options.bf16_layers_at_ends
    return {
        "fp8": _FP8_FORMAT[options.recipe],
        "fp8_recipe": options.recipe,
        "fp8_amax_history_len": AMAX_HISTORY,
        "fp8_amax_compute_algo": "max",
        # 'delayed' shares amaxes after every micro-batch. Data-parallel ranks may have different numbers of
        # micro-batches, so they must not take part.
        "tp_only_amax_red": True,
        "first_last_layers_bf16": ends > 0,
        "num_layers_at_start_in_bf16": ends,
        "num_layers_at_end_in_bf16": ends,
    }


def _common(*, dtype: torch.dtype, device: torch.device, activation: Callable, options: ModelOptions) -> dict[str, Any]:
    return {
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        # Weights come from a checkpoint: nothing is drawn at random only to be overwritten.
        "perform_initialization": False,
        "use_cpu_initialization": device.type != "cuda",
        "masked_softmax_fusion": False,  # it belongs to an attention that we do not use
        **_fusions(on_gpu=device.type == "cuda", backend=options.backend, activation=activation),
        **_RECOMPUTATION[options.recompute],
    }


def _fusions(*, on_gpu: bool, backend: Backend, activation: Callable) -> dict[str, bool]:
    """Returns the switches of the fused kernels.

    Each needs a CUDA extension, or compiles code in every process, which does not pay off on CPU.
    """
    return {
        "gradient_accumulation_fusion": on_gpu
        and (backend == "te" or importlib.util.find_spec(APEX_GRADIENTS) is not None),
        "bias_activation_fusion": on_gpu and activation is F.silu,
        "bias_dropout_fusion": on_gpu,
        "apply_rope_fusion": on_gpu and backend == "te",
    }
