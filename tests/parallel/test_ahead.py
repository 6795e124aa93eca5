"""Work ahead of the one who asks for it."""

from __future__ import annotations

import threading

import pytest
import torch

from megatron_vppo.parallel.ahead import made_ahead

CPU = torch.device("cpu")


def test_the_next_one_is_made_while_the_caller_works() -> None:
    """The caller waits for the next item to be begun before it asks for it. So the test hangs if nobody begins it."""
    begun = [threading.Event() for _ in range(4)]
    threads = set()

    def make(number: int) -> int:
        threads.add(threading.get_ident())
        begun[number].set()
        return number * number

    found = []
    for number, made in enumerate(made_ahead(make, range(4), device=CPU)):
        found.append(made)
        if number < 3:
            assert begun[number + 1].wait(60)
        assert not any(event.is_set() for event in begun[number + 2 :]), "one ahead, not more"
    assert found == [0, 1, 4, 9]
    assert len(threads) == 1 and threading.get_ident() not in threads


def test_an_error_reaches_the_caller_in_its_turn() -> None:
    def make(number: int) -> int:
        if number == 2:
            raise ValueError("no image")
        return number

    made = made_ahead(make, range(4), device=CPU)
    assert [next(made), next(made)] == [0, 1]
    with pytest.raises(ValueError, match="no image"):
        next(made)


def test_no_thread_stays_when_the_caller_gives_up() -> None:
    before = threading.active_count()
    made = made_ahead(lambda number: number, range(4), device=CPU)
    next(made)
    made.close()
    assert threading.active_count() == before
