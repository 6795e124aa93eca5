"""Checkpoints that are written while training goes on: the state is that of the moment, and a kill loses nothing."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_vppo.parallel.checkpoint import load_checkpoint, save_checkpoint
from megatron_vppo.parallel.checkpoint_async import PendingCheckpoint, begin_checkpoint
from megatron_vppo.parallel.checkpoint_folder import check_whole, checkpoint_steps
from megatron_vppo.parallel.layout import Layout, init_layout
from megatron_vppo.parallel.policy import MegatronPolicy
from megatron_vppo.system.processes import children_of
from tests.gloo import run_gloo
from tests.models.tiny import save_tiny_model, tiny_config
from tests.parallel.optimizer_rig import update_counts, whole_state
from tests.parallel.policy_rig import RESUMED_OPTIM, make_batch, make_policy, make_responses

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder, tiny_config(tied=False, vocab=299))
    return folder


def make(model: Path, world: int, *, tensor: int = 1) -> tuple[Layout, MegatronPolicy]:
    layout = init_layout(tensor=tensor, pipeline=1, timeout_seconds=60)
    return layout, make_policy(model, layout, rows=2, optim=RESUMED_OPTIM)


def shared(policy: MegatronPolicy, layout: Layout, folder: Path, step: int) -> dict[str, Any]:
    return {
        "folder": folder, "step": step, "trainable": policy.trainable, "layout": layout,
        "state": {"data": {"offset": step}}, "keep": -1,
    }  # fmt: skip


def begin(policy: MegatronPolicy, layout: Layout, folder: Path, step: int) -> PendingCheckpoint:
    return begin_checkpoint(**shared(policy, layout, folder, step))


# --- The state that is written ----------------------------------------------------------------------------------------


def _bits(rank: int, world: int, model: Path, folder: Path, tensor: int) -> dict[str, Any]:
    layout, policy = make(model, world, tensor=tensor)
    batch = make_batch(make_responses(), "nll")
    policy.update(batch)
    save_checkpoint(**shared(policy, layout, folder, 1))
    before = whole_state(policy)
    pending = begin(policy, layout, folder, 2)
    policy.update(batch)  # changes everything that is still to be written
    seen, held = checkpoint_steps(folder), len(pending.copies)
    while not pending.settle(wait=False):
        time.sleep(0.05)
    found: dict[str, Any] = {
        "seen before": seen, "seen after": checkpoint_steps(folder), "seconds": pending.seconds,
        "copies before and after": (held, len(pending.copies)),
    }  # fmt: skip
    for step in (1, 2):
        fresh = make_policy(model, layout, rows=2, optim=RESUMED_OPTIM)
        state = load_checkpoint(folder, step=step, trainable=fresh.trainable, layout=layout)
        assert state == {"step": step, "data": {"offset": step}} and update_counts(fresh) == {1.0}
        loaded = whole_state(fresh)
        found[f"loaded {step}"] = all(
            torch.equal(loaded[quantity][name], tensor)
            for quantity, tensors in before.items()
            for name, tensor in tensors.items()
        )
    now = whole_state(policy)
    found["changed meanwhile"] = not torch.equal(now["param"]["lm_head.weight"], before["param"]["lm_head.weight"])
    return found


@pytest.mark.parametrize("tensor", [1, pytest.param(2, marks=pytest.mark.extended)])
def test_it_has_the_bits_of_the_moment_in_which_it_began(tensor: int, model: Path, tmp_path: Path) -> None:
    for found in run_gloo(_bits, 2, model, tmp_path, tensor):
        seconds = found.pop("seconds")
        assert seconds is None or 0 <= seconds < 60
        assert found == {
            "seen before": [1], "seen after": [1, 2], "loaded 1": True, "loaded 2": True, "changed meanwhile": True,
            "copies before and after": (1, 0),
        }  # fmt: skip
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"global_step_1", "global_step_2", "latest_checkpointed_iteration.txt"}
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "2"


# --- What goes wrong --------------------------------------------------------------------------------------------------


def _killed_before_the_end(rank: int, world: int, model: Path, folder: Path) -> None:
    layout, policy = make(model, world)
    save_checkpoint(**shared(policy, layout, folder, 1))
    children = set(children_of(os.getpid()))
    monkey: Any = filesystem_async
    monkey._write_item = lambda *_, **__: time.sleep(120)  # a disk that takes its time
    pending = begin(policy, layout, folder, 2)  # a name, or it would end here and remove its folder
    (writer,) = set(children_of(os.getpid())) - children
    while len(files := children_of(writer)) < 2:
        time.sleep(0.05)
    (folder / f"writers_{rank}").write_text(" ".join(map(str, [writer, *files])))
    dist.barrier()
    assert not pending.settle(wait=False)
    dist.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


def _goes_on(rank: int, world: int, model: Path, folder: Path) -> dict[str, Any]:
    layout, policy = make(model, world)
    load_checkpoint(folder, step=1, trainable=policy.trainable, layout=layout)
    assert begin(policy, layout, folder, 2).settle(wait=True)
    return load_checkpoint(folder, step=2, trainable=policy.trainable, layout=layout)


def test_a_kill_before_the_end_loses_nothing_that_was_complete(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"exit codes by rank: \{.*-9"):
        run_gloo(_killed_before_the_end, 2, model, tmp_path)
    assert checkpoint_steps(tmp_path) == [1]
    check_whole(tmp_path, 1)
    assert (tmp_path / ".global_step_2.tmp").is_dir(), "it had begun"
    writers = [int(pid) for path in tmp_path.glob("writers_*") for pid in path.read_text().split()]
    assert len(writers) == 6
    deadline = time.monotonic() + 20
    while (alive := [pid for pid in writers if _is_alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive, "a writer that outlives its rank would hold the folder's lock and write into the next attempt's"
    assert run_gloo(_goes_on, 2, model, tmp_path) == [{"step": 2, "data": {"offset": 2}}] * 2
    assert not list(tmp_path.glob(".global_step*"))


def _is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def _writer_is_killed(rank: int, world: int, model: Path, folder: Path, which: str) -> str:
    """Megatron forks a process from the rank, and from that one a process for each file."""
    layout, policy = make(model, world)
    save_checkpoint(**shared(policy, layout, folder, 1))
    if rank == 1:
        rank_pid = os.getpid()

        def die() -> None:
            if (os.getppid() == rank_pid) == (which == "of the rank"):
                os.kill(os.getpid(), signal.SIGKILL)

        os.register_at_fork(after_in_child=die)
    pending = begin(policy, layout, folder, 2)
    with pytest.raises(RuntimeError) as error:
        pending.settle(wait=True)
    return str(error.value)


@pytest.mark.parametrize(
    ("which", "reason"),
    [("of the rank", "results_queue should not be empty"), ("of a file", "ended with signal SIGKILL")],
)
def test_a_killed_writer_is_told_by_every_rank(which: str, reason: str, model: Path, tmp_path: Path) -> None:
    errors = run_gloo(_writer_is_killed, 2, model, tmp_path, which)
    assert len(set(errors)) == 1
    assert errors[0].startswith(f"{tmp_path}/global_step_2 could not be written: rank 1: ") and reason in errors[0]
    assert checkpoint_steps(tmp_path) == [1]
    check_whole(tmp_path, 1)
    assert not list(tmp_path.glob(".global_step*"))
