"""The place where ranks meet before they have process groups: a store of torch's, found by a word that only they know.

Every rank derives the same ports from its job. Rank 0 opens the store, and on the first of the ports that is free it
answers whoever connects with its word and the store's port. The others try the ports until they hear their own word.
So jobs that share a host never meet, and neither another program nor a job of before is taken for rank 0.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megatron_vppo.system.stop_signals import ignore_stop_signals

FIRST_PORT, NUM_PORTS = 20000, 10000
"""The ports that jobs choose from. Linux gives those from 32768 on to any connection that asks for one."""
_CANDIDATES = 16
_STRIDE = 617
"""The distance of a job's ports. It is prime to NUM_PORTS, and jobs that follow each other do not try the same ones."""
_ANSWER = "vppo rank 0 of {} has its store on port "
_ANSWER_BYTES = 512
_ANSWER_SECONDS = 2.0
_LEAVE_SECONDS = 30.0
"""The time that rank 0 waits for the others to know that the run is refused: they may still be starting."""


class Refused(Exception):
    """The end of all ranks, because a check on rank 0 failed. Rank 0 tells the user; the others end silently."""

    def __init__(self, meeting: Meeting, *, error: Exception | None, status: int | None) -> None:
        """
        Args:
            error: what rank 0 found; None on the other ranks.
            status: the exit status that rank 0 ends with; None on rank 0 itself, which decides it.
        """
        super().__init__(str(error) if error is not None else f"rank 0 has refused the run with status {status}")
        self._meeting = meeting
        self.error, self.status = error, status

    def leave(self, status: int) -> None:
        """Lets all ranks end at about the same time. Rank 0 calls it when the user has been told.

        So a launcher that ends the others when one has failed finds none of them running, and reports `status`, and not
        that of a rank that was ended by a signal.
        """
        ignore_stop_signals()
        self._meeting.leave(status)


class Meeting:
    """The ranks of a run that have found each other."""

    def __init__(self, store: dist.Store, *, rank: int, size: int, port: int | None) -> None:
        """
        Args:
            port: where the store was found; None if the launcher provides it.
        """
        self._store = store
        self.rank, self.size, self.port = rank, size, port
        self._check = ""

    def gather(self, name: str, value: Any) -> list[Any]:
        """Returns the value of every rank, by rank, on every rank. Values are those of JSON. Names are used once."""
        key = f"gather/{name}"
        self._store.set(f"{key}/{self.rank}", json.dumps(value))
        if self.rank == 0:
            texts = self._store.multi_get([f"{key}/{rank}" for rank in range(self.size)])
            self._store.set(key, json.dumps([json.loads(text) for text in texts]))
        values: list[Any] = json.loads(self._store.get(key))
        return values

    def store(self, name: str) -> dist.Store:
        """Returns a store that all ranks share, for one purpose; names are used once."""
        return dist.PrefixStore(name, self._store)

    def check(self, name: str, work: Callable[[], None]) -> None:
        """Calls `work` on rank 0 alone, while the others wait. Names are used once.

        Raises:
            Refused: on every rank, if it raised anything.
        """
        self._check = f"check/{name}"
        if self.rank == 0:
            try:
                work()
            except Exception as error:
                raise Refused(self, error=error, status=None) from error
            self._store.set(self._check, "")
        elif status := self._store.get(self._check):
            raise Refused(self, error=None, status=int(status))

    def leave(self, status: int) -> None:
        """See `Refused.leave`."""
        if self.rank != 0:
            self._store.add("vppo/left", 1)
            return
        self._store.set(self._check, str(status))
        deadline = time.monotonic() + _LEAVE_SECONDS
        while self._store.add("vppo/left", 0) < self.size - 1 and time.monotonic() < deadline:
            time.sleep(0.01)


def candidate_ports(name: str) -> tuple[int, ...]:
    """Returns the ports that the ranks of a step try, in this order."""
    first = zlib.crc32(name.encode())
    return tuple(FIRST_PORT + (first + _STRIDE * i) % NUM_PORTS for i in range(_CANDIDATES))


def meet_by_word(
    address: str, ports: Sequence[int], word: str, *, rank: int, size: int, timeout_seconds: float
) -> Meeting:
    """Opens the store on rank 0, finds it on the others.

    Args:
        address: the host of rank 0, as the others know it.
        timeout_seconds: the time that a rank waits for another one, here and later.

    Raises:
        ValueError: rank 0 finds every port taken, or another rank finds no store with the word in time.
    """
    timeout = timedelta(seconds=timeout_seconds)
    if rank == 0:
        listener = _listen(ports)
        # multi_tenant: the process groups of this process use the same server. Port 0: any free one.
        store = dist.TCPStore(
            address, 0, size, is_master=True, timeout=timeout, wait_for_workers=False, multi_tenant=True
        )
        answer = f"{_ANSWER.format(word)}{store.port}\n".encode()
        threading.Thread(target=_answer, args=(listener, answer), name="rendezvous", daemon=True).start()
    else:
        port = _find(address, ports, word, timeout_seconds=timeout_seconds)
        store = dist.TCPStore(address, port, size, is_master=False, timeout=timeout, wait_for_workers=False)
    return Meeting(dist.PrefixStore("vppo", store), rank=rank, size=size, port=store.port)


def meet_by_environment(*, timeout_seconds: float) -> Meeting:
    """Joins the store that a launcher such as torchrun names in the environment."""
    store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=timeout_seconds)))
    return Meeting(dist.PrefixStore("vppo", store), rank=rank, size=size, port=None)


def meet_alone() -> Meeting:
    """Returns the meeting of a single rank."""
    return Meeting(dist.HashStore(), rank=0, size=1, port=None)


def _listen(ports: Sequence[int]) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    for port in ports:
        try:
            family = socket.AF_INET6 if both else socket.AF_INET
            return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=1024)
        except OSError as error:
            failure = error
    raise ValueError(
        f"rank 0 cannot listen on {socket.gethostname()}, port {_listed(ports)}: {os.strerror(failure.errno or 0)}; "
        + ("unset MASTER_PORT, or set another one" if len(ports) == 1 else "set MASTER_PORT to a free port")
    )


def _answer(listener: socket.socket, answer: bytes) -> None:
    """Answers everyone who connects, as long as this process lives."""
    while True:
        try:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(answer)
        except OSError:  # it was closed at once, as port scanners do
            time.sleep(0.01)


def _find(address: str, ports: Sequence[int], word: str, *, timeout_seconds: float) -> int:
    """Returns the port of rank 0's store."""
    deadline = time.monotonic() + timeout_seconds
    pause = 0.05
    while True:
        for port in ports:
            if (found := _ask(address, port, word)) is not None:
                return found
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"rank 0 was not found at {address}, port {_listed(ports)}, from {socket.gethostname()} within "
                f"{timeout_seconds:.0f} s: it has ended or not started, or a firewall lies between"
            )
        time.sleep(pause)
        pause = min(2 * pause, 1.0)


def _ask(address: str, port: int, word: str) -> int | None:
    """Returns the port that is answered to our word; None if something else answers there, or nothing."""
    try:
        with socket.create_connection((address, port), timeout=_ANSWER_SECONDS) as connection:
            answer = b""
            while len(answer) < _ANSWER_BYTES and not answer.endswith(b"\n") and (more := connection.recv(256)):
                answer += more
    except OSError:
        return None
    text, start = answer.decode(errors="replace").strip(), _ANSWER.format(word)
    number = text.removeprefix(start)
    return int(number) if text.startswith(start) and number.isdecimal() else None


def _listed(ports: Sequence[int]) -> str:
    return ", ".join(map(str, ports))
