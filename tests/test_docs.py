"""README and docs name only what exists: files, folders, make targets, `vppo` subcommands, settings, tests, links.

Only code is looked at (`spans`, fenced and indented blocks) and the targets of links; prose may say what it likes. HTML
comments are left out. The checker is itself shown planted mistakes below: it has to see each of them.
"""

from __future__ import annotations

import ast
import os
import re
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from megatron_vppo.config.load import load_config
from megatron_vppo.config.schema import RunConfig, Section

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])

NOT_SHIPPED = frozenset(
    {"my_run.yaml", "my_reward.py", "file.py", "utils.py", "chat_template.jinja", "train_vppo_7b.sh"}
    | {"settings.yaml", "summary.md"}
)
"""Names of a user's own files or of a model's, a script of the authors, the one that is never to be, and files of an
evaluation's folder."""
MADE_LATER = ("runs/", "build/", ".venv")
"""Folders that are made by running something."""
RUN_FOLDER = frozenset(
    {"tensorboard/", "rollouts/", "validation/", "logs/", "checkpoints/", "huggingface/", "dist_ckpt/", "responses/"}
)
IN_RUN_FOLDER = re.compile(r"(step_|global_step_|engine_)[NK\d]")

KINDS_OF_FILES = "py|md|sh|yaml|toml|jinja|png|css|js"
FILE = re.compile(rf"(?:[\w.<>*-]+/)*[\w.*-]+\.(?:{KINDS_OF_FILES})(?![\w.])")
FOLDER = re.compile(r"(?:[\w.<>*-]+/)+")
SETTING = re.compile(rf"(?<![\w./-])(?:{'|'.join(RunConfig.model_fields)})(?:\.[a-z_]\w*)+(?![\w./(])")
NOT_SETTINGS = re.compile(rf"\.(?:{KINDS_OF_FILES}|safetensors|json|jsonl|parquet)$")


# --- Reading a document -----------------------------------------------------------------------------------------------


def code_in(text: str) -> Iterator[str]:
    """Code spans, and the lines of fenced and indented blocks."""
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    prose, in_fence, previous_blank, in_block = [], False, True, False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            in_fence = not in_fence
            continue
        in_block = line.startswith("    ") and (in_block or previous_blank)
        previous_blank = not line.strip() or (previous_blank and in_block)
        if in_fence or in_block:
            yield line
        else:
            prose.append(line)
    for span in re.findall(r"`([^`]+)`", "\n".join(prose)):
        yield span.replace("\n", " ")


def links_in(text: str) -> Iterator[tuple[str, str]]:
    """(path, anchor) of every link that stays within the repository; either may be empty."""
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)):
        if not re.match(r"[a-z]+://|mailto:", target):
            path, _, anchor = target.partition("#")
            yield path, anchor


