"""The engine process's side of its socket: requests come, answers leave, and neither waits for the other."""

from __future__ import annotations

import contextlib
import queue
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Protocol

from megatron_vppo.rollout.records import PROGRESS, Outcome


class Served(Protocol):
    """The object whose methods are the requests; see `Engine` in engine_process.py."""

    def call_on_progress(self, report: Callable[[], None]) -> None: ...

    @property
    def is_broken(self) -> bool: ...


class Outbox:
    """Sends messages in a thread. So an engine reads on while the trainer, which may be sending itself, does not."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._messages: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._send, name="outbox", daemon=True)
        self._thread.start()

    def send(self, message: Any) -> None:
        self._messages.put((message,))

    def close(self) -> None:
        """Returns when everything is sent, or the trainer is gone."""
        self._messages.put(())
        self._thread.join()

    def _send(self) -> None:
        with contextlib.suppress(OSError):
            while message := self._messages.get():
                self._connection.send(*message)


def serve(connection: Connection, engine: Served) -> None:
    """Answers requests until the socket closes or the engine is broken."""
    outbox = Outbox(connection)
    engine.call_on_progress(lambda: outbox.send(PROGRESS))
    try:
        while True:
            try:
                method, arguments = connection.recv()
            except EOFError:
                return
            if method == "sample":
                arguments |= {"connection": connection, "tell": outbox.send}
            try:
                answer: tuple[Outcome, Any] = ("done", getattr(engine, method)(**arguments))
            except Exception as error:  # the trainer decides what follows
                traceback.print_exc()
                answer = ("broken" if engine.is_broken else "refused", f"{type(error).__name__}: {error}")
            outbox.send(answer)
            if method == "shutdown" or engine.is_broken:
                return
    finally:
        outbox.close()
