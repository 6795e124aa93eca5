"""The engines of an evaluation: which devices, which limits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_vppo.evaluation.engines import check_engines, engine_places, eval_sampling, weights_dtype
from megatron_vppo.evaluation.settings import EvalConfig, load_suite
from megatron_vppo.setup.places import Place
from tests.evaluation.suites import SETTINGS
from tests.models.tiny import tiny_config

CPU = Place("host", 0, gpu_ids=(), uuids=(), cores=(0, 1), host_cores=2, allotted_gpus=0)
GPUS = replace(CPU, gpu_ids=("3", "4", "6", "7"), uuids=("a", "b", "c", "d"))


def config_of(folder: Path, **rollout: Any) -> EvalConfig:
    benchmarks = [{"name": "a", "source": "rows", "path": "a.jsonl"}]
    content = {**SETTINGS, "rollout": {**SETTINGS["rollout"], **rollout}, "benchmarks": benchmarks}
    (folder / "suite.yaml").write_text(yaml.safe_dump(content))
    return load_suite(folder / "suite.yaml")


@pytest.mark.parametrize(
    ("place", "rollout", "expected"),
    [
        (CPU, {}, [None]),
        (CPU, {"num_engines": 2}, [None, None]),
        (GPUS, {}, ["3", "4", "6", "7"]),
        (GPUS, {"tensor_parallel_size": 2}, ["3,4", "6,7"]),
        (GPUS, {"tensor_parallel_size": 3}, ["3,4,6"]),
        (GPUS, {"num_engines": 1}, ["3"]),
    ],
)
def test_the_devices_of_engines(tmp_path: Path, place: Place, rollout: dict[str, int], expected: list[Any]) -> None:
    assert engine_places(config_of(tmp_path, **rollout), place) == expected


@pytest.mark.parametrize("rollout", [{"num_engines": 5}, {"tensor_parallel_size": 5}])
def test_more_gpus_than_there_are(tmp_path: Path, rollout: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="needs 5 GPUs, and 4 are seen"):
        engine_places(config_of(tmp_path, **rollout), GPUS)


def test_what_no_engine_can_do_is_refused(tmp_path: Path) -> None:
    model = tiny_config(tied=True, vocab=299, max_position_embeddings=128)
    check_engines(config_of(tmp_path), model, on_gpu=False)
    with pytest.raises(ValueError, match="128 tokens, but the model has 127 positions"):
        check_engines(config_of(tmp_path), tiny_config(tied=True, vocab=299, max_position_embeddings=127), on_gpu=False)
    with pytest.raises(ValueError, match=r"rollout\.top_k 300 is more than the 299 tokens"):
        check_engines(config_of(tmp_path, top_k=300), model, on_gpu=False)
    with pytest.raises(ValueError, match=r"rollout\.cpu_kv_cache_gib 1e-05 is too small"):
        check_engines(config_of(tmp_path, cpu_kv_cache_gib=1e-5), model, on_gpu=False)


def test_sampling_is_what_the_settings_say(tmp_path: Path) -> None:
    sampling = eval_sampling(config_of(tmp_path, temperature=0.5, top_p=0.9, top_k=7), (1, 2))
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    assert (sampling.max_tokens, sampling.stop_token_ids, sampling.keeps_unfinished) == (8, (1, 2), False)


def test_the_number_format_is_the_models_own_unless_it_is_set(tmp_path: Path) -> None:
    config, model = config_of(tmp_path), tiny_config(tied=True, vocab=299)
    for dtype, expected in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16"), (torch.float16, "bfloat16")):
        model.dtype = dtype
        assert weights_dtype(config, model) == expected
    values = {**config.model_dump(), "model": {"dtype": "float32"}}
    assert weights_dtype(EvalConfig.model_validate(values), model) == "float32"
