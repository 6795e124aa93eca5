"""The messages between the pool and a worker, and where they end in the middle."""

from __future__ import annotations

import datetime
import io

import pytest

from megatron_vppo.data.columns import RowExtras
from megatron_vppo.data.graders.weighted import BuiltInReward
from megatron_vppo.data.reward_worker import (
    AnyReward,
    ModuleReward,
    Ungraded,
    read_message,
    read_request,
    reward_from_text,
    reward_to_text,
    write_message,
    write_request,
)
from megatron_vppo.data.user_reward import UserReward


def test_a_request_comes_back_as_it_was_sent() -> None:
    stream = io.BytesIO()
    write_request(stream, [Ungraded((1, 2, 3), "42", "train", 7), Ungraded((), "\u00e9", "val", 0)])
    stream.seek(0)
    assert read_request(stream) == [Ungraded([1, 2, 3], "42", "train", 7), Ungraded([], "\u00e9", "val", 0)]


def test_what_rows_hold_is_sent_once_for_each_row() -> None:
    """Dates and bytes of parquet included; each response then gets a copy of its own."""
    value = RowExtras("geo", {"index": 3, "day": datetime.date(2026, 11, 30), "image": bytes(5000), "nan": None})
    sent = [Ungraded((1,), "42", "train", 7, value.to_bytes())] * 8 + [Ungraded((1,), "43", "train", 8)]
    stream = io.BytesIO()
    write_request(stream, sent)
    assert len(stream.getvalue()) < 2 * 5000
    stream.seek(0)
    received = read_request(stream)
    assert [one.extras for one in received] == [one.extras for one in sent]
    first, second = (RowExtras.from_bytes(one.extras) for one in received[:2])
    assert first == second == value and first.extra_info is not second.extra_info


@pytest.mark.parametrize(
    "reward",
    [
        BuiltInReward("number", {"number": 0.9, "format": 0.1}, 0.05, 1e-9, 0.5),
        UserReward("/a/b.py", "f", {"weights": [1, 0.5], "mode": None}, "auto", {"train": "lab/sh\u00e4pes"}),
        ModuleReward("package.module", "function"),
    ],
)
def test_a_reward_comes_back_from_the_command_line(reward: AnyReward) -> None:
    assert reward_from_text(reward_to_text(reward)) == reward


@pytest.mark.parametrize("kept", [0, 5, 8, 20, -1])
def test_a_message_that_was_cut_off_is_the_end(kept: int) -> None:
    """An answer longer than a pipe holds is cut off where its worker is killed. That was no JSON, and ended the run."""
    stream = io.BytesIO()
    write_message(stream, {"scores": [{"overall": 1.0}], "texts": ["x" * 100]})
    with pytest.raises(EOFError):
        read_message(io.BytesIO(stream.getvalue()[:kept]))
