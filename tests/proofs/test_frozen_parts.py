"""Frozen parts have no gradient and no optimizer state, do not change and are not streamed; the rest trains as ever."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_vppo.config.choices import ModelPart
from megatron_vppo.models.options import ModelOptions
from megatron_vppo.parallel.policy import MegatronPolicy
from tests.gloo import run_gloo
from tests.models.tiny import tiny_config, tiny_qwen3_config
from tests.parallel.case import Case
from tests.parallel.policy_rig import (
    OPTIM,
    Outcome,
    hf_gradients,
    make_batch,
    make_policy,
    make_responses,
    saved_models,
)

GRADIENT_TOLERANCE = 1e-4
MODELS = {
    "Qwen2.5-VL": tiny_config(tied=True, vocab=299),
    "Qwen3-VL": tiny_qwen3_config(tied=True, vocab=301, taps=(0, 2)),
}
FROZEN: tuple[frozenset[ModelPart], ...] = (
    frozenset({"vision_tower"}),
    frozenset({"vision_tower", "projector"}),
    frozenset({"projector"}),
    frozenset({"language_model"}),
    frozenset({"language_model", "projector"}),
    frozenset({"language_model", "vision_tower"}),
)
IMAGES = ModelOptions(sequence_parallel=True, vision_split="images")
STAGES = ModelOptions(pipeline_layers=(2, 1))


BOTH, QWEN25, QWEN3 = tuple(MODELS), ("Qwen2.5-VL",), ("Qwen3-VL",)
LAYOUTS = {
    "one rank": (BOTH, Case()),
    "TP 2, sequence parallel": (QWEN25, Case(tensor=2, options=ModelOptions(sequence_parallel=True))),
    "TP 2, sequence parallel, images shared out": (QWEN3, Case(tensor=2, options=IMAGES)),
    "CP 2, recomputed, overlapped": (QWEN3, Case(context=2, options=ModelOptions(recompute="full"), overlap=True)),
    "PP 2": (BOTH, Case(pipeline=2, options=STAGES)),
    "PP 2, recomputed": (QWEN3, Case(pipeline=2, options=dataclasses.replace(STAGES, recompute="full"))),
}
"""Layouts of the three-layer models above, with those that run under them."""
ADAM_BYTES = 12
"""Per trained fp32 parameter: master weights are the parameters themselves, two moments, and the fp32 gradient."""


def part_of(name: str) -> ModelPart:
    """Returns the part that a tensor belongs to, by its Hugging Face name; written without the project's weight map."""
    if "visual." not in name:
        return "language_model"
    return "projector" if ".merger." in name or "deepstack_merger" in name else "vision_tower"


@dataclasses.dataclass(frozen=True)
class Found:
    gradients: dict[str, Tensor]
    streamed: set[str]
    """Names."""
    all_names: set[str]
    kept: frozenset[str]
    changed: set[str]
    state_bytes: int
    """Gradient buffers and optimizer state of this rank."""
    trained_values: int
    """The number of values in this rank's trained parameters."""


def _find(policy: MegatronPolicy) -> Found:
    before = {name: tensor.clone() for name, tensor in policy.hf_weights()}
    policy.accumulate_gradients(make_batch(make_responses(), "nll"))
    gradients = hf_gradients(policy)
    policy.trainable.step()
    after = {name: tensor.clone() for name, tensor in policy.hf_weights()}
    parameters = [p for stage in policy.trainable.stages for p in stage.parameters()]
    trained = [p for p in parameters if p.requires_grad]
    assert all(p.grad is None and not hasattr(p, "main_grad") for p in parameters if not p.requires_grad)
    return Found(
        gradients=gradients,
        streamed={name for name, _ in policy.hf_weights(only_trained=True)},
        all_names=set(before),
        kept=policy.frozen_hf_names,
        changed={name for name in before if not torch.equal(before[name], after[name])},
        state_bytes=_gradient_bytes(policy) + _optimizer_bytes(policy),
        trained_values=sum(p.numel() for p in trained),
    )


def _gradient_bytes(policy: MegatronPolicy) -> int:
    return sum(buffer.grad_data.nbytes for ddp in policy.trainable.ddps for buffer in ddp.buffers)


def _optimizer_bytes(policy: MegatronPolicy) -> int:
    parts = getattr(policy.trainable.optimizer, "chained_optimizers", [policy.trainable.optimizer])
    states = [state for part in parts if part.optimizer is not None for state in part.optimizer.state.values()]
    return sum(value.nbytes for state in states for value in state.values() if torch.is_tensor(value) and value.dim())


Results = dict[tuple[str, str, frozenset[ModelPart]], Found]
"""By layout, model and what is frozen."""


def _rank(rank: int, world: int, layouts: list[str], folders: dict[str, Path]) -> Results:
    found = {}
    for name in layouts:
        models, case = LAYOUTS[name]
        optim = dataclasses.replace(
            OPTIM, use_distributed_optimizer=False, weight_decay=0.0, overlap_grad_reduce=case.overlap
        )
        layout = case.open()
        for model in models:
            for frozen in FROZEN:
                options = dataclasses.replace(case.options, frozen=frozen)
                policy = make_policy(folders[model], layout, rows=1, optim=optim, options=options)
                found[name, model, frozen] = _find(policy)
        parallel_state.destroy_model_parallel()
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Outcome]]:
    return saved_models(MODELS, tmp_path_factory.mktemp("models"), entropy_kind="nll")


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.extended)])
def test_frozen_parts(ranks: int, models: dict[str, tuple[Path, Outcome]]) -> None:
    layouts = [name for name, (_, case) in LAYOUTS.items() if case.ranks == ranks]
    folders = {name: folder for name, (folder, _) in models.items()}
    for found in run_gloo(_rank, ranks, layouts, folders, timeout_seconds=600):
        assert found.keys() == {(name, m, frozen) for name in layouts for m in LAYOUTS[name][0] for frozen in FROZEN}
        for (name, model, frozen), state in found.items():
            where = f"{name}, {model}, without {sorted(frozen)}"
            expected = models[model][1].gradients
            assert state.all_names == expected.keys(), where
            trained = {n for n in expected if part_of(n) not in frozen}
            assert state.streamed == trained, where
            assert state.kept == expected.keys() - trained, where
            assert state.changed == trained, where
            # Buffers are padded by less than a hundred values.
            assert 0 <= state.state_bytes - ADAM_BYTES * state.trained_values < 400 * LAYOUTS[name][1].pipeline, where
            for tensor_name, gradient in state.gradients.items():
                right = expected[tensor_name]
                if tensor_name not in trained:
                    assert not gradient.any(), f"{where}: {tensor_name} has a gradient"
                    continue
                off = float((gradient - right).norm() / right.norm())
                assert off < GRADIENT_TOLERANCE, f"{where}: gradient of {tensor_name} off by {off:.1e} of its norm"
