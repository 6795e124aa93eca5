"""validation/step_N.jsonl.zst: one line per response, written whole by the process of the records, cut by a resume."""

from __future__ import annotations

import json
from pathlib import Path

import zstandard

from megatron_vppo.observability.record_writer import RecordWriter
from megatron_vppo.observability.validations import VALIDATIONS, ValidationRecord, ValidationRecords


def line(row: int, sample: int) -> ValidationRecord:
    return ValidationRecord(
        split="val", row=row, sample=sample, problem="<image>Summe?", answer="8", response="3+5=\\boxed{8} — ü",
        response_length=7, reward=0.9, accuracy=1.0, reward_error=None, finish_reason="stop",
    )  # fmt: skip


def test_another_process_writes_them_in_order(tmp_path: Path) -> None:
    records = [line(row, sample) for row in (4, 2) for sample in (0, 1)]
    writer = RecordWriter(tmp_path)
    try:
        writer.write(0, ValidationRecords(records))
    finally:
        writer.close()
    with zstandard.open(tmp_path / "validation" / "step_0.jsonl.zst", "rt", encoding="utf-8") as lines:
        assert [json.loads(text) for text in lines] == records


def test_later_steps_are_cut(tmp_path: Path) -> None:
    for step in (0, 5, 10):
        ValidationRecords([line(1, 0)]).write(tmp_path, step)
    (tmp_path / "validation" / ".step_15.jsonl.zst.77.tmp").touch()
    VALIDATIONS.cut_after(tmp_path, 5)
    assert sorted(path.name for path in (tmp_path / "validation").iterdir()) == ["step_0.jsonl.zst", "step_5.jsonl.zst"]
    VALIDATIONS.cut_after(tmp_path, -1)
    assert VALIDATIONS.steps(tmp_path) == []
