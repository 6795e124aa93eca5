"""Offload gives CUDA memory back, and training goes on bit by bit. See tests/parallel/test_offload.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_vppo.models.options import ModelOptions
from megatron_vppo.parallel.layout import Layout, destroy_layout, init_layout
from megatron_vppo.parallel.offload import TrainerMemory, optimizer_tensors, storages_of, weight_tensors
from megatron_vppo.parallel.policy import MegatronPolicy
from megatron_vppo.setup.hardware import choose_backend
from tests.gpu.rig import gpu_configs
from tests.models.tiny import save_tiny_model
from tests.parallel.policy_rig import RESUMED_OPTIM, make_batch, make_policy, make_responses

pytestmark = pytest.mark.gpu
ALL = ("params", "grads", "optimizer")


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes two equal updates equal bit by bit. Fused attention adds up the gradients of its keys in any order: that of
    TransformerEngine can do otherwise, and in place of torch's, float32 takes plain products.
    """
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.fixture
def layout() -> Iterator[Layout]:
    yield init_layout(tensor=1, pipeline=1, timeout_seconds=300)
    destroy_layout()


def _bytes(policy: MegatronPolicy) -> int:
    trainable = policy.trainable
    gradients = (buffer.grad_data for ddp in trainable.ddps for buffer in ddp.buffers)
    return sum(
        storage.nbytes()
        for tensors in (weight_tensors(trainable), optimizer_tensors(trainable), gradients)
        for storage in storages_of(tensors)
    )


def requested_bytes() -> int:
    """Counts the bytes of tensors. The blocks that the allocator gives them may be larger, by up to a MiB."""
    return torch.cuda.memory_stats()["requested_bytes.all.current"]


def differing(one: MegatronPolicy, other: MegatronPolicy) -> list[tuple[str, float]]:
    """Lists the weights that differ in any bit, with their largest difference."""
    pairs = zip(one.hf_weights(), other.hf_weights(), strict=True)
    return [(name, float((a - b).abs().max())) for (name, a), (_, b) in pairs if not torch.equal(a, b)]


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_memory_is_free_and_training_goes_on(
    dtype: torch.dtype, distributed: bool, layout: Layout, tmp_path: Path
) -> None:
    save_tiny_model(tmp_path, gpu_configs()["Qwen2.5-VL"])
    options = ModelOptions(
        backend=choose_backend("auto", on_gpu=True, dtype="bfloat16" if dtype == torch.bfloat16 else "float32")
    )
    optim = dataclasses.replace(RESUMED_OPTIM, use_distributed_optimizer=distributed)
    batch = make_batch(make_responses(), "nll")

    def new_policy() -> MegatronPolicy:
        policy = make_policy(tmp_path, layout, rows=2, optim=optim, dtype=dtype, options=options)
        policy.update(batch)
        return policy

    new_policy()  # by the end of it all that Megatron has compiled is compiled for every length
    still, twin, moved = new_policy(), new_policy(), new_policy()
    memory = TrainerMemory(moved.trainable)
    total = _bytes(moved)
    assert total > 1 << 20
    for _ in range(3):
        before = requested_bytes()
        memory.offload(ALL)
        assert before - requested_bytes() >= total
        memory.reload(ALL)
        assert requested_bytes() == before
        for policy in (still, twin, moved):
            policy.update(batch)
        assert differing(still, twin) == [], "the same update twice, without any move: is it deterministic here?"
        assert differing(still, moved) == []
