"""The outcome of the check of all rows, kept in a file, so that the next start of a run need not check them again.

The key of the file is made of everything that the outcome depends on (`fingerprint_of`). A file that is damaged, or has
another key in it, counts as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from array import array
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
_KEPT = 32
"""The newest files that are kept in a folder."""


@dataclass(frozen=True)
class UsableRows:
    """The rows whose prompts can be used, in flat arrays: four bytes a token, and nothing that Python counts."""

    rows: NDArray[np.int64]
    """Their numbers, rising."""
    ids: NDArray[np.int32]
    """The compact token ids of all, one prompt after the other."""
    id_ends: NDArray[np.int64]
    """The ends of those of each prompt; as many as rows."""
    grids: NDArray[np.int64]
    """[images, 3]: those of all, likewise."""
    grid_ends: NDArray[np.int64]

    @classmethod
    def of(cls, rows: Iterable[tuple[int, TokenIds, Grids]]) -> UsableRows:
        """Gathers (row, compact token ids, grids) of each prompt."""
        numbers, ids, id_ends, grids, grid_ends = array("q"), array("i"), array("q"), array("q"), array("q")
        for row, own_ids, own_grids in rows:
            numbers.append(row)
            ids.extend(map(int, own_ids))
            id_ends.append(len(ids))
            for grid in own_grids:
                grids.extend(grid)
            grid_ends.append(len(grids) // 3)
        return cls(
            np.array(numbers, dtype=np.int64),
            np.array(ids, dtype=np.int32),
            np.array(id_ends, dtype=np.int64),
            np.array(grids, dtype=np.int64).reshape(-1, 3),
            np.array(grid_ends, dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.rows)

    def ids_of(self, index: int) -> tuple[int, ...]:
        """Returns the compact token ids of the prompt of this index."""
        return tuple(self.ids[self._begin(self.id_ends, index) : self.id_ends[index]].tolist())

    def grids_of(self, index: int) -> Grids:
        """Returns the grid of each of its images."""
        own = self.grids[self._begin(self.grid_ends, index) : self.grid_ends[index]]
        return tuple((t, h, w) for t, h, w in own.tolist())

    @staticmethod
    def _begin(ends: NDArray[np.int64], index: int) -> int:
        return int(ends[index - 1]) if index else 0


@dataclass(frozen=True)
class CheckedRows:
    """The outcome of the check of all rows of a data set."""

    usable: UsableRows
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


_USABLE = ("rows", "ids", "id_ends", "grids", "grid_ends")


def _pack(checked: CheckedRows, key: str) -> dict[str, Any]:
    text = {"key": key, "bad": [(error.source, error.row, error.reason, error.place) for error in checked.bad]}
    return {
        **{name: getattr(checked.usable, name) for name in _USABLE},
        "too_long": np.array(checked.too_long, dtype=np.int64),
        "transparent": np.array(checked.transparent, dtype=np.int64),
        "text": np.frombuffer(json.dumps(text).encode(), dtype=np.uint8),
    }


def _unpack(stored: dict[str, NDArray[Any]], key: str) -> CheckedRows:
    """Raises ValueError, or whatever the arrays lead to, if they are not those of `_pack` with this key."""
    text = json.loads(stored["text"].tobytes())
    if text["key"] != key:
        raise ValueError("another key")
    usable = UsableRows(**{name: stored[name] for name in _USABLE})
    for ends, values in ((usable.id_ends, usable.ids), (usable.grid_ends, usable.grids)):
        if len(ends) != len(usable) or (int(ends[-1]) if len(ends) else 0) != len(values):
            raise ValueError("arrays of wrong lengths")
    return CheckedRows(
        usable=usable,
        too_long=tuple(stored["too_long"].tolist()),
        bad=tuple(RowError(*fields) for fields in text["bad"]),
        transparent=int(stored["transparent"]),
    )
