"""`vppo doctor` on this machine."""

from __future__ import annotations

import importlib.metadata

import pytest

from megatron_vppo.cli.main import main


def test_an_environment_that_runs_the_tests_has_no_problem(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "0 problems"
    version = importlib.metadata.version("megatron-core")
    assert f"  ok       megatron-core {version}" in lines
