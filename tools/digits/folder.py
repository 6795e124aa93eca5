"""Folders that are built once, whole or not at all, and used again for the same arguments."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_vppo.system.whole import whole_folder

STAMP = "built.json"


def build_once(
    out: Path, arguments: Mapping[str, Any], build: Callable[[Path], dict[str, Any]]
) -> tuple[dict[str, Any], bool]:
    """Fills `out` by `build(folder)` unless it already holds what the same arguments gave.

    Args:
        out: the folder; its parent is created.
        arguments: everything that the content depends on, JSON values only; kept in `out/built.json` with the result.
        build: writes into the folder that it receives (not `out` itself) and returns a JSON summary.

    Returns:
        The summary, and True if it was taken from an earlier build.

    Raises:
        ValueError: `out` holds files that no earlier build wrote, and they are left alone; or another process is
            building it, or the disk is full.
    """
    wanted = json.loads(json.dumps(dict(arguments)))
    stamp = out / STAMP
    if stamp.is_file():
        record = json.loads(stamp.read_text())
        if record["arguments"] == wanted:
            return record["result"], True
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and was not built by this program; give another --out or remove it")
    with whole_folder(out, replace=True) as unfinished:
        result = build(unfinished)
        (unfinished / STAMP).write_text(json.dumps({"arguments": wanted, "result": result}, indent=1) + "\n")
    return result, False
