"""Folders built once: written under a temporary name, renamed when whole, used again for the same arguments."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

STAMP = "built.json"


def build_once(
    out: Path, arguments: Mapping[str, Any], build: Callable[[Path], dict[str, Any]]
) -> tuple[dict[str, Any], bool]:
    """Fill `out` by `build(folder)` unless it already holds what the same arguments gave.

    Args:
        out: the folder; its parent is created.
        arguments: everything that the content depends on, JSON values only; kept in `out/built.json` with the result.
        build: writes into the folder that it receives (not `out` itself) and returns a JSON summary.

    Returns:
        The summary, and whether it was taken from an earlier build.

    Raises:
        ValueError: `out` holds files that no earlier build wrote; they are left alone.
    """
    wanted = json.loads(json.dumps(dict(arguments)))
    stamp = out / STAMP
    if stamp.is_file():
        record = json.loads(stamp.read_text())
        if record["arguments"] == wanted:
            return record["result"], True
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and was not built by this program; give another --out or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        result = build(partial)
        (partial / STAMP).write_text(json.dumps({"arguments": wanted, "result": result}, indent=1) + "\n")
        partial.chmod(0o755)  # mkdtemp makes folders that only the owner may read
        if out.exists():
            shutil.rmtree(out)
        os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return result, False
