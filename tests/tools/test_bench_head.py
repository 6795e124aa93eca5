"""head.py on a small head: the fields of its JSON, and the products that it measures for comparison."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from bench.head import Problem, Sizes, measure
from torch.utils.flop_counter import FlopCounterMode

SIZES = Sizes(positions=40, vocabulary=300, hidden=16, chunk_tokens=16, dtype="float32")


def test_every_case_is_measured() -> None:
    report = measure(SIZES, seconds=0.05)
    assert report["sizes"]["chunk_tokens"] == 16 and report["ceiling_tflops"] > 0 and "torch" in report["versions"]
    one = 2 * 40 * 300 * 16
    for name, count in {"score": 1, "score_two_views": 2, "update": 4}.items():
        case = report["cases"][name]
        assert case["gflop"] == pytest.approx(count * one / 1e9, abs=5e-4)
        assert case["head_over_products"] == pytest.approx(
            case["head"]["seconds"] / case["products"]["seconds"], rel=0.01
        )
        assert case["head"]["runs"] >= 2 and case["head"]["peak_mib"] is None


@pytest.mark.parametrize(("name", "count"), [("score", 1), ("two_view", 2), ("update", 4)])
def test_products_are_the_products_of_the_head(name: str, count: int) -> None:
    """In bfloat16, since torch's counter sees no product that is added in place, as float32 ones are."""
    problem = Problem(dataclasses.replace(SIZES, dtype="bfloat16"), torch.device("cpu"))
    head = {"score": problem.score, "two_view": problem.score_two_views, "update": problem.update}[name]
    for run in (head, getattr(problem, f"{name}_products")):
        with FlopCounterMode(display=False) as counter:
            run()
        assert counter.get_total_flops() == count * 2 * 40 * 300 * 16
