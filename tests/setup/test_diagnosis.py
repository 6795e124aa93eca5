"""Findings about environments that are wrong in known ways."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from megatron_vppo.cli.main import main
from megatron_vppo.setup import diagnosis


def test_another_apex_is_told_from_nvidias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(diagnosis.apex()) == [], "none is installed"
    package = tmp_path / "apex"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('importing it may fail')\n")
    monkeypatch.syspath_prepend(tmp_path)
    (finding,) = diagnosis.apex()
    assert finding.level == "problem" and "pip uninstall apex" in finding.text

    (package / "multi_tensor_apply").mkdir()
    (finding,) = diagnosis.apex()
    assert finding.level == "note" and "without its CUDA extensions" in finding.text

    (tmp_path / "fused_weight_gradient_mlp_cuda.py").touch()
    (finding,) = diagnosis.apex()
    assert finding.level == "ok"


def test_packages_that_are_missing_or_were_not_tried(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs = ["numpy>=999", "no-such-package>=1,<2", 'also-not-there; extra == "gpu"', "packaging>=20"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: needs)
    numpy, absent, present = diagnosis.required_packages()
    assert numpy.level == "note" and ">=999" in numpy.text
    assert absent.level == "problem" and "install no-such-package<2,>=1" in absent.text
    assert present.level == "ok"
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.endswith("1 problem\n")


def test_no_engine_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    assert diagnosis.engine().level == "ok"
    monkeypatch.setattr(diagnosis, "ENGINES", ("no-such-engine",))
    assert diagnosis.engine().level == "problem"
