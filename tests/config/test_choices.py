"""A set of choices is written once in the package: nothing keeps two copies equal."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_vppo"


def choice_sets(source: str) -> Iterator[tuple[frozenset[object], int]]:
    """(choices, line) of every `Literal[...]`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value).rpartition(".")[2] == "Literal":
            choices = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            yield frozenset(ast.literal_eval(choice) for choice in choices), node.lineno


def repeated(sources: dict[str, str]) -> list[str]:
    """Every set of choices that stands in more than one place, with the places."""
    places = defaultdict(list)
    for name, source in sources.items():
        for choices, line in choice_sets(source):
            places[choices].append(f"{name}:{line}")
    return [f"{sorted(map(str, choices))}: {', '.join(at)}" for choices, at in places.items() if len(at) > 1]


def test_every_set_of_choices_is_written_once() -> None:
    sources = {str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    assert repeated(sources) == []


def test_a_second_copy_is_found() -> None:
    sources = {
        "a.py": 'from typing import Literal\nKind = Literal["x", "y"]',
        "b.py": 'import typing\ndef f(kind: typing.Literal["y", "x"], other: typing.Literal["x"]) -> None: ...',
    }
    assert repeated(sources) == ["['x', 'y']: a.py:2, b.py:2"]


def test_every_choice_is_one_of_a_setting() -> None:
    choices = ast.parse((PACKAGE / "config" / "choices.py").read_text(encoding="utf-8"))
    names = {target.id for node in choices.body if isinstance(node, ast.Assign) for target in node.targets}
    schemas = [PACKAGE / "config" / "schema.py", PACKAGE / "config" / "evaluation.py", *PACKAGE.glob("evaluation/*.py")]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in schemas]
    used = {node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)}
    # The part of DependencyKind that names two whole distributions; NamedPerturbUnit or a number, with its range there;
    # the part of TokenScores that reads the dependency.
    assert names - used == {"Divergence", "PerturbUnit", "DEPENDENCY_SCORES"}
