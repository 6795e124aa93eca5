"""A process loads the cuDNN of torch's wheels before Megatron imports TransformerEngine, and no other one."""

from __future__ import annotations

import _ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LOADED = """
import os
import megatron_vppo
maps = open("/proc/self/maps").read()
print(os.environ.get("CUDNN_HOME"), *(part for part in ("libcudnn.so.9", "libcudnn_graph.so.9") if part in maps))
"""


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """Makes a folder with the packages `transformer_engine` and `nvidia.cudnn`, whose libraries are small ones."""
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").touch()
    folder = tmp_path / "nvidia" / "cudnn" / "lib"
    folder.mkdir(parents=True)
    for part in ("libcudnn.so.9", "libcudnn_graph.so.9"):
        shutil.copy(_ctypes.__file__, folder / part)
    return tmp_path


def loaded(wheels: Path, **variables: str) -> list[str]:
    """Returns CUDNN_HOME, and the parts of cuDNN that a process has after its first import of ours."""
    root = Path(__file__).resolve().parents[2]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CUDNN_")}
    environment |= {"PYTHONPATH": f"{wheels}:{root}", **variables}
    ended = subprocess.run([sys.executable, "-c", LOADED], env=environment, capture_output=True, text=True, check=True)
    return ended.stdout.split()


def test_every_part_is_loaded_and_the_folder_named(wheels: Path) -> None:
    assert loaded(wheels) == [str(wheels / "nvidia/cudnn"), "libcudnn.so.9", "libcudnn_graph.so.9"]


def test_a_process_whose_parent_named_the_folder_loads_them_too(wheels: Path) -> None:
    assert len(loaded(wheels, CUDNN_HOME=str(wheels / "nvidia/cudnn"))) == 3


@pytest.mark.parametrize("name", ["CUDNN_HOME", "CUDNN_PATH"])
def test_another_cudnn_that_the_user_names_stays(wheels: Path, name: str) -> None:
    home, *parts = loaded(wheels, **{name: "/opt/cudnn"})
    assert home == ("/opt/cudnn" if name == "CUDNN_HOME" else "None")
    assert parts == []


def test_a_part_that_cannot_be_loaded_is_no_error(wheels: Path) -> None:
    (wheels / "nvidia/cudnn/lib/libcudnn.so.9").write_bytes(b"half a library")
    assert loaded(wheels)[0] == "None"


def test_a_module_of_another_kind_is_no_error(wheels: Path) -> None:
    shutil.rmtree(wheels / "nvidia")
    (wheels / "nvidia.py").touch()
    assert loaded(wheels) == ["None"]


def test_of_two_folders_the_one_with_libraries_counts(wheels: Path) -> None:
    (wheels / "first" / "nvidia" / "cudnn").mkdir(parents=True)
    environment = f"{wheels / 'first'}:{wheels}"
    assert loaded(Path(environment))[0] == str(wheels / "nvidia/cudnn")


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is not None, reason="TransformerEngine is installed")
def test_nothing_is_loaded_without_transformer_engine(wheels: Path) -> None:
    shutil.rmtree(wheels / "transformer_engine")
    assert loaded(wheels) == ["None"]
