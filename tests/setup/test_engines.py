"""The settings that an engine gets. Its GPUs: test_places.py. Engines themselves: tests/rollout."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from vllm.config.quantization import resolve_quantization_config
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig

from megatron_vppo.config.schema import Fp8Config, RunConfig
from megatron_vppo.rollout.child import engine_environment
from megatron_vppo.setup.engines import (
    VLLM_FP8,
    engines_on_gpus,
    engines_sleep,
    unquantized_layers,
    weight_transfer,
)
from tests.rollout.settings import engine_settings


def test_the_engine_process_sees_only_its_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    settings = engine_settings(max_model_len=8, device="cuda", cuda_visible_devices="2,3")
    assert engine_environment(settings, folder=Path("/tmp/vppo-engine-1"))["CUDA_VISIBLE_DEVICES"] == "2,3"
    unset = engine_settings(max_model_len=8, device="cuda")
    assert engine_environment(unset, folder=Path("/tmp/vppo-engine-1"))["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"


def config_of(**sections: dict[str, object]) -> RunConfig:
    return RunConfig.model_validate({"data": {"train_files": "x"}, "model": {"path": "y"}, **sections})


def test_engines_share_gpus_and_nothing_on_cpu() -> None:
    default, forced = config_of(), config_of(rollout={"free_cache_engine": False, "weight_transfer": "shm"})
    assert [engines_sleep(default, on_cpu=on_cpu) for on_cpu in (True, False)] == [False, True]
    assert [weight_transfer(default, on_cpu=on_cpu) for on_cpu in (True, False)] == ["shm", "ipc"]
    assert not engines_sleep(forced, on_cpu=False) and weight_transfer(forced, on_cpu=False) == "shm"


def test_the_engines_of_a_run_are_told_at_its_start() -> None:
    """384 prompts of 8 responses on 8 GPUs; the 1,024 that are at once are more than the 768 of an engine of two."""
    assert engines_on_gpus(config_of(rollout={"tensor_parallel_size": 2}), count=4) == (
        "engines: 4 on 2 GPUs each, 0.5 of the memory (rollout.gpu_memory_utilization), with CUDA graphs, up to 1024 "
        "responses at once; a step trains on 768 of each"
    )
    small = config_of(rollout={"enforce_eager": True, "max_num_seqs": 3, "gpu_memory_utilization": 0.75})
    assert engines_on_gpus(small, count=8) == (
        "engines: 8 on 1 GPU each, 0.75 of the memory (rollout.gpu_memory_utilization), without CUDA graphs, up to 3 "
        "responses at once; a step trains on 384 of each"
    )


@pytest.mark.parametrize("recipe", [*get_args(get_args(Fp8Config.model_fields["recipe"].annotation)[0]), None])
def test_vllm_quantises_the_layers_that_the_trainer_does(recipe: str | None) -> None:
    """By vLLM's own matching: language layers but those at the ends, and nothing of the vision tower."""
    config = config_of(fp8={"recipe": recipe, "bf16_layers_at_ends": 1})
    ignore = list(unquantized_layers(config, language_layers=12))
    arguments = resolve_quantization_config(VLLM_FP8[config.fp8.recipe], {"ignore": ignore})
    assert arguments is not None
    quantization = OnlineQuantizationConfig(arguments)
    language, vision = "language_model.model.layers", "visual.blocks"
    layers = {
        f"{language}.{number}.self_attn.{name}": kind
        for number in range(12)
        for name, kind in (("qkv_proj", QKVParallelLinear), ("o_proj", RowParallelLinear))
    } | {f"{vision}.3.attn.qkv": QKVParallelLinear, "visual.merger.mlp.2": RowParallelLinear}
    methods = {name: quantization.resolve_quant_method_cls(kind, name) for name, kind in layers.items()}
    quantised = {name for name, method in methods.items() if method is not None}
    assert quantised == {n for n in layers if n.startswith(language) and ".0." not in n and ".11." not in n}
    method = methods[f"{language}.5.self_attn.o_proj"]
    assert method is not None
    scaled_alike = {None: "Block", "blockwise": "Block", "tensorwise": "Tensor", "delayed": "Tensor", "mxfp8": "Mxfp8"}
    assert scaled_alike[recipe] in method[-1].__name__
