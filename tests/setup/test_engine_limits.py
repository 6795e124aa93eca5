"""Settings that a model or vLLM refuses are refused before an engine starts; vLLM's own code says what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.config.quantization import resolve_quantization_config
from vllm.model_executor.layers.quantization.online.mxfp8 import Mxfp8OnlineLinearMethod
from vllm.model_executor.layers.quantization.utils.fp8_utils import per_token_group_quant_fp8
from vllm.v1.kv_cache_interface import FullAttentionSpec

from megatron_vppo.config.ranges import LEAST_TEMPERATURE
from megatron_vppo.config.schema import RunConfig
from megatron_vppo.planning.published import PUBLISHED, published_config
from megatron_vppo.rollout.engine_process import CPU_BLOCK_SIZE
from megatron_vppo.setup.engine_limits import FP8_BLOCKS, check_engines
from megatron_vppo.setup.engines import VLLM_FP8
from tests.models.tiny import tiny_config

MODEL = tiny_config(tied=True, vocab=299, max_position_embeddings=4096)
SMALL = {"max_prompt_length": 300, "max_response_length": 20}
GIB = 2**30


def config_of(data: dict[str, Any] = SMALL, **sections: dict[str, Any]) -> RunConfig:
    model = {"path": "m", **sections.pop("model", {})}
    return RunConfig.model_validate({"data": {"train_files": "x", **data}, "model": model, **sections})


def refusal(config: RunConfig, model: Any = MODEL, *, gpu_bytes: int | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        check_engines(config, model, gpu_bytes=gpu_bytes)
    return str(caught.value)


def test_the_defaults_suit_every_released_model_on_a_large_gpu() -> None:
    for name in PUBLISHED:
        size = 4 if name.endswith(("32b", "72b")) else 1
        check_engines(config_of({}, rollout={"tensor_parallel_size": size}), published_config(name), gpu_bytes=80 * GIB)


def test_engines_are_split_by_heads() -> None:
    message = refusal(config_of(rollout={"tensor_parallel_size": 8}))
    assert message == "rollout.tensor_parallel_size=8: vLLM cannot split 4 attention heads over 8 ranks; lower it"


def test_a_sequence_has_to_fit_the_models_positions() -> None:
    check_engines(config_of({"max_prompt_length": 3000, "max_response_length": 1096}), MODEL, gpu_bytes=None)
    message = refusal(config_of({"max_prompt_length": 3000, "max_response_length": 1097}))
    assert "max_prompt_length 3000 + data.max_response_length 1097 = 4097 tokens" in message
    assert "4096 positions" in message


def test_an_image_has_to_fit_the_prompt() -> None:
    """784 pixels are a token. Text needs a token too, so 299 image tokens fit 300 and 300 do not."""
    check_engines(config_of({**SMALL, "min_pixels": 299 * 784}), MODEL, gpu_bytes=None)
    message = refusal(config_of({**SMALL, "min_pixels": 299 * 784 + 1}))
    assert "data.min_pixels 234417 makes 300 tokens at least of every image" in message
    assert "data.max_prompt_length is 300" in message
    easyr1 = {"preset": "reference"}  # the processor's own limits decide
    check_engines(config_of({**SMALL, "min_pixels": 299 * 784 + 1}, algorithm=easyr1), MODEL, gpu_bytes=None)


def test_a_budget_that_no_image_fits() -> None:
    assert "no multiple of 784" in refusal(config_of({**SMALL, "min_pixels": 785, "max_pixels": 1567}))
    assert "max >= 784" in refusal(config_of({**SMALL, "min_pixels": 100, "max_pixels": 783}))


def test_top_k_is_a_part_of_the_vocabulary() -> None:
    for top_k in (-1, 1, 299):
        check_engines(config_of(rollout={"top_k": top_k}), MODEL, gpu_bytes=None)
    assert "rollout.top_k 300 is more than the 299 tokens" in refusal(config_of(rollout={"top_k": 300}))


def test_vllm_raises_a_lower_temperature() -> None:
    assert SamplingParams(temperature=LEAST_TEMPERATURE).temperature == LEAST_TEMPERATURE
    assert SamplingParams(temperature=LEAST_TEMPERATURE / 2).temperature == LEAST_TEMPERATURE
    assert SamplingParams(temperature=0).temperature == 0


def test_the_cache_on_cpu_holds_a_sequence() -> None:
    """320 tokens are ten blocks, whose bytes vLLM says; it keeps one more (`check_enough_kv_cache_memory`)."""
    block = FullAttentionSpec(block_size=CPU_BLOCK_SIZE, num_kv_heads=2, head_size=16, dtype=torch.float32)
    needed = 11 * block.page_size_bytes * MODEL.text_config.num_hidden_layers
    float32 = {"dtype": "float32"}
    check_engines(config_of(model=float32, rollout={"cpu_kv_cache_gib": needed / GIB}), MODEL, gpu_bytes=None)
    short = config_of(model=float32, rollout={"cpu_kv_cache_gib": (needed - 1) / GIB})
    message = refusal(short)
    assert (
        f"rollout.cpu_kv_cache_gib {(needed - 1) / GIB:g} is too small" in message
        and "= 320 tokens take 0.001 GiB" in message
    )
    check_engines(short.model_copy(update={"model": config_of().model}), MODEL, gpu_bytes=None)  # bfloat16 takes half


def test_the_share_of_a_gpu_holds_weights_and_a_sequence() -> None:
    """8.29 B parameters in 2 bytes are 15.45 GiB; 6144 tokens of 57344 bytes are 0.33 GiB. Together 15.8 of 80."""
    model = published_config("qwen2.5-vl-7b")
    check_engines(config_of({}, rollout={"gpu_memory_utilization": 0.198}), model, gpu_bytes=80 * GIB)
    message = refusal(config_of({}, rollout={"gpu_memory_utilization": 0.197}), model, gpu_bytes=80 * GIB)
    assert "rollout.gpu_memory_utilization 0.197 gives an engine 15.76 of 80.0 GiB" in message
    assert "weights take 15.446 GiB of each GPU" in message and "= 6144 tokens take 0.329 GiB" in message
    split = {"gpu_memory_utilization": 0.1, "tensor_parallel_size": 2}
    check_engines(config_of({}, rollout=split), model, gpu_bytes=80 * GIB)


@pytest.mark.parametrize("recipe", VLLM_FP8)
def test_vllm_knows_the_schemes(recipe: str | None) -> None:
    assert resolve_quantization_config(VLLM_FP8[recipe], {}) is not None


def test_matrices_of_quantised_engines_divide_into_blocks() -> None:
    """The 72B has an MLP of 29568 = 231 x 128; two GPUs would have half a block too much."""
    model = published_config("qwen2.5-vl-72b")
    rollout = {"quantization": "fp8", "gpu_memory_utilization": 0.9, "enforce_eager": True}
    check_engines(config_of(rollout=rollout), model, gpu_bytes=180 * GIB)
    message = refusal(config_of(rollout={**rollout, "tensor_parallel_size": 2}), model, gpu_bytes=180 * GIB)
    assert "scales blocks of 128 values, but the MLP width of a worker is 14784" in message
    for settings in ({"fp8": {"recipe": "tensorwise"}}, {"rollout": {"enforce_eager": None}}):
        sections = {
            "fp8": {},
            **settings,
            "rollout": {**rollout, "tensor_parallel_size": 2, **settings.get("rollout", {})},
        }
        check_engines(config_of(**sections), model, gpu_bytes=180 * GIB)
    narrow = tiny_config(tied=True, vocab=299, hidden_size=48, num_attention_heads=2)
    mxfp8 = config_of(rollout={"quantization": "fp8"}, fp8={"recipe": "mxfp8"})
    assert "scales blocks of 32 values, but the hidden size is 48" in refusal(mxfp8, narrow, gpu_bytes=GIB)


def test_vllm_refuses_inputs_that_do_not_divide() -> None:
    block = FP8_BLOCKS["fp8_per_block"]
    with pytest.raises(AssertionError, match=f"must be divisible by `group_size` {block}"):
        per_token_group_quant_fp8(torch.zeros(2, block + 64), block, dtype=torch.float8_e4m3fn, use_ue8m0=False)
    width = FP8_BLOCKS["mxfp8"] + 16
    method = Mxfp8OnlineLinearMethod.__new__(Mxfp8OnlineLinearMethod)  # the constructor asks for a running engine
    with pytest.raises(ValueError, match=rf"\({width}\) to be divisible by {FP8_BLOCKS['mxfp8']}"):
        method.create_weights(torch.nn.Module(), width, [8], width, 8, torch.bfloat16)


def test_quantised_engines_have_a_layer_to_quantise() -> None:
    rollout = {"quantization": "fp8", "enforce_eager": False}
    check_engines(config_of(rollout=rollout, fp8={"bf16_layers_at_ends": 1}), MODEL, gpu_bytes=GIB)
    message = refusal(config_of(rollout=rollout, fp8={"bf16_layers_at_ends": 2}), gpu_bytes=GIB)
    assert "fp8.bf16_layers_at_ends=2 leaves rollout.quantization none of the 3 layers" in message
