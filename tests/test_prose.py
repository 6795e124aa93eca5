"""Holds the words and the docstrings of all Python sources to CONTRIBUTING.md's sections "Words" and "Prose".

Read from the sources with `ast` and `tokenize`: how docstrings begin, which words stand in names, docstrings and
comments, and that no two classes of the package share a name. Standard library only, so that it runs anywhere. The
checker is itself shown planted mistakes below.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHECKED = ("megatron_vppo", "tools", "checkpoints_conversion", "examples", "tests")
NOT_CHECKED = {"tests/test_prose.py"}
"""This file, which has to spell out what it refuses."""

# A clause that stands for a noun. A docstring begins with a verb, or with a noun and its article.
CLAUSE = re.compile(r"(?:Of|What|Which|Where|Whether|How|As|For|When|Who|Whose|Why)\b")

# The first word of a function: "Packs". A reference, "See Scorer.score.", is a verb as well.
VERB = re.compile(r"[A-Z][a-z]+s|See")
PLURALS = {
    "Bytes",
    "Columns",
    "Gradients",
    "Indices",
    "Layers",
    "Layouts",
    "Lines",
    "Rows",
    "Tokens",
    "Values",
}

WORDS = {
    r"pictures?": "image",
    r"completions?": "response",
    r"masked (?:image|view|pass|score|log-prob|hidden)s?": "perturbed",
    r"trajectory scores?": "mean dependency",
    r"scored responses?": "graded response",
    r"anew": "again, or a verb with re-",
    r"but for": "except for",
    r"beside": "next to, or besides",
    r"so many": "a number, or as many as",
    r"spec (?:\d[\d.]*|section \d|[A-Z]\d)": "a file, an equation of the paper or a section of docs/",
}
"""Words that prose does not use, as patterns, with what it says instead."""

NAMES = {
    r"pictures?": "image",
    r"completions?": "response",
    r"masked": "perturbed",
    r"score_B|scored|score_groups": "dependency_mean_B; graded, grade_groups",
    r"pil": "image",
}
"""Parts of names that the project does not use, as patterns between underscores, with what it says instead."""

ALLOWED = {
    ("megatron_vppo/rollout/", "completion"): "vLLM's own word for what it returns for a request",
    ("megatron_vppo/conversion/logprobs.py", "completion"): "the same",
    ("megatron_vppo/evaluation/sampling.py", "completion"): "the same",
    ("tests/evaluation/test_sampling.py", "completion"): "the same",
    ("tests/rollout/", "completion"): "the same",
    ("tests/gpu/test_gpu_engine.py", "completion"): "the same",
    ("tests/proofs/runs.py", "completion"): "the same",
    ("megatron_vppo/observability/rollouts.py", "masked_logps"): "a field of the files, which stays",
}
"""(beginning of a path, word): why the word may stand there although the tables above say otherwise."""


REFERENCE = re.compile(r"(?<![\w/.-])(?:[\w-]+/)*[\w-]+\.(?:py|md|sh)(?!\.?\w)|\bADR \d{4}\b")
"""A file or a decision that prose leads to. A bare name is looked for in the same room, and at the root."""
ELSEWHERE = re.compile(r"(?:megatron|verl|common)/.*|accuracy\.md|file\.py|math\.py|perc_utils\.py|summary\.md")
"""References to files of other projects, of a user, or that a command makes."""


# --- Reading a source -------------------------------------------------------------------------------------------------


def docstrings_in(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of every docstring: of modules, classes and functions, and the string after a field or constant."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        for place, statement in enumerate(body):
            if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
                continue
            first = place == 0 and isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            after_field = place > 0 and isinstance(body[place - 1], ast.Assign | ast.AnnAssign)
            if isinstance(statement.value.value, str) and (first or after_field):
                yield statement.lineno, statement.value.value


def comments_in(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every run of comment lines, joined, so that a phrase over two lines is seen."""
    block: list[str] = []
    start = last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line = token.start[0]
        if line != last + 1 and block:
            yield start, " ".join(block)
            block = []
        start = line if not block else start
        block.append(token.string.lstrip("# "))
        last = line
    if block:
        yield start, " ".join(block)


