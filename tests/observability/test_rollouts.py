"""rollouts/step_N.jsonl.zst: written whole, read back equal, also by other programs."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from megatron_vppo.observability.rollouts import (
    RolloutRecord,
    cut_rollouts_after,
    png_pair,
    read_rollouts,
    rollout_path,
    rollout_steps,
    write_rollouts,
)

RECORD: RolloutRecord = {
    "split": "train",
    "row": 7,
    "sample": 0,
    "problem": "<image>Summe?",
    "answer": "8",
    "response": "3+5=\\boxed{8}",
    "tokens": ["3", "+", "5 — ü"],
    "token_ids": [11, 12, 13],
    "rollout_logps": [-0.1, -0.2, -0.30000001192092896],
    "old_logps": [-0.1, -0.2, -0.3],
    "masked_logps": None,
    "dependency": [0.0, 2.5, 1e-9],
    "kept": [0, 1, 1],
    "reward": 1.0,
    "accuracy": 1.0,
    "finish_reason": "stop",
    "carried_tokens": 0,
}


def test_records_come_back_as_written(tmp_path: Path) -> None:
    path = write_rollouts(tmp_path, 3, [RECORD, {**RECORD, "row": 8, "images": [png_pair(b"\x89PNG1", b"\x89PNG2")]}])
    first, second = read_rollouts(path)
    assert first == RECORD
    assert base64.b64decode(second["images"][0]["masked"]) == b"\x89PNG2"
    # The same file through plain zstd and json.
    with zstandard.open(path, "rt", encoding="utf-8") as lines:
        assert [json.loads(line)["row"] for line in lines] == [7, 8]


def test_non_finite_numbers_stay_valid_json(tmp_path: Path) -> None:
    path = write_rollouts(tmp_path, 1, [{**RECORD, "old_logps": [-math.inf, math.nan, 0.0]}])
    (record,) = read_rollouts(path)
    assert record["old_logps"] == ["-Infinity", "NaN", 0.0]


def test_text_is_exact_also_where_utf8_could_not_hold_it(tmp_path: Path) -> None:
    text = "a\x00b\x1b[31m \x7f\x85\u2028 \u202egnp.exe \u200b\ufeff half a pair: \ud83d, \udcff"
    path = write_rollouts(tmp_path, 1, [{**RECORD, "answer": text}])
    (record,) = read_rollouts(path)
    assert record["answer"] == text
    with zstandard.open(path, "rb") as file:
        assert json.loads(file.read().decode("utf-8"))["answer"] == text  # one line, and UTF-8


def test_lists_of_different_lengths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="step 1, record 1: 2 kept for 3 tokens"):
        write_rollouts(tmp_path, 1, [RECORD, {**RECORD, "kept": [1, 0]}])


def test_a_failed_write_keeps_the_earlier_file(tmp_path: Path) -> None:
    path = write_rollouts(tmp_path, 1, [RECORD])

    def failing() -> Iterator[RolloutRecord]:
        yield {**RECORD, "row": 99}
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_rollouts(tmp_path, 1, failing())
    assert [record["row"] for record in read_rollouts(path)] == [7]
    assert list(path.parent.iterdir()) == [path]


def test_steps_are_listed_in_order_and_cut_after_a_checkpoint(tmp_path: Path) -> None:
    for step in (10, 2, 1):
        write_rollouts(tmp_path, step, [RECORD])
    for name in ("x", "007", "٩"):
        (tmp_path / "rollouts" / f"step_{name}.jsonl.zst").touch()
    assert rollout_steps(tmp_path) == [1, 2, 10]
    cut_rollouts_after(tmp_path, 2)
    assert rollout_steps(tmp_path) == [1, 2]
    assert not rollout_path(tmp_path, 10).exists()
    assert rollout_steps(tmp_path / "nowhere") == []
