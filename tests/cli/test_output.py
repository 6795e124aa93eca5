"""Lines of commands on the terminal."""

from __future__ import annotations

import pytest

from megatron_vppo.cli.output import say


def test_text_of_others_sends_nothing_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    say("train data: 1 of 2 rows kept\n  bad row left out: \x1b[2J\u202e")
    assert capsys.readouterr().out == "train data: 1 of 2 rows kept\n  bad row left out: ␛[2J<U+202E>\n"
