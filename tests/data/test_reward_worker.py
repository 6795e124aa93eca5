"""The messages between the pool and a worker, and where they end in the middle."""

from __future__ import annotations

import io

import pytest

from megatron_vppo.data.reward_worker import read_message, read_request, write_message, write_request


def test_a_request_comes_back_as_it_was_sent() -> None:
    stream = io.BytesIO()
    write_request(stream, [((1, 2, 3), "42"), ((), "\u00e9")])
    stream.seek(0)
    assert read_request(stream) == [([1, 2, 3], "42"), ([], "\u00e9")]


@pytest.mark.parametrize("kept", [0, 5, 8, 20, -1])
def test_a_message_that_was_cut_off_is_the_end(kept: int) -> None:
    """An answer longer than a pipe holds is cut off where its worker is killed. That was no JSON, and ended the run."""
    stream = io.BytesIO()
    write_message(stream, {"scores": [{"overall": 1.0}], "texts": ["x" * 100]})
    with pytest.raises(EOFError):
        read_message(io.BytesIO(stream.getvalue()[:kept]))
