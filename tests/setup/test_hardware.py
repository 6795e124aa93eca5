"""Refusals on a machine that cannot do what is set. What a GPU can do, TransformerEngine is asked on a GPU."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_vppo.config.schema import RunConfig
from megatron_vppo.models.layers import te_support
from megatron_vppo.models.options import Fp8Options
from megatron_vppo.setup import hardware
from megatron_vppo.setup.hardware import (
    check_dtype,
    check_fp8_hardware,
    check_host_memory,
    choose_backend,
    fp8_options,
    groups_cut,
    model_options,
    prompts_apart,
    slower_without,
)


def config_with(**sections: Any) -> RunConfig:
    return RunConfig.model_validate({"data": {"train_files": "a.parquet"}, "model": {"path": "m"}, **sections})


def with_transformer_engine(monkeypatch: pytest.MonkeyPatch, present: bool) -> None:
    for module in (hardware, te_support):
        monkeypatch.setattr(module, "has_transformer_engine", lambda: present)


@pytest.mark.parametrize(
    ("setting", "on_gpu", "installed", "backend"),
    [
        ("auto", False, False, "torch"),
        ("auto", False, True, "torch"),
        ("auto", True, False, "torch"),
        ("auto", True, True, "te"),
        ("torch", True, True, "torch"),
        ("te", True, True, "te"),
    ],
)
def test_backend(setting: Any, on_gpu: bool, installed: bool, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_transformer_engine(monkeypatch, installed)
    assert choose_backend(setting, on_gpu=on_gpu, dtype="bfloat16") == backend


def test_transformer_engine_is_not_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    with_transformer_engine(monkeypatch, True)
    with pytest.raises(ValueError, match="NVIDIA GPUs alone, and none is seen"):
        choose_backend("te", on_gpu=False, dtype="bfloat16")
    with_transformer_engine(monkeypatch, False)
    with pytest.raises(ValueError, match=r"install transformer-engine\[pytorch\]"):
        choose_backend("te", on_gpu=True, dtype="bfloat16")


def test_float32_runs_on_layers_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    with_transformer_engine(monkeypatch, True)
    assert choose_backend("auto", on_gpu=True, dtype="float32") == "torch"
    with pytest.raises(ValueError, match="bfloat16, not float32; set 'auto'"):
        choose_backend("te", on_gpu=True, dtype="float32")


def test_fp8_without_a_gpu_names_the_emulation() -> None:
    config = config_with(fp8={"recipe": "blockwise"})
    with pytest.raises(ValueError, match=r"needs an NVIDIA GPU \(Hopper.*vppo fp8-fidelity"):
        model_options(config, on_gpu=False)


def test_fp8_wants_transformer_engine_and_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    with_transformer_engine(monkeypatch, False)
    with pytest.raises(ValueError, match="needs TransformerEngine, which is not installed"):
        check_fp8_hardware(config_with(fp8={"recipe": "tensorwise"}), on_gpu=True)
    monkeypatch.setattr(hardware, "recipe_refusal", lambda recipe, on_gpu: None)
    with pytest.raises(ValueError, match=r"leave model.backend at 'auto'"):
        check_fp8_hardware(config_with(fp8={"recipe": "tensorwise"}), on_gpu=True)
    with_transformer_engine(monkeypatch, True)
    single = config_with(fp8={"recipe": "tensorwise"}, model={"path": "m", "dtype": "float32"})
    with pytest.raises(ValueError, match="bfloat16, not float32"):
        check_fp8_hardware(single, on_gpu=True)


def test_bfloat16_needs_a_chip_that_has_it() -> None:
    """vLLM's own bound (`CudaPlatform.check_if_supports_dtype`)."""
    config = config_with()
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0)):
        check_dtype(config, capability=capability)
    with pytest.raises(ValueError, match=r"compute capability 8\.0 \(A100\) or later, and these have 7\.5; set"):
        check_dtype(config, capability=(7, 5))
    check_dtype(config_with(model={"path": "m", "dtype": "float32"}), capability=(7, 0))


def test_a_machine_without_memory_for_the_ranks_and_caches() -> None:
    config = config_with(rollout={"cpu_kv_cache_gib": 1.5, "tensor_parallel_size": 2})
    check_host_memory(config, ranks=4, engines=1, total_bytes=4 * 2**30)  # 4 x 0.25 + 2 x 1.5
    with pytest.raises(ValueError, match=r"5 trainer ranks .* 2 engine workers .* need 4\.2 GiB, .* has 4\.0 GiB"):
        check_host_memory(config, ranks=5, engines=1, total_bytes=4 * 2**30)
    with pytest.raises(ValueError, match=r"4 engine workers .* need 7\.0 GiB"):
        check_host_memory(config, ranks=4, engines=2, total_bytes=4 * 2**30)


def test_fp8_that_no_phase_uses_is_none() -> None:
    assert fp8_options(config_with()) is None
    assert fp8_options(config_with(fp8={"recipe": "delayed", "scope": []})) is None
    found = fp8_options(config_with(fp8={"recipe": "mxfp8", "bf16_layers_at_ends": 1, "scope": ["scoring"]}))
    assert found == Fp8Options("mxfp8", bf16_layers_at_ends=1)


def test_prompts_are_read_apart_under_context_parallelism() -> None:
    note = prompts_apart(config_with(parallel={"context_parallel_size": 2}))
    assert note is not None and note.startswith("parallel.context_parallel_size=2: ")
    for parallel in ({}, {"context_parallel_size": 2, "shared_prefix": False}):
        assert prompts_apart(config_with(parallel=parallel)) is None


def test_groups_that_are_cut() -> None:
    note = groups_cut(config_with(rollout={"n": 8}))
    assert note is not None and note.startswith("actor.micro_batch_size_per_device_for_update=4: cuts groups of ")
    both = {"micro_batch_size_per_device_for_update": 6, "micro_batch_size_per_device_for_experience": 6}
    note = groups_cut(config_with(actor=both))
    assert note is not None and "update=6 and actor.micro_batch_size_per_device_for_experience=6: " in note
    for sections in (
        {"actor": {"micro_batch_size_per_device_for_update": 12}},
        {"rollout": {"n": 4}},
        {"actor": {"max_tokens_per_micro_batch": 9000}},
        {"parallel": {"shared_prefix": False}},
        {"parallel": {"context_parallel_size": 2}},
    ):
        assert groups_cut(config_with(**sections)) is None


def test_what_is_slower() -> None:
    assert slower_without("te") == []
    assert any("FP8" in line for line in slower_without("torch"))
    assert any("Apex" in line for line in slower_without("torch")), "which is not installed here"
