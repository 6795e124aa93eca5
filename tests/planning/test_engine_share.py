"""The sizes that an engine may have: as many GPUs as `vppo train` and vLLM can give it."""

from __future__ import annotations

import pytest

from megatron_vppo.config.choices import MemoryPart
from megatron_vppo.config.schema import DataConfig, ModelConfig, RolloutConfig, RunConfig
from megatron_vppo.planning.activations import StageActivations
from megatron_vppo.planning.candidate import GIB, Candidate, Cluster, EngineShare, PlanRequest, StageMemory
from megatron_vppo.planning.engine_share import (
    TRANSFER_BUFFER,
    EngineModel,
    check_engine_size,
    engine_share,
    engine_sizes,
)
from megatron_vppo.planning.published import PUBLISHED, published_config
from megatron_vppo.planning.sizes import language_sizes
from megatron_vppo.planning.state import StateBytes
from megatron_vppo.setup.places import Place, engine_devices
from megatron_vppo.setup.world import engine_seats
from tests.planning.test_candidate import WORKLOAD


def model_of(name: str) -> EngineModel:
    config = published_config(name)
    return EngineModel(config, language_sizes(config), parameters=PUBLISHED[name].parameters)


def cluster_of(gpus: int, gpus_per_node: int = 8) -> Cluster:
    return Cluster(gpus=gpus, gpu_bytes=80 * GIB, gpus_per_node=gpus_per_node)


