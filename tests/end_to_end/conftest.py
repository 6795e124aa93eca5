"""The digits data and cold-start model, built once per test run by the project's own tools."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tools")]


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with data/ and model/; VPPO_TEST_DIGITS names one that is built already, as `make demo` leaves it."""
    given = os.environ.get("VPPO_TEST_DIGITS")
    if given:
        return Path(given).absolute()
    folder = tmp_path_factory.mktemp("digits")
    for tool, arguments in (
        ("make_digits_data.py", ["--out", folder / "data"]),
        ("make_digits_model.py", ["--data", folder / "data", "--out", folder / "model"]),
    ):
        subprocess.run([sys.executable, ROOT / "tools" / tool, *map(str, arguments)], check=True, cwd=ROOT)
    return folder
