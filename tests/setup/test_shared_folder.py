"""The proof that hosts share a folder, with two folders for hosts that do not."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from megatron_vppo.setup import shared_folder
from megatron_vppo.setup.shared_folder import answer_check, begin_check, end_check, give_up_check


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_folder, "_PATIENCE_SECONDS", 1.0)


def test_hosts_that_share_a_folder(tmp_path: Path) -> None:
    root = tmp_path / "runs" / "p" / "e"
    word = begin_check(root)
    assert answer_check(root, word, rank=8) is None
    assert answer_check(root, word, rank=16) is None
    assert end_check(root, word, {"n2": 8, "n3": 16}) == []
    assert list(root.iterdir()) == []


def test_a_folder_that_is_not_shared(tmp_path: Path) -> None:
    """Also with what an attempt of before has left, and with another word."""
    one, other = tmp_path / "one", tmp_path / "other"
    begin_check(other)
    word = begin_check(one)
    refusal = answer_check(other, word, rank=1)
    assert refusal is not None and refusal.startswith(f"does not see what rank 0's host writes into {other}")
    assert end_check(one, word, {"n2": 1}) == ["n2"], "an answer that was written elsewhere"
    assert list(one.iterdir()) == []


def test_a_folder_that_can_only_be_read(tmp_path: Path) -> None:
    word = begin_check(tmp_path)
    (check,) = tmp_path.iterdir()
    (check / "rank_5").mkdir()  # in the way of the answer; root may write anywhere
    assert answer_check(tmp_path, word, rank=5) == f"cannot write into {tmp_path}: Is a directory"


def test_a_file_whose_content_does_not_appear(tmp_path: Path) -> None:
    word = begin_check(tmp_path)
    next(tmp_path.rglob("rank_0")).write_text("")
    assert answer_check(tmp_path, word, rank=1) is not None


def test_a_file_that_appears_late(tmp_path: Path) -> None:
    """A network file system shows a new file only when it asks again."""
    word = begin_check(tmp_path / "far")
    threading.Thread(target=lambda: (time.sleep(0.4), (tmp_path / "far").rename(tmp_path / "near"))).start()
    assert answer_check(tmp_path / "near", word, rank=1) is None


def test_nothing_is_left(tmp_path: Path) -> None:
    begin_check(tmp_path)
    begin_check(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1, "what an attempt that was killed has left is removed"
    give_up_check(tmp_path)
    assert list(tmp_path.iterdir()) == []
