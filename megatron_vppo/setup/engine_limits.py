"""The limits of vLLM's engines for a model and a machine. vLLM would find them out when its engines start, or later."""

from __future__ import annotations

import math

from megatron_vppo.config.choices import Dtype, ResizeMode
from megatron_vppo.config.schema import EngineConfig, PromptConfig, RunConfig
from megatron_vppo.data.geometry import check_budget, least_tokens
from megatron_vppo.models.families import family_of, weight_map
from megatron_vppo.models.hf_config import (
    HfConfig,
    head_dim,
    kv_bytes_per_token,
    pixels_per_token,
    position_refusal,
    vllm_split_refusal,
)
from megatron_vppo.rollout.engine_process import CPU_BLOCK_SIZE
from megatron_vppo.setup.by_machine import by_machine
from megatron_vppo.setup.engines import VLLM_FP8
from megatron_vppo.weights.entries import parameter_count

GIB = 2**30
DTYPE_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}
FP8_BLOCKS = {"fp8_per_block": 128, "mxfp8": 32}
"""Inputs of a matrix that share a scale, by vLLM's scheme. A worker's share of the inputs must be a multiple (vLLM's
`per_token_group_quant_fp8` and `Mxfp8OnlineLinearMethod`). Compiled engines pad blocks of 128, and no others."""


def check_engines(config: RunConfig, hf_config: HfConfig, *, gpu_bytes: int | None) -> None:
    """Refuses settings with which no engine can start, or no engine can sample, with the numbers and what to set.

    Args:
        gpu_bytes: the memory of a GPU; None: the engines are on CPU.
    """
    check_sampling(config.rollout, config.data, hf_config, top_k=config.rollout.top_k, mode=config.algorithm.resize)
    check_quantization(config, hf_config)
    check_memory(
        config.rollout,
        config.data,
        hf_config,
        dtype=config.model.dtype,
        quantized=config.rollout.quantization is not None,
        gpu_bytes=gpu_bytes,
    )


def check_sampling(
    engines: EngineConfig, data: PromptConfig, hf_config: HfConfig, *, top_k: int, mode: ResizeMode
) -> None:
    """Refuses what no engine of this model can do, on whatever machine."""
    check_split(engines, hf_config)
    check_positions(data, hf_config)
    check_images(data, hf_config, mode=mode)
    check_vocabulary(top_k, hf_config)


def check_split(engines: EngineConfig, hf_config: HfConfig) -> None:
    """Refuses more GPUs per engine than vLLM can split the model over."""
    size = engines.tensor_parallel_size
    if refusal := vllm_split_refusal(hf_config, size):
        raise ValueError(
            f"rollout.tensor_parallel_size={size}: vLLM cannot split {refusal} over {size} ranks; lower it"
        )


def check_positions(data: PromptConfig, hf_config: HfConfig) -> None:
    """Refuses prompts and responses that are longer together than the model has positions."""
    prompt, response = data.max_prompt_length, data.max_response_length
    if refusal := position_refusal(hf_config, prompt=prompt, response=response):
        raise ValueError(
            f"data.max_prompt_length {prompt} + data.max_response_length {response} = {refusal}; lower one of the two"
        )


def check_images(data: PromptConfig, hf_config: HfConfig, *, mode: ResizeMode) -> None:
    """Refuses a pixel budget that no image fits, and one whose smallest image fits no prompt."""
    square = pixels_per_token(hf_config)
    check_budget(min_pixels=data.min_pixels, max_pixels=data.max_pixels, mode=mode, pixels_per_token=square)
    tokens = least_tokens(data.min_pixels, pixels_per_token=square)
    if mode == "smart" and tokens >= data.max_prompt_length:
        raise ValueError(
            f"data.min_pixels {data.min_pixels} makes {tokens} tokens at least of every image ({square} pixels each), "
            f"and data.max_prompt_length is {data.max_prompt_length}, so that every prompt with an image would be left "
            f"out; lower data.min_pixels, or raise data.max_prompt_length above {tokens}"
        )


