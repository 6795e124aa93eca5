"""Launch scripts are read as bash reads them: what bash itself passes on is what is expected."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from megatron_vppo.importing.shell_script import Word, words_of_run
from tests.importing.authors import SCRIPT_7B, SCRIPT_8B

SCRIPTS = {
    "plain": "python3 -m verl.trainer.main a.b=1 c.d=two",
    "continued": "python3 -m verl.trainer.main \\\n    a=1 \\\n    b=2\n",
    "continued without blanks": "python3 -m verl.trainer.main a=1\\\n2",
    "no end of line": "X=1\npython3 -m verl.trainer.main a=$X",
    "variables": 'X=1\nY="v${X}w"\npython3 -m verl.trainer.main a=$Y b=${Y} c=x$X.y d=\'$X\' e="$X"',
    "the last assignment holds": "X=1\nX=2; X=3\npython3 -m verl.trainer.main a=$X\nX=4",
    "exports": "export X=1 Y='2 3'\nreadonly Z=4\npython3 -m verl.trainer.main a=$X b=\"$Y\" c=$Z",
    "appended": "X=a\nX+=b\nX+=c\npython3 -m verl.trainer.main a=$X",
    "lists": "python3 -m verl.trainer.main a=['console','wandb'] b=[0.9,0.999] c=\"['x', 'y']\"",
    "three quotes": 'X="""Think first, then $ answer."""\npython3 -m verl.trainer.main a="${X}" b="""c d"""',
    "lines in quotes": 'X="one\ntwo"\npython3 -m verl.trainer.main a="$X" b=\'three\nfour\'',
    "escapes": 'python3 -m verl.trainer.main a=\\\\boxed b="\\\\boxed\\{\\}" c=\'\\boxed\' d="\\$X \\"q\\"" e=a\\ b',
    "a line continued in quotes": 'python3 -m verl.trainer.main a="one\\\ntwo"',
    "comments": "# first\nX=1 # second\npython3 -m verl.trainer.main a=$X b=c#d  # third\n",
    "defaults": 'X=\npython3 -m verl.trainer.main a=${X:-1} b=${NOT_SET_HERE-2} c=${NOT_SET_HERE:-"3"} d=${X-4}',
    "unset": 'python3 -m verl.trainer.main a=$NOT_SET_HERE b=x${NOT_SET_HERE}y ${NOT_SET_HERE} "$NOT_SET_HERE"c=3',
    "arguments": 'python3 -m verl.trainer.main a=1 $@ "$@" b=$* $1',
    "split values": 'ARGS="a=1  b=2"\npython3 -m verl.trainer.main x$ARGS "$ARGS" $ARGS/y',
    "an assignment is not split": 'X="1 2"\nY=$X\npython3 -m verl.trainer.main a="$Y"',
    "other commands": "set -x\ncd . || true\necho hi >/dev/null 2>&1; X=1\npython3 -m verl.trainer.main a=$X",
    "variables before it": "X=1 OTHER=2 python3 -m verl.trainer.main a=1",
    "and then": "X=5\ntrue && python3 -m verl.trainer.main a=$X",
    "into a log": "python3 -m verl.trainer.main a=1 2>&1 | cat",
    "with a redirection": "python3 -m verl.trainer.main a=1 2>/dev/null b=2",
    "short names of files": "echo >e; python3 -m verl.trainer.main a=1 2>f b=2 >g c=3",
    "a dollar": 'python3 -m verl.trainer.main a=1$ b="$" c=$.x',
    "a prefix that is not set": "$NOT_SET_HERE python3 -m verl.trainer.main a=1",
    "a declaration behind it": "$NOT_SET_HERE export X=1\npython3 -m verl.trainer.main a=$X",
    "a path": "python3 verl/trainer/main.py a=1",
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_words_are_those_of_bash(script: str, tmp_path: Path) -> None:
    """bash runs the script with a python3 that writes down what it is called with; empty words are left out."""
    program = tmp_path / "python3"
    program.write_text('#!/bin/bash\nfor word in "$@"; do printf \'%s\\0\' "$word"; done > ' + f"{tmp_path}/words\n")
    program.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", script], check=True, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL)
    words = (tmp_path / "words").read_text().split("\0")[:-1]
    expected = [word for word in words if word and word not in ("-m", "verl.trainer.main", "verl/trainer/main.py")]
    assert [word.text for word in words_of_run(script, name="x.sh", environment={})] == expected


@pytest.mark.parametrize("script", [SCRIPT_7B, SCRIPT_8B], ids=["7b", "8b"])
def test_the_authors_words_are_those_of_bash(script: str, tmp_path: Path) -> None:
    test_words_are_those_of_bash(script, tmp_path)


def test_variables_without_a_value_are_named() -> None:
    script = 'A="x${MISSING}"\nB=$(nproc)\nC=`nproc`\npython3 -m verl.trainer.main a=$A b=$B c=$C d=$A$GONE e=1 f=$?'
    assert words_of_run(script, name="x.sh", environment={}) == [
        Word("a=x", ("MISSING",)), Word("b=", ("$(...)",)), Word("c=", ("`...`",)), Word("d=x", ("MISSING", "GONE")),
        Word("e=1"), Word("f=", ("$?",)),
    ]  # fmt: skip


def test_the_environment_has_what_the_script_does_not_set() -> None:
    script = "A=1\npython3 -m verl.trainer.main a=$A b=$B c=${C:-3}"
    words = words_of_run(script, name="x.sh", environment={"A": "9", "B": "2", "C": "4"})
    assert words == [Word("a=1"), Word("b=2"), Word("c=4")]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("if true; then\nX=1\nfi\n", "x.sh, line 1: 'if' is not read"),
        ("A=1\nfor x in 1 2; do\n", "line 2: 'for' is not read"),
        ("\nif true; then\n", "line 2: 'if' is not read"),
        ("f() {\n}\n", "line 1: '(' is not read"),
        ("{ A=1; }", "'{' is not read"),
        ("A=(1 2)\n", "A=(, an array, is not read"),
        ("A=1\n[ -z x ] && A=2\n", "line 2: A= after && or || is not read"),
        ("true ||\nA=2\n", "A= after && or || is not read"),
        ("echo ${A[@]}\n", "${A[@]} is not read"),
        ("echo ${A:-$B}\n", "${A:-$B} is not read"),
        ("cat <<EOF\nx\nEOF\n", "'<<' is not read"),
        ("A='one\n", "' that is missing is not read"),
        ('A="one\n', "a quote that does not end is not read"),
        ("A=$(one\n", "a bracket that does not end is not read"),
        ("echo ${A\n", "} that is missing is not read"),
    ],
)
def test_what_is_more_than_assignments_and_commands_is_refused(script: str, message: str) -> None:
    with pytest.raises(ValueError, match="give its configuration and overrides instead") as caught:
        words_of_run(f"{script}\npython3 -m verl.trainer.main a=1\n", name="x.sh", environment={})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("script", "times"), [("python3 -m other.main a=1", 0), ("python3 -m verl.trainer.main\n" * 2, 2)]
)
def test_a_script_calls_the_program_once(script: str, times: int) -> None:
    with pytest.raises(ValueError, match=rf"x\.sh calls verl\.trainer\.main {times} times"):
        words_of_run(script, name="x.sh", environment={})
