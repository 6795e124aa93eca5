"""A completion from the pieces that vLLM gives: the likeliest tokens of each position."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from megatron_vppo.rollout.sampling_loop import _Running


def _step(**logps: float) -> dict[int, Any]:
    return {int(name[1:]): SimpleNamespace(logprob=logp) for name, logp in logps.items()}


def test_the_likeliest_tokens_of_each_position() -> None:
    """vLLM has the sampled token first, wherever it ranks: third at the first position, first at the second."""
    running = _Running(0, 0, likeliest_tokens=2)
    running.add(SimpleNamespace(token_ids=[7], logprobs=[_step(t7=-2.5, t3=-0.5, t9=-1.5)]))
    running.add(SimpleNamespace(token_ids=[3], logprobs=[_step(t3=-0.25, t8=-3.0)]))
    found = running.sampled("stop", 4).completion
    assert found.token_ids == (7, 3) and found.logps == (-2.5, -0.25)
    assert found.likeliest_ids.tolist() == [3, 9, 3, 8] and found.likeliest_logps.tolist() == [-0.5, -1.5, -0.25, -3.0]
    assert _Running(0, 0).sampled("stop", 4).completion.likeliest_ids.tolist() == []
