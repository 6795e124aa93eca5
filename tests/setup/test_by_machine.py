"""Settings that are left to the machine."""

from __future__ import annotations

from megatron_vppo.setup.by_machine import ByMachine, by_machine, chosen_by_machine
from tests.setup.test_hardware import config_with

TWO_RANKS = {"tensor_model_parallel_size": 2}


def test_gpus_and_cores_get_values_of_their_own() -> None:
    config = config_with(parallel=TWO_RANKS)
    on_gpu = by_machine(config, on_gpu=True)
    assert on_gpu == ByMachine(
        sequence_parallel=True, overlap_grad_reduce=True, head_chunk_tokens=4096, max_num_seqs=1024,
        enforce_eager=False, async_checkpoints=True,
    )  # fmt: skip
    assert by_machine(config, on_gpu=False) == ByMachine(False, False, 1024, 256, True, False)


def test_what_is_set_stays() -> None:
    config = config_with(
        parallel={**TWO_RANKS, "sequence_parallel": False, "overlap_grad_reduce": False},
        actor={"head_chunk_tokens": 7},
        rollout={"max_num_seqs": 3, "enforce_eager": True}, trainer={"async_checkpoints": False},
    )  # fmt: skip
    assert by_machine(config, on_gpu=True) == ByMachine(False, False, 7, 3, True, False)
    assert chosen_by_machine(config, on_gpu=True) is None
    forced = config_with(parallel={"overlap_grad_reduce": True})
    assert by_machine(forced, on_gpu=False).overlap_grad_reduce


def test_one_rank_shares_no_tokens() -> None:
    assert not by_machine(config_with(), on_gpu=True).sequence_parallel
    assert not by_machine(config_with(parallel={"sequence_parallel": True}), on_gpu=True).sequence_parallel


def test_the_line_at_the_start_names_them() -> None:
    config = config_with(parallel=TWO_RANKS, rollout={"max_num_seqs": 3})
    assert chosen_by_machine(config, on_gpu=True) == (
        "for GPUs: parallel.sequence_parallel=true, parallel.overlap_grad_reduce=true, actor.head_chunk_tokens=4096, "
        "rollout.enforce_eager=false, trainer.async_checkpoints=true"
    )
    assert chosen_by_machine(config, on_gpu=False) is None
