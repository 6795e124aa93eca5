"""One cuDNN in a process: TransformerEngine gets the one that torch brought."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from pathlib import Path

NAMES = ("CUDNN_HOME", "CUDNN_PATH")
"""Environment variables that tell TransformerEngine where cuDNN is, in the order in which it reads them."""
PARTS = "lib/libcudnn*.so.*"


def share_cudnn_of_torch() -> None:
    """Loads the cuDNN of torch's wheels for TransformerEngine, too. Call it before anything imports TransformerEngine.

    On a machine that also has a cuDNN of its own, TransformerEngine (2.9 to 2.20: `_load_cuda_library`) loads that one.
    With parts of two versions in one process, cuDNN can plan nothing (CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED), and
    TransformerEngine silently falls back to attention that is not fused.

    Nothing happens without TransformerEngine, without the wheel of cuDNN, and where the environment names another one.
    A cuDNN that cannot be loaded is no error here: models/layers/te_probe.py finds out what that means for attention.
    """
    if not _is_installed("transformer_engine") or (folder := _folder_of_wheel()) is None:
        return
    named = next((os.environ[name] for name in NAMES if name in os.environ), None)
    if named is not None and Path(named) != folder:
        return
    # TransformerEngine's library names the parts of cuDNN among what it needs. A part that is loaded already is not
    # looked for on the machine.
    try:
        for part in sorted(folder.glob(PARTS)):
            ctypes.CDLL(str(part), mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return
    os.environ[NAMES[0]] = str(folder)


def _folder_of_wheel() -> Path | None:
    """Finds the folder of the wheel `nvidia-cudnn`, on which torch's own wheels depend."""
    if not _is_installed("nvidia") or not _is_installed("nvidia.cudnn"):
        return None
    found = importlib.util.find_spec("nvidia.cudnn")
    folders = [] if found is None else [Path(folder) for folder in found.submodule_search_locations or []]
    return next((folder for folder in folders if any(folder.glob(PARTS))), None)


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # a module of another kind under this name
        return False