def names_in(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of everything that the source names itself: functions, classes, arguments, variables, fields."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def first_words(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(function, first word of its docstring) of all functions; __init__ and properties are left out.

    A docstring that only describes arguments has no first word of its own, and neither has one that begins with the
    name of an argument.
    """
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.name == "__init__":
            continue
        text = ast.get_docstring(node) or "Args:"
        if any("property" in ast.unparse(mark) for mark in node.decorator_list) or text.startswith(("Args:", "`")):
            continue
        yield node.name, re.sub(r"\W+$", "", text.split()[0])


def words_of(name: str) -> str:
    """A name with its words between single underscores: `PackedImages` and `packed_images` both hold `_images_`."""
    return "_" + re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])", "_", name).strip("_") + "_"


# --- The checker ------------------------------------------------------------------------------------------------------


def is_allowed(path: str, used: str) -> bool:
    return any(path.startswith(place) and word in used.lower() for place, word in ALLOWED)


@cache
def files() -> frozenset[str]:
    """The files of the checkout, by their path from the root."""
    kept = (p for p in ROOT.rglob("*.*") if p.suffix in {".py", ".md", ".sh"})
    return frozenset(p.relative_to(ROOT).as_posix() for p in kept if not {".venv", "build", "runs"} & {*p.parts})


def dead_references_in(passage: str, path: str) -> list[str]:
    """The files and decisions that a passage of the file `path` names and that are not there.

    A bare name is looked for in the same room; in a test, anywhere.
    """
    room = "" if path.startswith("tests/") else "/".join(path.split("/")[:-1][:2])
    dead = []
    for name in REFERENCE.findall(passage):
        if name.startswith("ADR "):
            there = any(file.startswith(f"docs/adr/{name[4:]}-") for file in files())
        else:
            within = "" if "/" in name else room
            there = name in files() or any(f.endswith(f"/{name}") and f.startswith(within) for f in files())
        if not there and not ELSEWHERE.fullmatch(name):
            dead.append(name)
    return dead


def mistakes_in(source: str, path: str = "") -> list[str]:
    """Everything in the text of a module that CONTRIBUTING.md asks not to do, with line numbers."""
    tree = ast.parse(source)
    texts = list(docstrings_in(tree))
    found = [f"line {line}: a docstring begins with {text.split()[0]!r}" for line, text in texts if CLAUSE.match(text)]
    for line, text in [*texts, *comments_in(source)]:
        passage = re.sub(r"\s+", " ", text)
        found += [f"line {line}: nothing is called {name}" for name in dead_references_in(passage, path)]
        for pattern, instead in WORDS.items():
            for match in re.finditer(rf"(?i)(?<![\w`.]){pattern}(?![\w`(])", passage):
                if not is_allowed(path, match.group()):
                    found.append(f"line {line}: {match.group()!r} in prose; say {instead}")
    for line, name in names_in(tree):
        for pattern, instead in NAMES.items():
            if re.search(rf"(?i)_(?:{pattern})_", words_of(name)) and not is_allowed(path, name):
                found.append(f"line {line}: name {name}; say {instead}")
    return sorted(set(found), key=lambda mistake: int(mistake.split()[1].rstrip(":")))


@cache
def sources() -> dict[str, str]:
    """The text of every checked file by its path from the root."""
    files = (path for folder in CHECKED for path in sorted((ROOT / folder).rglob("*.py")))
    found = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files}
    return {path: source for path, source in found.items() if path not in NOT_CHECKED}


def classes_in(package: dict[str, str]) -> dict[str, list[str]]:
    """The files that define a class of each name; private classes and those inside functions are left out."""
    places = defaultdict(list)
    for path, source in package.items():
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(path)
    return places


# --- The package as it is ---------------------------------------------------------------------------------------------


def test_words_and_docstrings_are_as_contributing_asks() -> None:
    found = {path: mistakes_in(source, path) for path, source in sources().items()}
    assert {path: mistakes for path, mistakes in found.items() if mistakes} == {}


def test_dividing_rules_have_one_form() -> None:
    """`# --- Subject ---...`, filled up to column 120."""
    lines = [
        (path, line.strip())
        for path, source in sources().items()
        for line in source.splitlines()
        if re.match(r"\s*# ?--", line) and not (re.fullmatch(r"\s*# --- [^-].*[^-] -+", line) and len(line) == 120)
    ]
    assert lines == []


def test_functions_begin_with_a_verb() -> None:
    """The first word ends in s and is no plural. Tests are left out: their docstrings are statements."""
    found = [
        (path, name, word)
        for path, source in sources().items()
        if not path.startswith("tests/")
        for name, word in first_words(ast.parse(source))
        if not VERB.fullmatch(word) or word in PLURALS
    ]
    assert found == []


def test_every_room_says_what_it_is_for() -> None:
    """The docstring of a package's __init__ is the sign on its door."""
    rooms = {path: source for path, source in sources().items() if path.endswith("__init__.py")}
    assert len(rooms) > 20
    assert [path for path, source in rooms.items() if ast.get_docstring(ast.parse(source)) is None] == []


def test_no_two_classes_share_a_name() -> None:
    package = {path: source for path, source in sources().items() if path.startswith("megatron_vppo/")}
    shared = {name: places for name, places in classes_in(package).items() if len(places) > 1}
    assert shared == {}


def test_the_checker_reads_enough_to_be_worth_it() -> None:
    """A reader that finds nothing would pass everything."""
    trees = [ast.parse(source) for source in sources().values()]
    assert len(trees) > 150
    assert sum(1 for tree in trees for _ in docstrings_in(tree)) > 900
    assert sum(1 for source in sources().values() for _ in comments_in(source)) > 150


# --- Planted mistakes: the check has to see each of them --------------------------------------------------------------

PLANTED = [
    ('"""Of the table."""', "begins with 'Of'"),
    ('def f():\n    """What a rank holds."""', "begins with 'What'"),
    ('class A:\n    """Whether it is so."""', "begins with 'Whether'"),
    ('class A:\n    x: int\n    """Where it lies."""', "begins with 'Where'"),
    ('X = 1\n"""For checkpoint and export."""', "begins with 'For'"),
    ('def f():\n    """As f."""', "begins with 'As'"),
    ('"""Packs the pictures of a row."""', "'pictures' in prose"),
    ("# One row for each\n# masked\n# image.\n", "'masked image' in prose"),
    ("# Built anew.\n", "'anew' in prose"),
    ('"""The rule (spec 1.2)."""', "'spec 1.2' in prose"),
    ('"""See nowhere.py."""', "nothing is called nowhere.py"),
    ('"""See loop.py."""', "nothing is called loop.py"),
    ('"""See trainer/lop.py."""', "nothing is called trainer/lop.py"),
    ("# ADR 0999 says so.\n", "nothing is called ADR 0999"),
    ("def picture_of(): ...", "name picture_of"),
    ("class PackedPictures: ...", "name PackedPictures"),
    ("masked_hidden_NH = 1", "name masked_hidden_NH"),
    ("def f(completion): ...", "name completion"),
    ("self.score_B = 1", "name score_B"),
]


def test_planted_mistakes_are_found() -> None:
    missed = [
        (text, mistake) for text, mistake in PLANTED if not any(mistake in m for m in mistakes_in(text, "tools/x.py"))
    ]
    assert missed == []


def test_planted_nouns_are_found() -> None:
    source = 'def f():\n    """The rows."""\ndef g():\n    """Packs, then pads."""\ndef h(x):\n    """`x`: a row."""'
    assert [(name, bool(VERB.fullmatch(word))) for name, word in first_words(ast.parse(source))] == [
        ("f", False),
        ("g", True),
    ]


def test_planted_namesakes_are_found() -> None:
    package = {"a.py": "class Plan: ...", "b.py": "class Plan: ...\nclass _Plan: ...", "c.py": "class _Plan: ..."}
    assert {name: places for name, places in classes_in(package).items() if len(places) > 1} == {
        "Plan": ["a.py", "b.py"]
    }


RIGHT = '''
"""Packs responses. What a rank holds is said further on, of course: trainer/loop.py, README.md, ADR 0001."""

X = tensor.masked_fill(mask, 0)  # an image, a response; `picture` is only a name here

def fill(image, response):
    """Fills an image. CompletionOutput is vLLM's."""
'''


def test_what_is_right_passes() -> None:
    assert mistakes_in(RIGHT) == []


def test_a_word_is_allowed_in_its_place_only() -> None:
    assert mistakes_in("completion = 1", "megatron_vppo/rollout/engine.py") == []
    assert mistakes_in("completion = 1", "megatron_vppo/trainer/loop.py") != []
