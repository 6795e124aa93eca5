"""The columns that a data set's rows are read from."""

from __future__ import annotations

import pickle
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from megatron_vppo.config.choices import ImagePlace


@dataclass(frozen=True, slots=True)
class Column:
    """A column, or a field of the records that a column holds."""

    top: str
    inside: tuple[str, ...] = ()
    """The names of fields: ('b', 'c') is c of b of the column."""

    @property
    def name(self) -> str:
        """The name as users write it: 'a', or 'a.b.c'."""
        return ".".join((self.top, *self.inside))

    @classmethod
    def of(cls, key: str, columns: Collection[str]) -> Column:
        """Finds a column by its name, which may have dots of its own, or by the names of fields behind one."""
        top, *inside = key.split(".")
        return cls(top, tuple(inside)) if key not in columns and top in columns else cls(key)


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of a row's parts."""

    problem: Column
    """Each cell holds a text, or a conversation (see conversation.py)."""
    answer: Column | None
    """None: answers are those of the conversations."""
    images: Column | None
    """Each cell holds a path, encoded bytes or a {'bytes', 'path'}, or a list of them. None: no row has images."""
    image_place: ImagePlace


DATA_SOURCE, EXTRA_INFO = "data_source", "extra_info"
"""The columns that verl's reward functions receive."""


@dataclass(frozen=True, slots=True)
class RowExtras:
    """The further columns of a row that reward functions receive, as they are stored; None where it has no value."""

    data_source: Any = None
    extra_info: Any = None

    def to_bytes(self) -> bytes:
        """Returns what `from_bytes` reads. A pickle, because dates and bytes of parquet are not for JSON.

        Raises ValueError for values that are too deep.
        """
        try:
            return pickle.dumps((self.data_source, self.extra_info))
        except RecursionError as error:
            raise ValueError(
                f"columns {DATA_SOURCE!r} and {EXTRA_INFO!r} hold records too deep for a reward worker: {error}"
            ) from error

    @classmethod
    def from_bytes(cls, data: bytes) -> RowExtras:
        """Reads what `to_bytes` returned, in a process that this one trusts."""
        return cls(*pickle.loads(data))


NO_EXTRAS = RowExtras()