def anchors_in(text: str) -> set[str]:
    """The anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


# --- What exists ------------------------------------------------------------------------------------------------------


@cache
def existing() -> tuple[frozenset[str], frozenset[str]]:
    """Files and folders (these with a closing slash) of the checkout, each by every ending of its path."""
    files, folders = set(), set()
    for base, names, leaves in os.walk(ROOT):
        names[:] = [n for n in names if (n == ".ci" or not n.startswith((".", "__"))) and n not in ("runs", "build")]
        parts = Path(base).relative_to(ROOT).parts
        for leaf in leaves:
            files.update("/".join([*parts, leaf][i:]) for i in range(len(parts) + 1))
        folders.update("/".join(parts[i:]) + "/" for i in range(len(parts)))
    return frozenset(files), frozenset(folders)


@cache
def make_targets() -> frozenset[str]:
    return frozenset(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


@cache
def subcommands() -> frozenset[str]:
    tree = ast.parse((ROOT / "megatron_vppo/cli/main.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
    adding = [node for node in calls if ast.unparse(node.func).rpartition(".")[2] in ("add", "add_parser")]
    return frozenset(str(node.args[0].value) for node in adding if isinstance(node.args[0], ast.Constant))


@cache
def known_tests() -> frozenset[str]:
    """Functions `test_...`, and modules by the same pattern."""
    files = list((ROOT / "tests").rglob("test_*.py"))
    functions = {n for file in files for n in re.findall(r"^def (test_\w+)", file.read_text(), flags=re.MULTILINE)}
    return frozenset(functions | {file.stem for file in files})


def is_setting(name: str) -> bool:
    """Returns True if the dotted name is a setting or a section."""
    model: type[Section] | None = RunConfig
    for key in name.split("."):
        if model is None or key not in model.model_fields:
            return False
        annotation = model.model_fields[key].annotation
        is_section = typing.get_origin(annotation) is None and issubclass(typing.cast(type, annotation), Section)
        model = typing.cast(type[Section], annotation) if is_section else None
    return True


# --- The checker ------------------------------------------------------------------------------------------------------


def mistakes_in(text: str, folder: Path) -> list[str]:
    """Everything that the text of a document in `folder` names and that does not exist."""
    found = []
    for path, anchor in links_in(text):
        if not (folder / path).exists():
            found.append(f"link to {path}")
        elif anchor and anchor not in anchors_in((folder / path).read_text(encoding="utf-8") if path else text):
            found.append(f"link to {path}#{anchor}")
    for code in code_in(text):
        found += _paths(code)
        found += [f"make {t}" for t in re.findall(r"\bmake ([a-z][\w-]*)", code) if t not in make_targets()]
        found += [f"vppo {c}" for c in re.findall(r"\bvppo ([a-z][\w-]*)", code) if c not in subcommands()]
        for name in SETTING.findall(code):
            if not NOT_SETTINGS.search(name) and not is_setting(name):
                found.append(f"setting {name}")
        found += [f"test {t}" for t in re.findall(r"(?<![\w/])test_\w+", code) if t not in known_tests()]
    return found


def _paths(code: str) -> list[str]:
    files, folders = existing()
    found = []
    for word in re.split(r"[\s`'\"(),;=:]+", code):
        if "://" in word or "<" in word or "*" in word or "..." in word or word.startswith(MADE_LATER):
            continue
        word = word.removeprefix("./").removeprefix("../")
        if IN_RUN_FOLDER.search(word) or word in RUN_FOLDER:
            continue
        if FILE.fullmatch(word):
            if word not in files and word not in NOT_SHIPPED:
                found.append(f"file {word}")
        elif FOLDER.fullmatch(word) and word not in folders:
            found.append(f"folder {word}")
    return found


def too_long_in(text: str) -> list[int]:
    """Numbers of the lines over 120 columns. Only rows of tables may be longer."""
    lines = enumerate(text.splitlines(), start=1)
    return [number for number, line in lines if len(line) > 120 and not line.startswith("|")]


# --- The documents as they are ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_names_exists(path: Path) -> None:
    assert mistakes_in(path.read_text(encoding="utf-8"), path.parent) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_have_at_most_120_columns(path: Path) -> None:
    assert too_long_in(path.read_text(encoding="utf-8")) == []


def test_a_planted_long_line_is_found() -> None:
    long = "word " * 30
    assert too_long_in(f"short\n{long}\n") == [2]
    assert too_long_in(f"| a | {long} |\n") == []


def test_the_documents_name_enough_to_be_worth_checking() -> None:
    """An extraction that finds nothing would pass everything."""
    code = "\n".join(line for path in DOCUMENTS for line in code_in(path.read_text(encoding="utf-8")))
    assert len(set(SETTING.findall(code))) > 40
    assert len(set(FILE.findall(code))) > 60
    assert {"demo", "test", "test-compat"} <= set(re.findall(r"\bmake ([a-z][\w-]*)", code))
    assert {"train", "report"} <= set(re.findall(r"\bvppo ([a-z]\w*)", code))


def messages_in(source: str) -> Iterator[str]:
    """Every string of a module; an f-string with "..." for each value in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(v.value) if isinstance(v, ast.Constant) else "..." for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_quoted_messages_are_ours() -> None:
    """The first column of the table of errors: `parts of ... a message`, or vLLM's `message`."""
    text = (ROOT / "docs/debugging.md").read_text(encoding="utf-8").partition("## Errors and what to do")[2]
    quoted = re.findall(r"^\| `([^`]+)`", text.partition("\n## ")[0], flags=re.MULTILINE)
    assert len(quoted) > 12
    ours = [m for path in (ROOT / "megatron_vppo").rglob("*.py") for m in messages_in(path.read_text())]
    ours += [path.read_text() for path in (ROOT / "tools").rglob("*") if path.suffix in {".sh", ".py"}]
    fragments = {part.strip(" ()") for message in quoted for part in message.split("...")} - {""}
    assert sorted(part for part in fragments if not any(part in own for own in ours)) == []