def check_vocabulary(top_k: int, hf_config: HfConfig) -> None:
    """Refuses to sample from more tokens than there are, which vLLM takes for all of them."""
    tokens = hf_config.text_config.vocab_size
    if top_k > tokens:
        raise ValueError(
            f"rollout.top_k {top_k} is more than the {tokens} tokens of the model's vocabulary; set -1 (off) or at "
            f"most {tokens}"
        )


def check_quantization(config: RunConfig, hf_config: HfConfig) -> None:
    """Refuses quantised engines without a layer to quantise, and matrices that do not divide into blocks."""
    if config.rollout.quantization is None:
        return
    text, size, ends = hf_config.text_config, config.rollout.tensor_parallel_size, config.fp8.bf16_layers_at_ends
    if 2 * ends >= text.num_hidden_layers:
        raise ValueError(
            f"fp8.bf16_layers_at_ends={ends} leaves rollout.quantization none of the {text.num_hidden_layers} layers; "
            "lower it, or set rollout.quantization=null"
        )
    scheme = VLLM_FP8[config.fp8.recipe]
    blocks = FP8_BLOCKS.get(scheme, 1) if by_machine(config, on_gpu=True).enforce_eager or scheme == "mxfp8" else 1
    inputs = {
        "hidden size": text.hidden_size,
        "width of the heads of a worker": text.num_attention_heads * head_dim(text) // size,
        "MLP width of a worker": text.intermediate_size // size,
    }
    for what, width in inputs.items():
        if width % blocks:
            raise ValueError(
                f"rollout.quantization={config.rollout.quantization} scales blocks of {blocks} values, but the {what} "
                f"is {width}; lower rollout.tensor_parallel_size ({size}), set fp8.recipe=tensorwise, or "
                "rollout.quantization=null"
            )


def check_memory(
    engines: EngineConfig,
    data: PromptConfig,
    hf_config: HfConfig,
    *,
    dtype: Dtype,
    quantized: bool,
    gpu_bytes: int | None,
) -> None:
    """Refuses engines without room for the weights (on GPUs) and the keys and values of one sequence of full length.

    Args:
        quantized: True if the weights of linear layers are quantised to 8 bits.
        gpu_bytes: the memory of a GPU; None: the engines are on CPU, where weights have room of their own.
    """
    tokens = data.max_prompt_length + data.max_response_length
    size, dtype_bytes = engines.tensor_parallel_size, DTYPE_BYTES[dtype]
    per_token = kv_bytes_per_token(hf_config, ranks=size, dtype_bytes=dtype_bytes)
    sequence = (
        f"keys and values of one sequence of data.max_prompt_length + data.max_response_length = {tokens} tokens take"
    )
    if gpu_bytes is None:
        blocks = -(-tokens // CPU_BLOCK_SIZE) + 1  # vLLM keeps one back
        needed = per_token * CPU_BLOCK_SIZE * blocks
        if int(engines.cpu_kv_cache_gib * GIB) < needed:
            raise ValueError(
                f"rollout.cpu_kv_cache_gib {engines.cpu_kv_cache_gib:g} is too small: {sequence} "
                f"{_shown(needed)} GiB; set it to at least that, and to more for several sequences at once"
            )
        return
    weight_bytes = 1 if quantized else dtype_bytes  # at least: not all layers are quantised
    weights = parameter_count(weight_map(hf_config, family=family_of(hf_config))) * weight_bytes // size
    given, needed = engines.gpu_memory_utilization * gpu_bytes, weights + per_token * tokens
    if given < needed:
        raise ValueError(
            f"rollout.gpu_memory_utilization {engines.gpu_memory_utilization:g} gives an engine {_shown(int(given))} "
            f"of {_shown(gpu_bytes)} GiB, but its weights take {_shown(weights)} GiB of each GPU, and {sequence} "
            f"{_shown(per_token * tokens)} GiB; raise it, or raise rollout.tensor_parallel_size ({size})"
        )


def _shown(num_bytes: int) -> float:
    """Returns GiB with three decimals, rounded up."""
    return math.ceil(1000 * num_bytes / GIB) / 1000
