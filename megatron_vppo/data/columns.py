"""The columns that a data set's rows are read from."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

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
