"""Ranks find the rank 0 of their own job and no other one, on whatever ports; and end together when refused."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_vppo.system.rendezvous import (
    FIRST_PORT,
    NUM_PORTS,
    Refused,
    candidate_ports,
    meet_alone,
    meet_by_word,
)

SECONDS = 60.0


@contextlib.contextmanager
def listener(greeting: bytes = b"") -> Iterator[int]:
    """A port on which another program listens: it says `greeting`, if anything, and then nothing."""
    with socket.create_server(("", 0)) as server:
        if not greeting:
            yield server.getsockname()[1]
            return
        context = multiprocessing.get_context("fork")
        process = context.Process(target=_greet, args=(server, greeting), daemon=True)
        process.start()
        try:
            yield server.getsockname()[1]
        finally:
            process.kill()
            process.join()


def _greet(server: socket.socket, greeting: bytes) -> None:
    while True:
        connection, _ = server.accept()
        connection.sendall(greeting)
        connection.close()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        port: int = free.getsockname()[1]
        return port


def _gather(results: Any, word: str, rank: int, ports: list[int]) -> None:
    meeting = meet_by_word("127.0.0.1", ports, word, rank=rank, size=2, timeout_seconds=SECONDS)
    results.put((word, rank, meeting.gather("names", f"{word}{rank}"), meeting.gather("ranks", {"rank": rank})))
    meeting.gather("end", None)  # rank 0 has the store, and stays until the other has read it
    time.sleep(1 - rank)


def test_two_jobs_with_the_same_ports_never_meet() -> None:
    """Their first port is taken by a program that says nothing, the second by one that speaks."""
    with listener() as silent, listener(b"SSH-2.0-OpenSSH_9.2\r\n") as speaking:
        ports = [silent, speaking, free_port(), free_port(), free_port()]
        context = multiprocessing.get_context("fork")
        results = context.Queue()
        ranks = [
            context.Process(target=_gather, args=(results, word, rank, ports))
            for word, rank in (("a", 1), ("b", 0), ("b", 1), ("a", 0))
        ]
        for process in ranks:
            process.start()
        found = sorted(results.get(timeout=SECONDS) for _ in ranks)
        for process in ranks:
            process.join(SECONDS)
    both = [{"rank": 0}, {"rank": 1}]
    assert found == [(word, rank, [f"{word}0", f"{word}1"], both) for word in "ab" for rank in (0, 1)]


def test_rank_0_names_the_ports_that_are_taken() -> None:
    with listener() as first, listener() as second:
        with pytest.raises(ValueError, match=f"port {first}, {second}: Address already in use; set MASTER_PORT"):
            meet_by_word("127.0.0.1", [first, second], "x", rank=0, size=2, timeout_seconds=1)
        with pytest.raises(ValueError, match=f"port {first}: Address already in use; unset MASTER_PORT"):
            meet_by_word("127.0.0.1", [first], "x", rank=0, size=2, timeout_seconds=1)


def test_a_rank_0_that_is_not_there_is_missed() -> None:
    with (
        listener(b"vppo rank 0 of y has its store on port 1\n") as other,
        pytest.raises(TimeoutError, match=rf"rank 0 was not found at 127\.0\.0\.1, port {other}, .* within 1 s"),
    ):
        meet_by_word("127.0.0.1", [other], "x", rank=1, size=2, timeout_seconds=1)


def test_ports_of_a_step() -> None:
    ports = {name: candidate_ports(name) for name in (f"{job}.0.0" for job in range(1000, 1100))}
    assert all(len(set(tried)) == len(tried) == 16 for tried in ports.values())
    assert all(FIRST_PORT <= port < FIRST_PORT + NUM_PORTS for tried in ports.values() for port in tried)
    assert FIRST_PORT + NUM_PORTS <= 32768, "Linux gives the ports from there on to connections"
    assert len({tried[0] for tried in ports.values()}) > 90, "jobs that follow each other begin with other ports"


def _checked(results: Any, rank: int, ports: list[int], how: str) -> None:
    meeting = meet_by_word("127.0.0.1", ports, how, rank=rank, size=3, timeout_seconds=SECONDS)
    meeting.check("first", lambda: None)

    def work() -> None:
        assert rank == 0, "the others do not check"
        raise KeyError(how)

    try:
        meeting.check("second", work)
    except Refused as refusal:
        results.put((rank, type(refusal.error).__name__, refusal.status))
        results.close()
        results.join_thread()  # written, before this process ends at once
        if rank == 0:
            time.sleep(0.5)  # the user is told
        refusal.leave(7)
        os.kill(os.getpid(), signal.SIGTERM)  # as srun does to the others
        os._exit(refusal.status or 7)


def test_a_refusal_of_rank_0_ends_all_ranks_with_its_status() -> None:
    context = multiprocessing.get_context("fork")
    results, ports = context.Queue(), [free_port()]
    ranks = [context.Process(target=_checked, args=(results, rank, ports, "k")) for rank in range(3)]
    for process in ranks:
        process.start()
    found = sorted(results.get(timeout=SECONDS) for _ in ranks)
    for process in ranks:
        process.join(SECONDS)
    assert found == [(0, "KeyError", None), (1, "NoneType", 7), (2, "NoneType", 7)]
    assert [process.exitcode for process in ranks] == [7, 7, 7]


def test_alone() -> None:
    meeting = meet_alone()
    assert meeting.gather("x", 5) == [5]
    with pytest.raises(Refused) as refused:
        meeting.check("y", lambda: {}["no"])
    assert isinstance(refused.value.error, KeyError)
