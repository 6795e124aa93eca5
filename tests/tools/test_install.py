"""The installer's parts: torchvision repair, the choice of vLLM's requirements, and the refusals of install.sh.

Not exercised here: pip itself. `make install` from an empty folder is what shows that.
"""

from __future__ import annotations

import ast
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
INSTALL = ROOT / "tools" / "install"


def bare_python(code: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    """Without site-packages (-S), so that an installed repair has no part in it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-S", "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def package(folder: Path, *, has_ops: bool) -> Path:
    """A package named torchvision that starts like the real one: `extension` first, then what needs the operators."""
    inside = folder / "torchvision"
    inside.mkdir()
    (inside / "__init__.py").write_text(
        "from . import extension\nfrom torchvision import _autograd_registrations, _meta_registrations\n"
    )
    (inside / "extension.py").write_text(f"def _has_ops():\n    return {has_ops}\n")
    for name in ("_autograd_registrations", "_meta_registrations"):
        (inside / f"{name}.py").write_text(
            "from .extension import _has_ops\n"
            "if not _has_ops():\n    raise RuntimeError('operator torchvision::nms does not exist')\n"
            "registered = True\n"
        )
    return folder


IMPORT = "import torchvision; print(hasattr(torchvision._meta_registrations, 'registered'))"
REPAIRED = "import vppo_torchvision_repair; " + IMPORT


def test_repair_lets_torchvision_without_operators_import(tmp_path: Path) -> None:
    folder = package(tmp_path, has_ops=False)
    assert "operator torchvision::nms does not exist" in bare_python(IMPORT, folder).stderr
    repaired = bare_python(REPAIRED, folder, INSTALL)
    assert (repaired.returncode, repaired.stdout) == (0, "False\n"), repaired.stderr


def test_repair_leaves_a_torchvision_with_operators_alone(tmp_path: Path) -> None:
    repaired = bare_python(REPAIRED, package(tmp_path, has_ops=True), INSTALL)
    assert (repaired.returncode, repaired.stdout) == (0, "True\n"), repaired.stderr


def test_repair_costs_a_starting_interpreter_next_to_nothing() -> None:
    code = "import sys; before = set(sys.modules); import vppo_torchvision_repair; print(set(sys.modules) - before)"
    loaded = ast.literal_eval(bare_python(code, INSTALL).stdout)
    # Aliases of the built-in importer, and `warnings`, which they import.
    assert {name.partition(".")[0] for name in loaded} <= {
        "vppo_torchvision_repair",
        "importlib",
        "warnings",
        "_warnings",
    }


def test_torchvision_imports_in_a_child_of_a_child() -> None:
    child = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', 'import torchvision']))"
    assert subprocess.run([sys.executable, "-c", child], check=False).returncode == 0


def test_vllm_requirements_leave_out_what_needs_cuda_libraries() -> None:
    run = subprocess.run(
        [sys.executable, INSTALL / "environment.py", "vllm-requirements"], capture_output=True, text=True, check=True
    )
    names = {Requirement(line).name.lower() for line in run.stdout.split("\n") if line}
    assert names.isdisjoint({"torch", "torchaudio", "torchcodec", "torchvision"})
    assert names >= {"transformers", "xgrammar", "fastapi", "numba"}
    assert ";" not in run.stdout  # markers are decided; what is for other machines or extras is gone
    assert not any(line.startswith(("zentorch", "matplotlib", "b12x")) for line in run.stdout.split("\n"))


def base_requirements() -> list[str]:
    """BASE of setup.py, read without running it."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "BASE":
            return ast.literal_eval(node.value)
    raise AssertionError("setup.py has no list BASE")


@pytest.mark.parametrize("line", base_requirements())
def test_the_environment_lies_in_the_declared_ranges(line: str) -> None:
    requirement = Requirement(line)
    installed = importlib.metadata.version(requirement.name)
    assert requirement.specifier.contains(installed, prereleases=True), f"{requirement.name} {installed}"


def install(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "tools" / "install.sh", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_install_refuses_what_cannot_work(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("not yours")
    foreign = install(VENV=str(tmp_path), PYTHON=sys.executable)
    assert foreign.returncode == 1
    assert "holds files and is no virtual environment" in foreign.stderr
    assert (tmp_path / "thesis.txt").read_text() == "not yours"

    missing = install(VENV=str(tmp_path / "new"), PYTHON="python-that-is-not-there")
    assert missing.returncode == 1
    assert "'python-that-is-not-there' does not run" in missing.stderr

    unknown = install("gpu")
    assert unknown.returncode == 2
    assert "unknown profile 'gpu'" in unknown.stderr
