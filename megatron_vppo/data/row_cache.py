"""The outcome of the check of all rows, kept in a file, so that the next start of a run need not check them again.

The key of the file is made of everything that the outcome depends on (`fingerprint_of`). A file that is damaged, or has
another key in it, counts as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vppo.data.dataset import RowError
from megatron_vppo.system.whole import whole_file

Grids = tuple[tuple[int, int, int], ...]
TokenIds = Sequence[int] | NDArray[np.int32]
_KEPT = 8
"""The newest files that are kept in a folder."""


@dataclass(frozen=True)
class CheckedRows:
    """The outcome of the check of all rows of a data set."""

    usable: Sequence[tuple[int, TokenIds, Grids]]
    """Row, compact token ids and grids of each prompt that can be used."""
    too_long: tuple[int, ...]
    bad: tuple[RowError, ...]
    transparent: int
    """The number of rows that PromptReport says it of."""


@dataclass(frozen=True)
class RowCache:
    """A folder with the outcomes of checks."""

    folder: Path
    key: str

    def load(self) -> CheckedRows | None:
        """Returns the outcome that is kept under the key; None if there is none, or it is damaged."""
        try:
            with np.load(self._path, allow_pickle=False) as arrays:
                stored = {name: arrays[name] for name in arrays.files}  # compares the checksums of all bytes
            return _unpack(stored, self.key)
        except Exception:  # a damaged file may raise anything, and is as good as none
            return None

    def save(self, checked: CheckedRows) -> None:
        """Keeps an outcome. A folder that cannot be written, or is full, is no reason to stop: the check has passed."""
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with whole_file(self._path) as file:
                np.savez(file, allow_pickle=False, **_pack(checked, self.key))
            files = sorted(self.folder.glob("*.npz"), key=lambda path: path.stat().st_mtime_ns)
            for old in files[:-_KEPT]:
                old.unlink(missing_ok=True)

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.key[:32]}.npz"


def fingerprint_of(parts: dict[str, Any]) -> str:
    """Returns a key for parts that JSON can hold. Any change of a part gives another key."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def file_identity(paths: Iterable[Path]) -> list[tuple[str, int, int, int, int]]:
    """Describes files without reading them: path, size, inode, and the times of their last changes.

    The last one, that of the inode, cannot be set: it tells of a file that was replaced or written over, even where
    its size and its date were restored.
    """
    found = []
    for path in sorted(paths):
        stat = path.stat()
        found.append((str(path), stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns))
    return found


def _pack(checked: CheckedRows, key: str) -> dict[str, Any]:
    ids = [np.asarray(ids, dtype=np.int32) for _, ids, _ in checked.usable]
    grids = [grid for _, _, grids in checked.usable for grid in grids]
    text = {"key": key, "bad": [(error.source, error.row, error.reason, error.place) for error in checked.bad]}
    return {
        "rows": np.array([row for row, _, _ in checked.usable], dtype=np.int64),
        "num_ids": np.array([len(one) for one in ids], dtype=np.int64),
        "ids": np.concatenate([*ids, np.empty(0, np.int32)]),
        "num_grids": np.array([len(grids) for _, _, grids in checked.usable], dtype=np.int64),
        "grids": np.array(grids, dtype=np.int64).reshape(-1, 3),
        "too_long": np.array(checked.too_long, dtype=np.int64),
        "transparent": np.array(checked.transparent, dtype=np.int64),
        "text": np.frombuffer(json.dumps(text).encode(), dtype=np.uint8),
    }


def _unpack(stored: dict[str, NDArray[Any]], key: str) -> CheckedRows:
    """Raises ValueError, or whatever the arrays lead to, if they are not those of `_pack` with this key."""
    text = json.loads(stored["text"].tobytes())
    if text["key"] != key:
        raise ValueError("another key")
    num_ids, num_grids = stored["num_ids"], stored["num_grids"]
    if not len(stored["rows"]) == len(num_ids) == len(num_grids):
        raise ValueError("arrays of different lengths")
    if num_ids.sum() != len(stored["ids"]) or num_grids.sum() != len(stored["grids"]):
        raise ValueError("arrays of wrong lengths")
    ids = np.split(stored["ids"], np.cumsum(num_ids)[:-1])
    grids = [(int(t), int(h), int(w)) for t, h, w in stored["grids"].tolist()]
    ends = [0, *np.cumsum(num_grids).tolist()]
    usable = [(int(row), ids[i], tuple(grids[ends[i] : ends[i + 1]])) for i, row in enumerate(stored["rows"].tolist())]
    return CheckedRows(
        usable=usable,
        too_long=tuple(stored["too_long"].tolist()),
        bad=tuple(RowError(*fields) for fields in text["bad"]),
        transparent=int(stored["transparent"]),
    )
