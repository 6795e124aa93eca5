"""A default value of a setting is written once, in the schema: no parameter or field of another room repeats it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from megatron_vppo.config.schema import RunConfig, Section

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_vppo"

OFF = (None, False, 0, 1, (), "frozenset()")
"""Values that leave something out, which every caller means alike."""

ALLOWED = {
    ("models/options.py", "recompute"): "PLAIN, the model that conversion and tests build without a configuration",
    ("models/options.py", "vision_split"): "the same",
    ("models/options.py", "backend"): "the same",
    ("parallel/layout.py", "vision_split"): "the layout of that model",
    ("rollout/records.py", "weight_transfer"): "the way that works everywhere",
    ("models/layers/norm.py", "eps"): "of a norm, not of the optimizer",
    ("rollout/records.py", "temperature"): "the model's own distribution, for a log-prob check",
    ("rollout/records.py", "top_p"): "the same",
    ("rollout/records.py", "top_k"): "the same",
    ("sweep/sweep_file.py", "seeds"): "a bound of its own: the seeds of a sweep, where rollout.seeds is a kind of seed",
    **{
        ("evaluation/suite.py", name): "a setting of a benchmark, with a default of its own"
        for name in (
            *("prompt_key", "answer_key", "image_key"),
            *("relative_tolerance", "absolute_tolerance", "iou_threshold"),
        )
    },
    **{
        ("evaluation/question.py", name): "of a rule whose grader has no such setting"
        for name in ("relative_tolerance", "absolute_tolerance", "iou_threshold")
    },
    ("evaluation/settings.py", "seed"): "of an evaluation, which has no trainer",
}
"""(file, name): why a default may stand there."""


def setting_names(section: type[Section] = RunConfig) -> Iterator[str]:
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            yield from setting_names(inner)
        else:
            yield name


def defaults_in(source: str) -> Iterator[tuple[str, ast.expr]]:
    """(name, default) of every parameter and of every field of a class."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and line.value is not None and isinstance(line.target, ast.Name):
                    yield line.target.id, line.value
        elif isinstance(node, ast.FunctionDef):
            positional = [*node.args.posonlyargs, *node.args.args]
            pairs = [
                *zip(positional[len(positional) - len(node.args.defaults) :], node.args.defaults, strict=True),
                *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True),
            ]
            yield from ((argument.arg, default) for argument, default in pairs if default is not None)


def copies_in(source: str, names: set[str]) -> list[str]:
    """The names of settings that have a default in the source, other than one that leaves something out."""
    found = []
    for name, default in defaults_in(source):
        try:
            value = ast.literal_eval(default)
        except ValueError:
            value = ast.unparse(default)
        if name in names and not any(value is off or (value == off and type(value) is type(off)) for off in OFF):
            found.append(name)
    return found


def test_no_default_outside_the_schema() -> None:
    names = set(setting_names())
    assert {"max_num_seqs", "shuffle", "kind"} <= names
    found = {
        (path.relative_to(PACKAGE).as_posix(), name)
        for path in PACKAGE.rglob("*.py")
        if path.parent.name != "config"
        for name in copies_in(path.read_text(encoding="utf-8"), names)
    }
    assert found == ALLOWED.keys()


def test_planted_copies_are_found() -> None:
    source = "class A:\n    probability: float = 0.5\ndef f(shuffle=True, *, n=8, image_dir=None, other=3): ..."
    assert copies_in(source, {"probability", "shuffle", "n", "image_dir"}) == ["probability", "shuffle", "n"]
