"""Work ahead of the one who asks for it."""

from __future__ import annotations

import threading
import weakref

import pytest
import torch

from megatron_vppo.parallel.ahead import made_ahead, read_by_all

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


@pytest.mark.parametrize("readers", [1, 3])
def test_every_reader_gets_every_item_which_then_is_let_go(readers: int) -> None:
    known: list[weakref.ref[torch.Tensor]] = []

    def make(number: int) -> torch.Tensor:
        tensor = torch.tensor(number)
        known.append(weakref.ref(tensor))
        return tensor

    iterators = read_by_all(map(make, range(5)), readers=readers)
    found: list[list[int]] = [[] for _ in iterators]
    for _ in range(5):
        for own, iterator in zip(found, iterators, strict=True):
            own.append(int(next(iterator)))
        assert not any(tensor() is not None for tensor in known), "all have had it"
    assert found == [[0, 1, 2, 3, 4]] * readers
    assert all(next(iterator, None) is None for iterator in iterators)
