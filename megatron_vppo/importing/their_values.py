"""Values as their program has them: typed as OmegaConf types the fields of a dataclass, and paths found."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

_TRUE = ("true", "yes", "y", "on", "1")
_FALSE = ("false", "no", "n", "off", "0")


@dataclass(frozen=True)
class ValueKind:
    """The type of one of their fields."""

    expects: str
    """The words of a refusal, such as 'a whole number'."""
    read: Callable[[Any], Any]
    """Converts a YAML value as OmegaConf does; raises TypeError or ValueError for one that it refuses."""
    null: bool = False
    """True if null is a value of the field."""

    @property
    def or_null(self) -> ValueKind:
        """The same type with null."""
        return replace(self, null=True)

    def value_of(self, given: Any) -> Any:
        """Returns the value of the field. Raises ValueError if it cannot have this one."""
        if given is None and self.null:
            return None
        try:
            return self.read(given)
        except (TypeError, ValueError):
            raise ValueError(f"should be {self.expects}{' or null' if self.null else ''}") from None


def _text(given: Any) -> str:
    if not isinstance(given, str | int | float):
        raise TypeError
    return str(given)


def _count(given: Any) -> int:
    if type(given) not in (int, str):
        raise TypeError
    return int(given)


def _number(given: Any) -> float:
    if type(given) not in (int, float, str):
        raise TypeError
    return float(given)


def _flag(given: Any) -> bool:
    if isinstance(given, int):  # true and false are among them
        return given != 0
    word = given.lower() if isinstance(given, str) else None
    if word not in (*_TRUE, *_FALSE):
        raise TypeError
    return word in _TRUE


def _list_of(read: Callable[[Any], Any], length: int | None = None) -> Callable[[Any], tuple[Any, ...]]:
    def read_all(given: Any) -> tuple[Any, ...]:
        if not isinstance(given, list | tuple) or length not in (None, len(given)):
            raise TypeError
        return tuple(read(each) for each in given)

    return read_all


def _mapping(given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise TypeError
    return {str(key): value for key, value in given.items()}


TEXT = ValueKind("a text", _text)
COUNT = ValueKind("a whole number", _count)
NUMBER = ValueKind("a number", _number)
FLAG = ValueKind("true or false", _flag)
TEXTS = ValueKind("a list of texts", _list_of(_text))
PAIR = ValueKind("a list of two numbers", _list_of(_number, 2))
MAPPING = ValueKind("a mapping", _mapping)


@dataclass(frozen=True)
class Folders:
    """The folders that a relative path may start at, the likeliest first.

    Their program starts in the root of its repository. That is a folder above their script, or above this one.
    """

    starts: tuple[Path, ...]

    @classmethod
    def around(cls, source: Path) -> Folders:
        """Returns the folders from that of a file upward, and from the present one upward."""
        home, here = Path(os.path.abspath(source)).parent, Path.cwd()  # without '..', whose parents are others
        return cls((home, *home.parents, here, *here.parents))

    def find(self, path: str) -> Path | None:
        """Returns the first file or folder of that name; None if there is none."""
        if not path:
            return None
        return next((start / path for start in self.starts if (start / path).exists()), None)


def path_as_written(path: Path) -> str:
    """Returns a path for our file: from the present folder if it lies below it, as a run reads it; else whole."""
    path, here = path.absolute(), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


@dataclass(frozen=True)
class TheirValues:
    """Every key with the value in force: the default of their dataclass, their file over it, overrides over both."""

    values: Mapping[str, Any]
    folders: Folders

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    @property
    def shapes(self) -> bool:
        """True if advantages are shaped: their code does nothing without the token filter."""
        return bool(self["algorithm.use_advantage_shaping"] and self["algorithm.use_vppo_on_perception"])

    @property
    def gpus(self) -> int:
        """The GPUs of a run."""
        return int(self["trainer.nnodes"] * self["trainer.n_gpus_per_node"])
