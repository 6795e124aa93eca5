"""The files of responses: whole lines, also after a kill, and what is read back from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_vppo.evaluation.responses import (
    ResponseFile,
    read_records,
    read_samples,
    recorded_samples,
    response_path,
)
from tests.evaluation.suites import record, write_records


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    text = "é \n\u2028\ud83d"
    path = write_records(tmp_path, "a", [
        record("q", "d", 1, 0.0, response=text, vote=None, error="no result after 10 s", finish_reason="length"),
        record("q", "d", 0, 1.0),
    ])  # fmt: skip
    assert path == tmp_path / "responses" / "a.jsonl"
    first, _ = read_records(path)
    assert first["response"] == text
    outcome = read_samples(path)["q", "d", 1]
    assert (outcome.graded.accuracy, outcome.graded.vote, outcome.truncated, outcome.length) == (0.0, None, True, 3)
    assert outcome.error == "no result after 10 s"


@pytest.mark.parametrize("left", ['{"question": "q", "digest": "d", "sam', '{"question": 1', "x" * 200_000])
def test_a_line_that_was_cut_off_is_removed(tmp_path: Path, left: str) -> None:
    path = write_records(tmp_path, "a", [record("q", "d", 0, 1.0)])
    whole = path.read_bytes()
    path.write_bytes(whole + left.encode())
    assert [one["sample"] for one in read_records(path)] == [0]
    file = ResponseFile(path)
    assert path.read_bytes() == whole
    file.add(record("q", "d", 1, 0.0))
    file.close()
    assert [one["sample"] for one in read_records(path)] == [0, 1]


def test_a_file_of_nothing_but_a_cut_line_becomes_empty(tmp_path: Path) -> None:
    path = response_path(tmp_path, "a")
    path.parent.mkdir()
    path.write_text('{"question"')
    ResponseFile(path).close()
    assert path.read_bytes() == b""


def test_a_line_is_there_at_once(tmp_path: Path) -> None:
    """A process that is killed loses no response that it has recorded."""
    file = ResponseFile(response_path(tmp_path, "a"))
    file.add(record("q", "d", 0, 1.0))
    assert len(read_samples(response_path(tmp_path, "a"))) == 1
    file.close()


def test_a_line_that_is_no_record_is_named(tmp_path: Path) -> None:
    path = write_records(tmp_path, "a", [record("q", "d", 0, 1.0)])
    path.write_text(path.read_text() + json.dumps({"question": "q"}) + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2 is no recorded response .* remove the line"):
        list(read_records(path))


def test_samples_count_for_the_question_that_they_answered(tmp_path: Path) -> None:
    write_records(tmp_path, "a", [
        record("q", "d", 1, 0.0), record("q", "d", 0, 1.0), record("r", "old", 0, 1.0), record("gone", "d", 0, 1.0),
    ])  # fmt: skip
    samples = recorded_samples(tmp_path, "a", {"q": "d", "r": "new"})
    assert {name: [one.graded.accuracy for one in of] for name, of in samples.items()} == {"q": [1.0, 0.0]}
    assert recorded_samples(tmp_path, "none", {"q": "d"}) == {}
