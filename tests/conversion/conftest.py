"""One folder of each kind for all tests; a test that changes one copies it first."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vppo.conversion.to_megatron import hf_to_megatron
from tests.conversion.folders import CONFIGS, make_folder


@pytest.fixture(scope="session")
def hf_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hf")
    return {name: make_folder(root / name.replace(" ", "_"), name) for name in CONFIGS}


@pytest.fixture(scope="session")
def converted(hf_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("converted")
    for folder in hf_folders.values():
        hf_to_megatron(folder, root / folder.name)
    return {name: root / folder.name for name, folder in hf_folders.items()}
