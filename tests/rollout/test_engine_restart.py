"""An engine that hangs, that is killed while it works, that breaks: what the trainer is told, and its restart."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_vppo.rollout import child, os_processes
from megatron_vppo.rollout.child import ChildProcess, EngineLost
from megatron_vppo.rollout.engine import RolloutEngine
from megatron_vppo.rollout.engine_process import Engine
from megatron_vppo.rollout.records import PROGRESS, SampleRequest, SamplingSettings
from megatron_vppo.rollout.session import Session
from tests.rollout.rig import START_SECONDS, prompt_ids, weights
from tests.rollout.settings import engine_settings
from tests.rollout.tiny_model import build_config, build_model, build_tokenizer, save_model_folder


@pytest.mark.slow
@pytest.mark.extended
def test_a_new_process_samples_what_the_old_one_would_have(tmp_path: Path) -> None:
    """The engine is stopped, which looks like a hang: it neither answers nor reads."""
    folder = save_model_folder(tmp_path / "model", tied=True)
    tensors = weights(build_model(build_config(build_tokenizer(), tied=True), seed=3), tmp_path / "weights")
    requests, sampling = [SampleRequest(prompt_ids(0), (), (1, 2, 3))], SamplingSettings(max_tokens=12)
    settings = engine_settings(model=str(folder), load_format="empty", cpu_threads=2)
    with RolloutEngine(settings, log_path=tmp_path / "engine.log", silence_seconds=60) as engine:
        engine.wait_ready(timeout_seconds=START_SECONDS)
        engine.send_weights(iter(tensors.items()), version=1, verify=False)
        expected = engine.generate(requests, sampling)
        old = engine.pid
        engine._child._silence_seconds = 2  # it was not under load that anything should look like a hang
        os.kill(old, signal.SIGSTOP)
        message = (
            rf"^the rollout engine \(process {old}\) made no progress for 2 seconds \(rollout.engine_timeout_seconds"
        )
        with pytest.raises(EngineLost, match=message):
            engine.generate(requests, sampling)
        with pytest.raises(EngineLost, match=message):
            engine.send_weights(iter(tensors.items()), version=2, verify=False)
        engine.restart(timeout_seconds=START_SECONDS)
        assert os_processes.members(old) == [] and engine.pid != old
        with pytest.raises(RuntimeError, match="no complete set of weights"):
            engine.generate(requests, sampling)
        engine._child._silence_seconds = 60
        assert engine.send_weights(iter(tensors.items()), version=1, verify=True).checksums_ok
        assert engine.generate(requests, sampling) == expected


class Peer:
    """A process in the place of an engine's, and this test at the other end of its socket."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, silence_seconds: float) -> None:
        ours, theirs = socket.socketpair()
        popen: Any = subprocess.Popen(["sleep", "600"], start_new_session=True)
        monkeypatch.setattr(child.socket, "socketpair", lambda: (ours, theirs.dup()))
        monkeypatch.setattr(child.subprocess, "Popen", lambda *arguments, **keywords: popen)
        self.process = ChildProcess(
            engine_settings(), log_path=tmp_path / "engine.log", silence_seconds=silence_seconds
        )
        monkeypatch.undo()
        self.connection = Connection(theirs.detach())
        assert self.connection.recv() == engine_settings()


@pytest.fixture
def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    peer = Peer(tmp_path, monkeypatch, silence_seconds=1)
    yield peer
    peer.process.close()


def test_progress_keeps_an_engine_alive(peer: Peer) -> None:
    def work() -> None:
        for _ in range(5):
            time.sleep(0.5)
            peer.connection.send(PROGRESS)
        peer.connection.send(("done", 7))

    threading.Thread(target=work).start()
    assert peer.process.receive() == ("done", 7)


def test_progress_does_not_prolong_a_time_that_is_set(peer: Peer) -> None:
    peer.connection.send(PROGRESS)
    with pytest.raises(EngineLost, match="did not answer within 0 seconds"):
        peer.process.receive(timeout_seconds=0.3)


def test_an_engine_that_does_not_read_is_lost(peer: Peer) -> None:
    """A request of many images does not fit into the socket's buffer."""
    with pytest.raises(EngineLost, match="made no progress for 1 seconds"):
        peer.process.send(bytes(100_000_000))


def test_a_trainer_that_was_stopped_does_not_blame_the_engine(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clock jumps by an hour while it waits; the answer comes a moment later."""
    clock, jump = time.monotonic, [0.0]
    monkeypatch.setattr(child, "time", SimpleNamespace(monotonic=lambda: clock() + jump[0], sleep=time.sleep))
    monkeypatch.setattr(child, "LONGEST_WAIT_SECONDS", 0.4)

    def resume() -> None:
        time.sleep(0.3)
        jump[0] = 3600.0
        time.sleep(0.3)
        peer.connection.send(("done", 1))

    threading.Thread(target=resume).start()
    assert peer.process.receive() == ("done", 1)


@pytest.mark.parametrize(
    ("outcome", "kind", "message"),
    [
        ("refused", RuntimeError, r"refused: ValueError: too long; end of "),
        ("broken", EngineLost, r"cannot go on: ValueError: too long; end of "),
    ],
)
def test_only_a_broken_engine_is_lost(outcome: str, kind: type[Exception], message: str, peer: Peer) -> None:
    session = Session(peer.process)
    peer.connection.send((outcome, "ValueError: too long"))
    with pytest.raises(RuntimeError, match=message) as error:
        session.call("generate")
    assert type(error.value) is kind


def test_what_counts_as_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each forward pass, and each prompt whose images are processed; but not every one of them is told."""
    engine = Engine.__new__(Engine)
    clock = [0.0]
    monkeypatch.setattr("megatron_vppo.rollout.engine_process.time", SimpleNamespace(monotonic=lambda: clock[0]))
    told: list[float] = []
    engine.call_on_progress(lambda: told.append(clock[0]))
    for second in range(5):
        clock[0] = second * 0.6
        engine._report()
        engine._report()
    assert told == pytest.approx([1.2, 2.4])


def test_a_full_disk_is_named(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that cannot write a line of its log ends, and leaves no word about it."""
    assert str(peer.process.lost("ended")).startswith("the rollout engine (process ")
    assert "its disk is full" not in str(peer.process.lost("ended"))
    monkeypatch.setattr(child.shutil, "disk_usage", lambda path: SimpleNamespace(free=4096))
    assert "; its disk is full; end of " in str(peer.process.lost("ended"))