@pytest.mark.parametrize(
    ("name", "cluster", "size", "message"),
    [
        ("qwen2.5-vl-7b", cluster_of(2), 4, "2 GPUs do not divide into engines of 4; possible: 1, 2"),
        ("qwen2.5-vl-7b", cluster_of(6), 4, "6 GPUs do not divide into engines of 4; possible: 1, 2"),
        ("qwen2.5-vl-7b", cluster_of(7), 3, "7 GPUs do not divide into engines of 3; possible: 1"),
        ("qwen3-vl-8b", cluster_of(12), 8, "12 GPUs in nodes of 8 do not divide into engines of 8; possible: 1, 2, 4"),
        ("qwen3-vl-8b", cluster_of(64, 4), 8, "64 GPUs in nodes of 4 do not divide into engines of 8"),
        ("qwen2.5-vl-7b", cluster_of(8), 8, "28 attention heads cannot be split over the 8 GPUs of an engine"),
        ("qwen2.5-vl-3b", cluster_of(8), 8, "3420 values of the vision MLP cannot be split over the 8 GPUs"),
        ("qwen2.5-vl-7b", cluster_of(7), 7, "4 key-value heads cannot be split over the 7 GPUs"),
        ("qwen3-vl-8b", cluster_of(32, 32), 32, "16 vision attention heads cannot be split over the 32 GPUs"),
        ("qwen2.5-vl-3b", cluster_of(6), 6, "16 attention heads cannot be split over the 6 GPUs"),
    ],
)  # fmt: skip
def test_impossible_sizes(name: str, cluster: Cluster, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^--rollout-tp {size}: {message}"):
        check_engine_size(model_of(name), cluster, size)


def test_possible_sizes() -> None:
    """Key-value heads may be copied: the 3B has two."""
    assert engine_sizes(model_of("qwen2.5-vl-3b"), cluster_of(8)) == (1, 2, 4)
    assert engine_sizes(model_of("qwen2.5-vl-7b"), cluster_of(16)) == (1, 2, 4)
    assert engine_sizes(model_of("qwen3-vl-8b"), cluster_of(32, 16)) == (1, 2, 4, 8, 16)
    check_engine_size(model_of("qwen2.5-vl-3b"), cluster_of(8), 4)


def place_of(rank: int, gpus: int, gpus_per_node: int) -> Place:
    """Returns the place of a rank that is shown all GPUs of its host."""
    host, local_rank = divmod(rank, gpus_per_node)
    ids = tuple(map(str, range(min(gpus_per_node, gpus - host * gpus_per_node))))
    uuids = tuple(f"{host}/{number}" for number in ids)
    return Place(f"n{host}", local_rank, ids, uuids, cores=(0,), host_cores=1, allotted_gpus=len(ids))


@pytest.mark.parametrize("gpus_per_node", [4, 6, 8])
@pytest.mark.parametrize("gpus", [1, 2, 3, 6, 8, 12, 16])
def test_a_run_starts_engines_of_every_possible_size(gpus: int, gpus_per_node: int) -> None:
    """Each has its leader, and its GPUs are on the leader's node; together they are all GPUs."""
    for size in engine_sizes(model_of("qwen3-vl-8b"), cluster_of(gpus, gpus_per_node)):
        config = RunConfig(
            data=DataConfig(train_files="rows"),
            model=ModelConfig(path="folder"),
            rollout=RolloutConfig(tensor_parallel_size=size),
        )
        places = [place_of(rank, gpus, gpus_per_node) for rank in range(gpus)]
        seats = engine_seats(config, places)
        assert [rank for seat in seats for rank in seat.ranks] == list(range(gpus))
        for seat in seats:
            assert len({places[rank].host for rank in seat.ranks}) == 1
            assert len(engine_devices(places, seat).split(",")) == size


def trainer_of(*, activations: int = 0, offload: frozenset[MemoryPart] = frozenset()) -> Candidate:
    """A trainer with 10 GiB of weights, on one GPU."""
    state = StateBytes(weights=10 * GIB, gradients=0, optimizer=0)
    return Candidate(
        tensor=1,
        pipeline=1,
        context=1,
        data=1,
        layers=(28,),
        recompute="none",
        stages=(StageMemory(state, StageActivations(layers=activations, head=0)),),
        offload=offload,
        engine=None,
    )


def share_of(trainer: Candidate, gpu_bytes: int) -> EngineShare | None:
    cluster = Cluster(gpus=1, gpu_bytes=gpu_bytes, gpus_per_node=1)
    request = PlanRequest(published_config("qwen2.5-vl-7b"), cluster, WORKLOAD, engine_sequences=16)
    return engine_share(model_of("qwen2.5-vl-7b"), trainer, request=request, sizes=(1,))


WEIGHTS = 2 * 8_292_166_656
PER_SEQUENCE = 2 * 28 * 4 * 128 * 2 * (4096 + 2048)


def test_what_has_to_fit_while_weights_are_sent() -> None:
    """The trainer's 10 GiB with its reserve of 3 GiB, the engine's weights with 3 GiB, and two buffers of the size of
    the embedding, than which the sender takes no smaller ones."""
    embedding = 152_064 * 3584 * 2
    assert embedding > TRANSFER_BUFFER
    enough = (10 + 3) * GIB + WEIGHTS + 3 * GIB + 2 * embedding
    offloaded = trainer_of(offload=frozenset({"params"}))
    sequences = int((0.9 * enough - WEIGHTS - 3 * GIB) / PER_SEQUENCE)
    assert share_of(offloaded, enough) == EngineShare(1, utilization=0.9, weights=WEIGHTS, sequences=sequences)
    assert share_of(offloaded, enough - 1) is None


def test_what_is_left_while_an_engine_samples() -> None:
    """80 - 13 of 80 GiB are 0.8375."""
    sequences = int((0.83 * 80 * GIB - WEIGHTS - 3 * GIB) / PER_SEQUENCE)
    assert share_of(trainer_of(), 80 * GIB) == EngineShare(1, utilization=0.83, weights=WEIGHTS, sequences=sequences)


def test_what_has_to_fit_while_the_trainer_computes() -> None:
    """66 GiB of activations, next to 13 GiB and the 1 GiB of a sleeping engine."""
    assert share_of(trainer_of(activations=66 * GIB), 80 * GIB) is not None
    assert share_of(trainer_of(activations=66 * GIB + 1), 80 * GIB) is None
