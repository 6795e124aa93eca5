"""Values are taken and refused as OmegaConf 2.3 does for the fields of a dataclass, and paths are found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_vppo.importing.their_values import (
    COUNT,
    FLAG,
    MAPPING,
    NUMBER,
    PAIR,
    TEXT,
    TEXTS,
    Folders,
    ValueKind,
    path_as_written,
)

TAKEN = [
    (TEXT, "a", "a"), (TEXT, 8, "8"), (TEXT, 0.5, "0.5"), (TEXT, True, "True"), (COUNT, 8, 8), (COUNT, "8", 8),
    (COUNT, "-1", -1), (NUMBER, 1, 1.0), (NUMBER, "1e-6", 1e-6), (NUMBER, 0.5, 0.5), (FLAG, True, True),
    (FLAG, "True", True), (FLAG, "yes", True), (FLAG, "ON", True), (FLAG, "off", False), (FLAG, "n", False),
    (FLAG, 1, True), (FLAG, 0, False), (FLAG, "0", False), (TEXTS, ["a", 1], ("a", "1")), (TEXTS, [], ()),
    (PAIR, [0.9, 1], (0.9, 1.0)), (MAPPING, {"n": 8}, {"n": 8}), (TEXT.or_null, None, None), (COUNT.or_null, 3, 3),
]  # fmt: skip
REFUSED = [
    (TEXT, ["a"], "a text"), (TEXT, None, "a text"), (COUNT, 1.0, "a whole number"), (COUNT, True, "a whole number"),
    (COUNT, "8.5", "a whole number"), (COUNT, None, "a whole number"), (COUNT.or_null, "x", "a whole number or null"),
    (NUMBER, False, "a number"), (NUMBER, "much", "a number"), (FLAG, "maybe", "true or false"),
    (FLAG, 0.5, "true or false"), (FLAG, None, "true or false"), (TEXTS, "wandb", "a list of texts"),
    (PAIR, [0.9], "a list of two numbers"), (MAPPING, 3, "a mapping"), (MAPPING, None, "a mapping"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "given", "value"), TAKEN)
def test_a_value_is_converted(kind: ValueKind, given: Any, value: Any) -> None:
    taken = kind.value_of(given)
    assert taken == value and type(taken) is type(value)


@pytest.mark.parametrize(("kind", "given", "expected"), REFUSED)
def test_a_value_of_another_kind_is_refused(kind: ValueKind, given: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=f"^should be {expected}$"):
        kind.value_of(given)


def test_paths_are_found_above_the_source_and_then_above_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("theirs/examples/scripts", "ours/deep"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "ours" / "deep")
    folders = Folders.around(Path("../../theirs/examples/scripts/run.sh"))
    for path in ("theirs/examples/scripts/one", "theirs/two", "ours/two", "ours/deep/three", "ours/four"):
        (tmp_path / path).write_text(path)

    def content(name: str) -> str | None:
        found = folders.find(name)
        return found.read_text() if found else None

    assert content("one") == "theirs/examples/scripts/one"
    assert content("two") == "theirs/two", "not that of the folder in which the command runs"
    assert folders.find("two") == tmp_path / "theirs" / "two", "without '..' in it"
    assert content("./three") == "ours/deep/three"
    assert content("four") == "ours/four"
    assert content("five") is None and content("") is None
    assert content(str(tmp_path / "ours" / "two")) == "ours/two"


def test_paths_are_written_as_a_run_from_here_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert path_as_written(tmp_path / "a" / "b.yaml") == "a/b.yaml"
    assert path_as_written(Path("a")) == "a"
    assert path_as_written(Path("/elsewhere/x")) == "/elsewhere/x"
