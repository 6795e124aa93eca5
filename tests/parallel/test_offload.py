"""Offload and reload of a real Megatron model and optimizer: memory is given back, and nothing else changes, not a bit.

On CPU "the device" is host memory too; what is under test is that storages really are released, that every view is the
same view afterwards, and that training goes on as if nothing had happened. Real device memory: tests/gpu.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_vppo.models.options import ModelOptions
from megatron_vppo.parallel.checkpoint import save_checkpoint
from megatron_vppo.parallel.layout import init_layout
from megatron_vppo.parallel.offload import TrainerMemory, optimizer_tensors, storages_of, weight_tensors
from megatron_vppo.parallel.policy import MegatronPolicy
from megatron_vppo.parallel.training import Trainable
from tests.gloo import run_gloo
from tests.models.tiny import save_tiny_model, tiny_config
from tests.parallel.policy_rig import RESUMED_OPTIM, STEP, make_batch, make_policy, make_responses

ALL = ("params", "grads", "optimizer")


def _gradient_tensors(trainable: Trainable) -> list[Tensor]:
    return [buffer.grad_data for ddp in trainable.ddps for buffer in ddp.buffers]


def _held(policy: MegatronPolicy) -> dict[str, int]:
    """Bytes behind each kind of tensors."""
    trainable = policy.trainable
    tensors = {
        "params": [t for stage in trainable.stages for t in (*stage.parameters(), *stage.buffers())],
        "grads": _gradient_tensors(trainable),
        "optimizer": list(optimizer_tensors(trainable)),
    }
    return {kind: sum(storage.nbytes() for storage in storages_of(each)) for kind, each in tensors.items()}


def _views(policy: MegatronPolicy) -> list[tuple[int, ...]]:
    """Lists the storage of each tensor, as the number of the first tensor that has the same, and the place in it."""
    trainable = policy.trainable
    parameters = list(weight_tensors(trainable))
    shards = [p for g in trainable.optimizer.param_groups for p in g["params"]]
    buffers = [b.param_data for ddp in trainable.ddps for b in ddp.buffers if b.param_data is not None]
    main_grads = [p.main_grad for p in parameters if isinstance(p, torch.nn.Parameter) and p.requires_grad]
    tensors = [*parameters, *buffers, *shards, *_gradient_tensors(trainable), *main_grads]
    first: dict[int, int] = {}
    return [
        (first.setdefault(t.untyped_storage().data_ptr(), number), t.storage_offset(), *t.shape, *t.stride())
        for number, t in enumerate(tensors)
    ]


def _state(policy: MegatronPolicy) -> list[Tensor]:
    exported = [tensor.clone() for _, tensor in policy.hf_weights()]
    return exported + [tensor.clone() for tensor in optimizer_tensors(policy.trainable)]


def _rank(
    rank: int, world: int, folder: Path, scratch: Path, dtype: torch.dtype, distributed: bool, options: ModelOptions
) -> None:
    layout = init_layout(tensor=1, pipeline=2 if options.pipeline_layers else 1, timeout_seconds=300)
    optim = dataclasses.replace(RESUMED_OPTIM, use_distributed_optimizer=distributed, overlap_grad_reduce=distributed)
    still, moved = (make_policy(folder, layout, rows=2, optim=optim, dtype=dtype, options=options) for _ in range(2))
    responses = make_responses()
    batch = make_batch(responses, "nll")
    for policy in (still, moved):
        policy.update(batch)  # so that there are moments

    memory = TrainerMemory(moved.trainable)
    before, views = _held(moved), _views(moved)
    trained = [kind for kind, size in before.items() if size]
    assert trained == (list(ALL) if moved.trainable.trains_here else ["params"])
    assert sum(before.values()) == sum(_held(still).values())
    for _ in range(2):  # the second time into host memory of the first
        memory.offload(("grads", "optimizer"))
        assert _held(moved) == {"params": before["params"], "grads": 0, "optimizer": 0}
        memory.offload(("params",))
        assert _held(moved) == dict.fromkeys(ALL, 0)
        with pytest.raises(RuntimeError, match=r"export: the trainer's weights .* are offloaded"):
            next(moved.hf_weights())
        with pytest.raises(RuntimeError, match=r"checkpoint: the trainer's weights .* are offloaded"):
            save_checkpoint(scratch, step=1, trainable=moved.trainable, layout=layout, state={}, keep=1)
        with pytest.raises(RuntimeError, match="params, grads, optimizer of the trainer: away already"):
            memory.offload(ALL)

        # As in a step: weights alone for scoring, all of it for the update.
        memory.reload(("params",))
        assert _held(moved) == {"params": before["params"], "grads": 0, "optimizer": 0}
        scores = [policy.score(responses, step=STEP, views="both") for policy in (still, moved)]
        assert torch.equal(scores[0].old_logp_BT, scores[1].old_logp_BT)
        assert torch.equal(scores[0].perturbed_logp_BT, scores[1].perturbed_logp_BT)
        memory.reload(("grads", "optimizer"))
        assert _held(moved) == before
        assert _views(moved) == views
        with pytest.raises(RuntimeError, match="grads of the trainer: on the device already"):
            memory.reload(("grads",))
        norms = [policy.update(batch)["actor/grad_norm"] for policy in (still, moved)]
        assert norms[0] == norms[1] > 0
        states = [_state(policy) for policy in (still, moved)]
        assert len(states[0]) == len(states[1])
        assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    save_tiny_model(path, tiny_config(tied=True, vocab=299))
    return path


@pytest.mark.distributed
def test_a_stage_that_trains_nothing(folder: Path, tmp_path: Path) -> None:
    options = ModelOptions(frozen=frozenset({"language_model"}), pipeline_layers=(1, 2))
    run_gloo(_rank, 2, folder, tmp_path, torch.bfloat16, True, options, timeout_seconds=300)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "dtype", "distributed", "frozen"),
    [
        (2, torch.bfloat16, True, ()),
        (1, torch.float32, False, ("vision_tower",)),
        (2, torch.float32, True, ("vision_tower",)),
        (2, torch.bfloat16, False, ()),
        pytest.param(1, torch.bfloat16, True, ("vision_tower",), marks=pytest.mark.extended),
        pytest.param(1, torch.bfloat16, False, (), marks=pytest.mark.extended),
        pytest.param(1, torch.float32, True, (), marks=pytest.mark.extended),
        pytest.param(2, torch.float32, False, (), marks=pytest.mark.extended),
    ],
)
def test_training_goes_on_bit_by_bit(
    ranks: int, dtype: torch.dtype, distributed: bool, frozen: tuple[str, ...], folder: Path, tmp_path: Path
) -> None:
    options = ModelOptions(frozen=frozenset(frozen))
    run_gloo(_rank, ranks, folder, tmp_path, dtype, distributed, options, timeout_seconds=300)
