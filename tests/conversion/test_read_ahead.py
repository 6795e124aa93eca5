"""read_ahead: the same items, of which the next is being made while one is worked on."""

import threading
from collections.abc import Iterator

import pytest

from megatron_vppo.parallel.conversion.read_ahead import read_ahead

WAIT_SECONDS = 20


def test_all_items_come_in_their_order() -> None:
    assert list(read_ahead(iter(range(50)))) == list(range(50))
    assert list(read_ahead(iter([]))) == []
    assert list(read_ahead(iter([None, 0, ""]))) == [None, 0, ""]


def test_the_next_item_is_made_while_one_is_worked_on() -> None:
    making_second = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        making_second.set()
        yield 2

    ahead = read_ahead(items())
    assert next(ahead) == 1
    assert making_second.wait(WAIT_SECONDS)


def test_no_more_than_one_item_waits() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(10):
            made.append(number)
            yield number

    for number in read_ahead(items()):
        assert len(made) <= number + 2


def test_an_error_comes_in_the_place_of_its_item() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("the second cannot be read")

    ahead = read_ahead(items())
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="the second cannot be read"):
        next(ahead)


def test_its_thread_ends_with_it() -> None:
    before = threading.active_count()
    ahead = read_ahead(iter(range(10)))
    next(ahead)
    assert threading.active_count() == before + 1
    ahead.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
