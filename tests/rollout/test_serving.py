"""The engine's side of the socket, with this test at the other end."""

from __future__ import annotations

import socket
import threading
from multiprocessing.connection import Connection
from typing import Any

from megatron_vppo.rollout.records import PROGRESS
from megatron_vppo.rollout.serving import serve


def test_an_engine_tells_that_it_is_broken() -> None:
    """A worker that dies leaves vLLM without requests, but without the worker, too."""
    ours, theirs = socket.socketpair()

    class Failing:
        is_broken = False

        def call_on_progress(self, report: Any) -> None:
            report()

        def generate(self) -> None:
            raise ValueError("no")

        def sleep(self) -> None:
            self.is_broken = True
            raise RuntimeError("worker died")

    engine: Any = Failing()
    with Connection(ours.detach()) as trainer:
        thread = threading.Thread(target=serve, args=(Connection(theirs.detach()), engine))
        thread.start()
        for method in ("generate", "sleep"):
            trainer.send((method, {}))
        assert [trainer.recv() for _ in range(3)] == [
            PROGRESS, ("refused", "ValueError: no"), ("broken", "RuntimeError: worker died"),
        ]  # fmt: skip
        thread.join(10)
        assert not thread.is_alive()


def test_an_engine_reads_on_while_what_it_sends_is_not_read() -> None:
    """Both sides send more than the socket holds before either reads: without a thread each would wait for ever."""
    ours, theirs = socket.socketpair()
    large = bytes(4_000_000)

    class Echo:
        is_broken = False

        def call_on_progress(self, report: Any) -> None:
            pass

        def sample(self, *, connection: Connection, tell: Any) -> None:
            tell(large)
            assert connection.recv() == large

    engine: Any = Echo()
    with Connection(ours.detach()) as trainer:
        thread = threading.Thread(target=serve, args=(Connection(theirs.detach()), engine))
        thread.start()
        trainer.send(("sample", {}))
        sender = threading.Thread(target=trainer.send, args=(large,), daemon=True)
        sender.start()
        sender.join(30)
        assert not sender.is_alive()
        assert trainer.recv() == large and trainer.recv() == ("done", None)
    thread.join(10)
    assert not thread.is_alive()
