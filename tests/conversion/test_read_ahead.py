"""read_ahead: the same items, of which the next is being made while one is worked on. All conversions use it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_vppo.conversion.dist_reader import StoredWeights
from megatron_vppo.conversion.read_ahead import read_ahead
from megatron_vppo.conversion.to_hf import megatron_to_hf
from megatron_vppo.conversion.to_megatron import hf_to_megatron
from megatron_vppo.conversion.verify import compare_checkpoints
from megatron_vppo.weights.hf_folder import FileTensor

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

    ahead = read_ahead(items())
    for number in range(3):
        assert next(ahead) == number
        time.sleep(0.05)
        assert len(made) == number + 2


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
    ahead.close()
    assert threading.active_count() == before


def test_weights_are_read_beside_the_main_thread(
    hf_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: set[threading.Thread] = set()

    def noting(read: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            readers.add(threading.current_thread())
            return read(*arguments)

        return noted

    monkeypatch.setattr(FileTensor, "__getitem__", noting(FileTensor.__getitem__))
    monkeypatch.setattr(StoredWeights, "rows", noting(StoredWeights.rows))
    source = hf_folders["Qwen3 tied"]
    for work in (
        lambda: hf_to_megatron(source, tmp_path / "megatron"),
        lambda: megatron_to_hf(tmp_path / "megatron", tmp_path / "back"),
        lambda: compare_checkpoints(source, tmp_path / "megatron"),
        lambda: compare_checkpoints(source, tmp_path / "back"),
    ):
        readers.clear()
        work()
        assert readers and threading.main_thread() not in readers