def test_yaml_in_the_readme_is_a_whole_configuration(tmp_path: Path) -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    assert blocks
    for number, block in enumerate(blocks):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block)
        config = load_config(path)
        assert config.data.rollout_batch_size % config.actor.global_batch_size == 0


# --- Planted mistakes -------------------------------------------------------------------------------------------------

PLANTED = [
    ("Run `make everything`.", "make everything"),
    ("\n    make tset   # all tests\n", "make tset"),
    ("Look with `vppo inspect RUN`.", "vppo inspect"),
    ("\n    .venv/bin/vppo trian --config x\n", "vppo trian"),
    ("`vppo fp8-check`", "vppo fp8-check"),
    ("Set `rollout.number=4`.", "setting rollout.number"),
    ("Set `algorithm.perturb.stages`.", "setting algorithm.perturb.stages"),
    ("Set `rollout.n.k=4`.", "setting rollout.n.k"),
    ("```\nvppo train --config my_run.yaml actor.lr=1\n```", "setting actor.lr"),
    ("See `megatron_vppo/trainer/lop.py`.", "file megatron_vppo/trainer/lop.py"),
    ("See `dependencies.py`.", "file dependencies.py"),
    ("It is in `megatron_vppo/training/`.", "folder megatron_vppo/training/"),
    ("\n    megatron_vppo/\n      controllers/     nothing\n", "folder controllers/"),
    ("[here](docs/nowhere.md#part)", "link to docs/nowhere.md"),
    ("[here](docs/algorithm.md#the-part)", "link to docs/algorithm.md#the-part"),
    ("# A title\n[here](#another-title)", "link to #another-title"),
    ("![picture](docs/images/no_such_picture.png)", "link to docs/images/no_such_picture.png"),
    ("`tests/parallel/test_nothing.py`", "file tests/parallel/test_nothing.py"),
    ("Shown by `test_that_all_is_well`.", "test test_that_all_is_well"),
]


@pytest.mark.parametrize(("text", "mistake"), PLANTED, ids=[text.strip()[:40] for text, _ in PLANTED])
def test_planted_mistakes_are_found(text: str, mistake: str) -> None:
    assert mistakes_in(text, ROOT) == [mistake]


RIGHT = """
# Title

Prose may say make haste, vppo nonsense and nowhere.py. <!-- `make nothing` and [x](gone.png) -->

`make demo ARGS="rollout.n=4"`, `vppo report RUN`, `tests/test_docs.py`, `grouping.py`, `megatron_vppo/models/*.py`,
`reward.reward_function=my_reward.py:grade`, `algorithm.perturb`, `model.safetensors`, `actor/pg_loss`,
`runs/<project>/<experiment>/`, `file.py:function`, `test_equals_transformers`.
[Docs](docs/algorithm.md#what-is-computed), [top](#title) and
[paper](https://arxiv.org/abs/1).

    make install                # and then
    .venv/bin/vppo train --config examples/digits_cpu/config.yaml trainer.seed=2
"""


def test_what_is_right_passes() -> None:
    assert mistakes_in(RIGHT, ROOT) == []
