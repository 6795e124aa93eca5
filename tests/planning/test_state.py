"""Weights, gradients and optimizer state: the formulas against the bytes of Megatron's own buffers, rank by rank."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vppo.config.choices import ModelPart
from megatron_vppo.models.build import build_model
from megatron_vppo.models.families import family_of, weight_map
from megatron_vppo.models.options import ModelOptions
from megatron_vppo.parallel.layout import Layout, init_layout
from megatron_vppo.parallel.lr_schedule import LrSchedule
from megatron_vppo.parallel.training import OptimSettings, make_trainable
from megatron_vppo.planning.sizes import stage_values
from megatron_vppo.planning.state import StateBytes, engine_weight_bytes, state_bytes
from megatron_vppo.weights.entries import parameter_count
from tests.gloo import run_gloo
from tests.models.tiny import tiny_config, tiny_qwen3_config


@dataclass(frozen=True)
class Case:
    family: str
    tied: bool
    dtype: torch.dtype
    distributed: bool
    frozen: frozenset[ModelPart] = frozenset()


CASES = [
    *(
        Case(family, tied, dtype, distributed)
        for family, tied, dtype, distributed in product(
            ("qwen2_5_vl", "qwen3_vl"), (True, False), (torch.bfloat16, torch.float32), (True, False)
        )
    ),
    Case("qwen2_5_vl", True, torch.bfloat16, True, frozen=frozenset({"vision_tower"})),
    Case("qwen3_vl", False, torch.float32, False, frozen=frozenset({"language_model", "projector"})),
]


def config_of(case: Case) -> Any:
    # 299 rows: neither a multiple of the tensor-parallel size nor of any alignment.
    if case.family == "qwen2_5_vl":
        return tiny_config(tied=case.tied, vocab=299, num_hidden_layers=4)
    return tiny_qwen3_config(tied=case.tied, vocab=299, taps=(0, 2), num_hidden_layers=4)


@dataclass(frozen=True)
class RankState:
    measured: StateBytes
    formula: StateBytes
    replica_group: tuple[int, int]
    trained: int


def measure_ranks(rank: int, world_size: int, tensor: int, pipeline: int) -> list[RankState]:
    layout = init_layout(tensor=tensor, pipeline=pipeline, timeout_seconds=60)
    return [_measure(case, layout) for case in CASES]


def _measure(case: Case, layout: Layout) -> RankState:
    config = config_of(case)
    model = build_model(
        config,
        groups=layout.groups,
        vision_groups=layout.vision_groups,
        dtype=case.dtype,
        device=layout.device,
        options=ModelOptions(frozen=case.frozen),
    )
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    trainable = make_trainable(
        [model],
        layout=layout,
        settings=OptimSettings(
            lr=LrSchedule(kind="constant", peak=1e-3, warmup_steps=0, total_steps=1, min_ratio=0.0),
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=0.0,
            max_grad_norm=1.0,
            use_distributed_optimizer=case.distributed,
            overlap_grad_reduce=True,
        ),
        dtype=case.dtype,
        frozen=case.frozen,
    )
    trainable.zero_gradients()
    trainable.step()  # the moments are made in the first step
    weights = _storages(model.parameters())
    inner = getattr(trainable.optimizer, "chained_optimizers", [trainable.optimizer])
    states = [optimizer.optimizer for optimizer in inner]
    kept = [p for state in states for group in state.param_groups for p in group["params"]]
    kept += [t for state in states for values in state.state.values() for t in values.values() if t.dim() > 0]
    measured = StateBytes(
        weights=sum(weights.values()),
        gradients=sum(_storages(buffer.grad_data for ddp in trainable.ddps for buffer in ddp.buffers).values()),
        optimizer=sum(size for key, size in _storages(kept).items() if key not in weights),
    )
    values = stage_values(
        model.weight_map,
        stage_layers=model.stage_layers,
        stage=layout.pipeline_rank,
        tensor=layout.tensor,
        frozen=case.frozen,
    )
    formula = state_bytes(values, dtype_bytes=case.dtype.itemsize, replicas=layout.data, distributed=case.distributed)
    return RankState(measured, formula, (layout.pipeline_rank, layout.tensor_rank), sum(map(sum, values.buckets)))


def _storages(tensors: Any) -> dict[int, int]:
    """Bytes by address; what several tensors share counts once."""
    found: dict[int, int] = {}
    for tensor in tensors:
        assert isinstance(tensor, Tensor)
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return found


@pytest.mark.distributed
@pytest.mark.parametrize(("tensor", "pipeline", "data"), [(2, 1, 2), (1, 2, 2)])
def test_state_equals_megatrons_buffers(tensor: int, pipeline: int, data: int) -> None:
    by_rank = run_gloo(measure_ranks, tensor * pipeline * data, tensor, pipeline)
    for number, case in enumerate(CASES):
        states = [rank[number] for rank in by_rank]
        per_value = 12 if case.dtype == torch.bfloat16 else 8
        for state in states:
            assert (state.measured.weights, state.measured.gradients) == (
                state.formula.weights,
                state.formula.gradients,
            ), case
            if not case.distributed:
                assert state.measured.optimizer == state.formula.optimizer == per_value * state.trained, case
            assert state.measured.optimizer <= state.formula.optimizer, case
        if case.distributed:
            for group in {state.replica_group for state in states}:
                replicas = [state for state in states if state.replica_group == group]
                assert len(replicas) == data
                total = sum(state.measured.optimizer for state in replicas)
                assert total == per_value * replicas[0].trained, "the shards make one whole optimizer state"
                padding = replicas[0].formula.gradients // 4 - replicas[0].trained
                assert sum(state.formula.optimizer for state in replicas) == total + per_value * padding


def test_numbers_by_hand() -> None:
    config = tiny_config(tied=False, vocab=300)
    entries = weight_map(config, family=family_of(config))
    values = stage_values(entries, stage_layers=(1, 2), stage=1, tensor=2)
    # Two layers: norms, QKV of 2 + 2 x 1 heads of 16 with biases, output, gate and up and down of 48; norm; 150 rows.
    layer = (64, 64 * 64, 64, 32 * 64, 64, 96 * 64, 64 * 48)
    assert sorted(values.buckets[0]) == sorted((*layer, *layer, 64, 150 * 64))
    assert values.frozen == 0
    plain = state_bytes(values, dtype_bytes=2, replicas=3, distributed=False)
    assert plain == StateBytes(*(n * (2 * sum(layer) + 64 + 9600) for n in (2, 4, 12)))
    # All sizes are multiples of 64; the buffer is padded to one of 3 x 128.
    buffer = -(-(2 * sum(layer) + 64 + 9600) // 384) * 384
    split = state_bytes(values, dtype_bytes=2, replicas=3, distributed=True)
    assert split == StateBytes(2 * buffer, 4 * buffer, 12 * buffer // 3)
    assert parameter_count(entries) > sum(values.buckets[0])


def test_engine_weights_by_hand() -> None:
    assert engine_weight_bytes(7_000_001, tensor=2, dtype_bytes=2) == 7_000_002
