"""The digits data and a start model for it, built once per test run by the project's own tools."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from digits.checkpoint import make_config, make_model, make_processor, save_checkpoint

from tests.conversion.conftest import converted, hf_folders  # noqa: F401 (fixtures, shared)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with data/ and model/."""
    return make_digits(tmp_path_factory.mktemp("digits"))


def make_digits(folder: Path, *sizes: str) -> Path:
    """Fills a folder with data/ and model/, of random weights: the minutes of a cold start are not needed here."""
    tool = [sys.executable, ROOT / "tools" / "digits" / "make_data.py", "--out", folder / "data", *sizes]
    subprocess.run([*map(str, tool)], check=True, cwd=ROOT)
    processor = make_processor()
    save_checkpoint(make_model(make_config(processor.tokenizer), seed=1), processor, folder / "model")
    return folder
