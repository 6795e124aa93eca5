"""Hugging Face configuration -> Megatron configurations of the two towers, with the layout's demands checked."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from transformers import Qwen2_5_VLConfig

MODEL_TYPE = "qwen2_5_vl"
VISION_NORM_EPSILON = 1e-6
"""Fixed in the architecture; not a field of its configuration."""


def stage_layers(
    hf_config: Qwen2_5_VLConfig, *, pipeline: int, pipeline_layers: tuple[int, ...] | None
) -> tuple[int, ...]:
    """Language layers of each pipeline stage.

    Raises:
        ValueError: the layers do not divide evenly and no split was given, or the split does not add up.
    """
    layers = hf_config.text_config.num_hidden_layers
    if pipeline_layers is None:
        if layers % pipeline:
            even = [layers // pipeline + (stage < layers % pipeline) for stage in range(pipeline)]
            raise ValueError(
                f"{layers} layers do not divide over {pipeline} pipeline stages; set parallel.pipeline_layers, "
                f"for example {even}"
            )
        return (layers // pipeline,) * pipeline
    if len(pipeline_layers) != pipeline or sum(pipeline_layers) != layers or min(pipeline_layers) < 1:
        raise ValueError(
            f"parallel.pipeline_layers = {list(pipeline_layers)} must have {pipeline} entries (the pipeline size), "
            f"each at least 1, that sum to {layers} (the layers of the model)"
        )
    return tuple(pipeline_layers)


def check_tensor_parallel(hf_config: Qwen2_5_VLConfig, *, tensor: int) -> None:
    """Raises ValueError for the first size of either tower that the tensor-parallel size does not divide."""
    text, vision = hf_config.text_config, hf_config.vision_config
    sizes = {
        "attention heads": text.num_attention_heads,
        "key-value heads": text.num_key_value_heads,
        "MLP width": text.intermediate_size,
        "vision attention heads": vision.num_heads,
        "vision MLP width": vision.intermediate_size,
        "vision merger width": vision.hidden_size * vision.spatial_merge_size**2,
    }
    for what, size in sizes.items():
        if size % tensor:
            fitting = [t for t in range(1, tensor) if all(s % t == 0 for s in sizes.values())]
            raise ValueError(
                f"{size} {what} cannot be split over tensor_model_parallel_size = {tensor}; "
                f"set it to one of {fitting} and use pipeline or data parallelism for the other devices"
            )


def check_supported(hf_config: Qwen2_5_VLConfig) -> None:
    """Raises ValueError for another architecture, and for what this one's configuration can say and no released model
    does.
    """
    if hf_config.model_type != MODEL_TYPE:
        raise ValueError(f"model.path holds a model of type {hf_config.model_type!r}; supported is {MODEL_TYPE!r}")
    text, vision = hf_config.text_config, hf_config.vision_config
    if text.rope_parameters["rope_type"] != "default" or vision.rope_parameters["rope_type"] != "axial":
        raise ValueError(
            f"rope types {text.rope_parameters['rope_type']!r} (text) and {vision.rope_parameters['rope_type']!r} "
            "(vision) are not supported; only 'default' and 'axial' are"
        )
    if any(kind != "full_attention" for kind in text.layer_types):
        raise ValueError("sliding window attention is not supported; set use_sliding_window to false")
    if text.hidden_act != "silu" or vision.hidden_act != "silu":
        raise ValueError(f"activations {text.hidden_act!r} and {vision.hidden_act!r} are not supported; only 'silu' is")
    if vision.out_hidden_size != text.hidden_size:
        raise ValueError(f"vision features of width {vision.out_hidden_size} do not fit hidden size {text.hidden_size}")


def language_config(
    hf_config: Qwen2_5_VLConfig,
    *,
    tensor: int,
    pipeline_layers: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    recompute: bool,
) -> TransformerConfig:
    """Megatron's configuration of the language model over `len(pipeline_layers)` stages."""
    text = hf_config.text_config
    pipeline = len(pipeline_layers)
    placement = [["decoder"] * layers for layers in pipeline_layers]
    placement[0].insert(0, "embedding")
    placement[-1].append("loss")
    return TransformerConfig(
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        ffn_hidden_size=text.intermediate_size,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_key_value_heads,
        kv_channels=text.hidden_size // text.num_attention_heads,
        layernorm_epsilon=text.rms_norm_eps,
        add_bias_linear=False,
        add_qkv_bias=True,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        pipeline_model_parallel_layout=placement if pipeline > 1 else None,
        pipeline_dtype=dtype,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # there are no experts; the default is refused with variable lengths
        **_common(dtype=dtype, device=device, recompute=recompute),
    )


def vision_config(
    hf_config: Qwen2_5_VLConfig, *, tensor: int, dtype: torch.dtype, device: torch.device, recompute: bool
) -> TransformerConfig:
    """Megatron's configuration of the vision tower, which lives on the first pipeline stage as a whole."""
    vision = hf_config.vision_config
    return TransformerConfig(
        num_layers=vision.depth,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.intermediate_size,
        num_attention_heads=vision.num_heads,
        kv_channels=vision.hidden_size // vision.num_heads,
        layernorm_epsilon=VISION_NORM_EPSILON,
        add_bias_linear=True,
        tensor_model_parallel_size=tensor,
        **_common(dtype=dtype, device=device, recompute=recompute),
    )


def _common(*, dtype: torch.dtype, device: torch.device, recompute: bool) -> dict:
    recomputation = (
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1} if recompute else {}
    )
    return {
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        # Weights come from a checkpoint: nothing is drawn at random only to be overwritten.
        "perform_initialization": False,
        "use_cpu_initialization": device.type == "cpu",
        # Each of these needs a CUDA extension, or compiles code in every process.
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        **recomputation,
    }
