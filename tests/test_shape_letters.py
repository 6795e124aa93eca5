"""Shape letters mean the same in every file of the package. The alphabet is the table in CONTRIBUTING.md, Notation.

A name carries its tensor's shape as a suffix: `advantage_BT` is [responses, response tokens]. The suffix is what comes
after the last underscore of a name whose other characters are lower-case letters, digits and underscores. It consists
of capital letters, `h` and digits, with at least one letter. So `bf16` and `MAX_T` have none. Digits are literal sizes:
`positions_3K` is [3, packed tokens]. Shapes in docstrings, as in "[B, T] float32", use the same letters.

Every module with such names or shapes has a legend in its docstring, one sentence: "Shape suffix legend: B = responses;
T = response tokens (right-padded)." It explains exactly the letters that the module uses. An explanation is the
alphabet's if it contains the alphabet's words in bold type.

Standard library only. Also a program: `python tests/test_shape_letters.py` prints the violations.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megatron_vppo"

_NAME = re.compile(r"_*[a-z][a-z0-9_]*_(?P<suffix>[A-Zh0-9]*[A-Zh][A-Zh0-9]*)")
_TABLE_ROW = re.compile(r"^\| `(?P<letter>[A-Zh])` \| (?P<meaning>.+) \|$", re.MULTILINE)
_LEGEND = re.compile(r"[Ss]hape suffix legend:\s+(?P<text>.*?)\.(?:\s|$)", re.DOTALL)
_EXPLAINED = re.compile(r"(?:^|[;,]\s+)(?P<letters>(?:[A-Zh],\s+)*[A-Zh])\s+=\s+")
_SHAPE = re.compile(r"\[([^\[\]]*)\]")
_SHAPE_LETTER = re.compile(r"(?<![\w.])[A-Zh](?![\w.])")


def read_alphabet() -> dict[str, tuple[str, ...]]:
    """The words that an explanation of each letter has to contain."""
    notation = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("### Notation")[2]
    return {row["letter"]: tuple(re.findall(r"\*\*(.+?)\*\*", row["meaning"])) for row in _TABLE_ROW.finditer(notation)}


def names_in(tree: ast.Module) -> Iterator[str]:
    """Every variable, argument, attribute, keyword, function and class that the module names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.arg | ast.keyword):
            yield node.arg or ""
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name


def docstrings_in(tree: ast.Module) -> Iterator[str]:
    """Docstrings of modules, classes, functions, fields and constants."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value.value


def suffix_letters(name: str) -> set[str]:
    found = _NAME.fullmatch(name)
    return {letter for letter in found["suffix"] if not letter.isdigit()} if found else set()


def used_letters(tree: ast.Module) -> set[str]:
    used: set[str] = set().union(*map(suffix_letters, names_in(tree)))
    for text in docstrings_in(tree):
        for shape in _SHAPE.findall(text):
            used.update(_SHAPE_LETTER.findall(shape))
    return used


def legend_of(tree: ast.Module) -> dict[str, str]:
    """The explanation of each letter in the module's docstring."""
    sentence = _LEGEND.search(ast.get_docstring(tree) or "")
    if not sentence:
        return {}
    text = " ".join(sentence["text"].split())
    entries = list(_EXPLAINED.finditer(text))
    ends = [*(entry.start() for entry in entries[1:]), len(text)]
    return {
        letter: text[entry.end() : end]
        for entry, end in zip(entries, ends, strict=True)
        for letter in entry["letters"].split(", ")
    }


def violations_in(source: str, alphabet: dict[str, tuple[str, ...]]) -> list[str]:
    tree = ast.parse(source)
    used, legend = used_letters(tree), legend_of(tree)
    found = [f"{letter} is not in the alphabet" for letter in sorted(used - alphabet.keys())]
    found += [f"the legend does not explain {letter}" for letter in sorted(used - legend.keys())]
    found += [f"the legend explains {letter}, which nothing uses" for letter in sorted(legend.keys() - used)]
    for letter, meaning in legend.items():
        missing = [word for word in alphabet.get(letter, ()) if word.lower() not in meaning.lower()]
        if missing:
            found.append(f"{letter} = {meaning!r} is not the alphabet's, which says {', '.join(map(repr, missing))}")
    return found


def all_violations() -> list[str]:
    alphabet = read_alphabet()
    return [
        f"{path.relative_to(ROOT).as_posix()}: {found}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for found in violations_in(path.read_text(encoding="utf-8"), alphabet)
    ]


# --- The package as it is ---------------------------------------------------------------------------------------------


def test_shape_letters_are_those_of_the_alphabet_and_explained() -> None:
    assert all_violations() == []


def test_the_alphabet_was_read() -> None:
    alphabet = read_alphabet()
    assert alphabet["B"] == ("responses",)
    assert {"h", "T", "V", "Z"} <= alphabet.keys()
    assert all(alphabet.values()), "every letter has a word that its explanations contain"


# --- Planted violations -----------------------------------------------------------------------------------------------

ALPHABET = {"B": ("responses",), "T": ("response tokens",), "h": ("hidden size",), "V": ("vocabulary",)}
LEGEND = '"""Says something.\n\nShape suffix legend: {}. More prose, in which V = nothing.\n"""\n'
BT = LEGEND.format("B = responses of a step; T = response tokens\n(right-padded)")

PLANTED = {
    "letter without legend": ("mask_B = 1", "the legend does not explain B"),
    "argument": ("def f(mask_B): pass", "the legend does not explain B"),
    "attribute": ("print(x.mask_B)", "the legend does not explain B"),
    "keyword": ("f(mask_B=1)", "the legend does not explain B"),
    "field": ("class A:\n    mask_B: int", "the legend does not explain B"),
    "method": ("class A:\n    def weight_Vh(self): pass", "the legend does not explain h"),
    "private name": ("_mask_B = 1", "the legend does not explain B"),
    "shape in a docstring": ('def f():\n    """[B, 3]."""', "the legend does not explain B"),
    "letter of no alphabet": (LEGEND.format("Q = queries") + "mask_Q = 1", "Q is not in the alphabet"),
    "letter beside a digit": ("mask_3B = 1", "the legend does not explain B"),
    "unused letter": (BT + "mask_B = 1", "the legend explains T, which nothing uses"),
    "other meaning": (
        LEGEND.format("B = bytes") + "mask_B = 1",
        "B = 'bytes' is not the alphabet's, which says 'responses'",
    ),
    "letters explained together": (
        LEGEND.format("B, T = responses and their tokens") + "mask_BT = 1",
        "T = 'responses and their tokens' is not the alphabet's, which says 'response tokens'",
    ),
}


@pytest.mark.parametrize(("source", "expected"), PLANTED.values(), ids=PLANTED)
def test_planted_violations_are_caught(source: str, expected: str) -> None:
    assert expected in violations_in(source, ALPHABET)


LEGAL = {
    "complete legend": BT + "def f(mask_BT):\n    mask_B = mask_BT.sum(1)",
    "letters in docstrings only": BT + 'def f(mask):\n    """[B, T] float32; the mask lies in [0, 1]."""',
    "constants and numbers": "MAX_T = 1\nE4M3_MAX = bf16 = layer_0 = linear_fc1 = 2\nclass NotA_B: pass",
    "lower-case suffixes": "grids_thw = positions = 1",
}


@pytest.mark.parametrize("source", LEGAL.values(), ids=LEGAL)
def test_legal_names_pass(source: str) -> None:
    assert violations_in(source, ALPHABET) == []


if __name__ == "__main__":
    problems = all_violations()
    print("\n".join(problems) or "every shape letter is explained as in the alphabet")
    sys.exit(bool(problems))
