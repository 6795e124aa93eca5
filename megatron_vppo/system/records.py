"""Records that were written as JSON, read back with the types that they were written with."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError


class Record(BaseModel):
    """A record whose fields are all there and have exactly their types; others are left alone."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


AnyRecord = TypeVar("AnyRecord", bound=Record)


def parse_record(kind: type[AnyRecord], value: object) -> AnyRecord:
    """Makes a record of a value that was read from JSON.

    Raises:
        ValueError: it is no JSON object, lacks a field, or has one of another type; names the first such field.
    """
    if not isinstance(value, dict):
        raise ValueError(f"holds {type(value).__name__}, not a JSON object")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            raise ValueError(f"lacks {name}") from None
        raise ValueError(f"has {name}={first['input']!r}: {first['msg']}") from None
