"""The processes that write a checkpoint: one that is killed, and what they leave behind."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_vppo.parallel import checkpoint_writers
from megatron_vppo.parallel.checkpoint_writers import WriterLost
from megatron_vppo.system.processes import children_of
from tests.gloo import run_gloo
from tests.models.tiny import save_tiny_model, tiny_config
from tests.parallel.test_checkpoint import make_ranks, save


def _die_when_forked() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _writers_die(rank: int, world: int, model: Path, folder: Path) -> None:
    def end(arguments: threading.ExceptHookArgs) -> None:
        (folder / f"hook_{rank}").write_text(f"{arguments.exc_type.__name__}: {arguments.exc_value}")
        os._exit(7)

    threading.excepthook = end
    layout, policy = make_ranks(model)
    os.register_at_fork(after_in_child=_die_when_forked)  # Megatron forks its writers
    save(folder, layout, policy, step=1, state="lost")


@pytest.mark.distributed
def test_a_killed_writer_ends_its_rank(tmp_path: Path) -> None:
    """Megatron's own wait has no end."""
    save_tiny_model(tmp_path / "model", tiny_config(tied=False, vocab=61))
    with pytest.raises(RuntimeError, match=r"exit codes by rank: \{.*7"):
        run_gloo(_writers_die, 2, tmp_path / "model", tmp_path)
    told = [path.read_text() for path in tmp_path.glob("hook_*")]
    assert told and all(
        text.startswith(f"{WriterLost.__name__}: {tmp_path}/global_step_1 was not written: ") for text in told
    )
    assert "ended with signal SIGKILL" in told[0]
    assert not (tmp_path / "global_step_1").exists()


def _saves_and_is_killed(rank: int, world: int, model: Path, folder: Path) -> None:
    os.environ["TMPDIR"] = str(folder / "temporary")
    layout, policy = make_ranks(model)
    save(folder, layout, policy, step=1, state="whole")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.distributed
def test_a_killed_rank_leaves_no_temporary_file(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", tiny_config(tied=False, vocab=61))
    (tmp_path / "temporary").mkdir()
    with pytest.raises(RuntimeError, match=r"exit codes by rank: \{.*-9"):
        run_gloo(_saves_and_is_killed, 2, tmp_path / "model", tmp_path)
    assert (tmp_path / "global_step_1").is_dir()
    assert list((tmp_path / "temporary").iterdir()) == []


def _server_dies(rank: int, world: int, model: Path, folder: Path) -> str:
    layout, policy = make_ranks(model)
    save(folder, layout, policy, step=1, state="whole")
    (server,) = [pid for pid in children_of(os.getpid()) if "multiprocessing.spawn" in _command(pid)]
    os.kill(server, signal.SIGKILL)
    with pytest.raises(RuntimeError) as error:
        save(folder, layout, policy, step=2, state="lost")
    return str(error.value)


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode()


@pytest.mark.distributed
def test_a_killed_queue_is_named(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", tiny_config(tied=False, vocab=61))
    errors = run_gloo(_server_dies, 2, tmp_path / "model", tmp_path)
    assert errors == [f"{tmp_path}/global_step_2 was not written: the process that its writers report to has ended"] * 2
    assert (tmp_path / "global_step_1").is_dir()


@pytest.mark.extended
def test_a_queue_that_is_killed_while_it_starts_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem_async, "_results_queue", None, raising=False)
    monkeypatch.setattr(checkpoint_writers, "die_with_parent", _die)  # the server calls it first
    with pytest.raises(RuntimeError, match="report to ended while starting"):
        checkpoint_writers.use_result_queue_of_ours()


def _die(parent_pid: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
