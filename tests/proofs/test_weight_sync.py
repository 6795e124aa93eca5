"""Weights from every trainer layout into a real vLLM engine: afterwards it computes with the very bits that it would
have read from an export of the same weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor
from transformers import AutoConfig

from megatron_vppo.models.build import build_model
from megatron_vppo.models.options import ModelOptions
from megatron_vppo.models.qwen_vl import QwenVLModel
from megatron_vppo.parallel.layout import init_layout
from megatron_vppo.rollout.engine import RolloutEngine
from megatron_vppo.weights.load_hf import load_hf_weights
from megatron_vppo.weights.stream import hf_weights, save_hf
from tests.gloo import run_gloo
from tests.rollout.rig import START_SECONDS
from tests.rollout.settings import engine_settings
from tests.rollout.tiny_model import save_model_folder, save_qwen3_folder

RANKS = 4
LAYOUTS = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 2))
"""Tensor, pipeline and context size; the rest of the ranks are data-parallel."""
FAMILIES = {"Qwen2.5-VL": (save_model_folder, (1, 1)), "Qwen3-VL": (save_qwen3_folder, (2, 1))}
"""The function that saves a model, and the layers of its two pipeline stages."""


def _stage(folder: Path, layout: tuple[int, int, int], pipeline_layers: tuple[int, ...]) -> QwenVLModel:
    tensor, pipeline, context = layout
    ranks = init_layout(tensor=tensor, pipeline=pipeline, context=context, timeout_seconds=START_SECONDS)
    stage = build_model(
        AutoConfig.from_pretrained(folder),
        groups=ranks.groups,
        vision_groups=ranks.vision_groups,
        dtype=torch.float32,
        device=ranks.device,
        options=ModelOptions(pipeline_layers=pipeline_layers if pipeline == 2 else None),
    )
    load_hf_weights(stage, folder)
    return stage


def _rank(
    rank: int, world: int, folder: Path, export: Path, pipeline_layers: tuple[int, ...], engine_ranks: int
) -> list[str]:
    """Lists what is wrong, on rank 0, which leads the engine."""
    stage = _stage(folder, (2, 2, 1), pipeline_layers)
    save_hf(hf_weights([stage]), export, source=folder, is_writer=rank == 0)
    parallel_state.destroy_model_parallel()
    engine = _engine(export, engine_ranks) if rank == 0 else None
    problems = []
    read = engine.live_digests() if engine else []
    for layout in LAYOUTS:
        stage = _stage(folder, layout, pipeline_layers)
        for other in (True, False):  # other weights in between, or a load that does nothing would pass
            stream: Iterator[tuple[str, Tensor]] = hf_weights([stage])
            if other:
                stream = ((name, -tensor) for name, tensor in stream)
            if engine is None:
                for _ in stream:
                    pass
                continue
            report = engine.send_weights(stream, version=1, verify=True)
            now = engine.live_digests()
            same = sum(
                now[worker][key] == digest for worker in range(engine_ranks) for key, digest in read[worker].items()
            )
            expected = 0 if other else sum(len(worker) for worker in read)
            if not report.checksums_ok or same != expected:
                problems.append(f"{layout}, negated {other}: {same} of {expected} digests are those of the export")
        parallel_state.destroy_model_parallel()
    if engine is not None:
        engine.close()
    return problems


def _engine(folder: Path, ranks: int) -> RolloutEngine:
    settings = engine_settings(
        model=str(folder),
        max_model_len=128,
        dtype="float32",
        tensor_parallel_size=ranks,
        max_num_seqs=16,
        cpu_kv_cache_gib=0.125,
        load_format="auto",
    )
    engine = RolloutEngine(settings, log_path=folder.parent / "engine.log", buffer_bytes=30_000)
    engine.wait_ready(timeout_seconds=START_SECONDS)
    return engine


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("family", "engine_ranks"),
    [
        pytest.param("Qwen2.5-VL", 1, marks=pytest.mark.extended),
        ("Qwen3-VL", 1),
        pytest.param("Qwen2.5-VL", 2, marks=pytest.mark.extended),
        pytest.param("Qwen3-VL", 2, marks=pytest.mark.extended),
    ],
)
def test_an_engine_has_the_bits_of_an_export(family: str, engine_ranks: int, tmp_path: Path) -> None:
    save, pipeline_layers = FAMILIES[family]
    folder = save(tmp_path / "model", tied=engine_ranks == 1)
    export = tmp_path / "export"
    results = run_gloo(_rank, RANKS, folder, export, pipeline_layers, engine_ranks, timeout_seconds=2 * START_SECONDS)
    assert results[0] == []
