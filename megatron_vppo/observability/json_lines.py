"""JSON lines that survive a crash: every line is valid JSON.

JSON has no NaN and no infinity. They are written as the strings "NaN", "Infinity" and "-Infinity", which `float()` and
`number` below read back. Other readers find a string in place of a number, but never a broken file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any


def dump_line(record: Mapping[str, Any]) -> str:
    """Writes a record as one line of valid JSON, newline included. Floats that are not finite become strings."""
    try:
        line = _dump(record)
    except (TypeError, ValueError):  # not finite, or a kind of mapping that json does not know
        line = _dump(_finite(record))
    try:
        line.encode()
    except UnicodeEncodeError:  # UTF-8 has no half of a surrogate pair. JSON has, as an escape.
        line = re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", line)
    return line


def number(value: Any) -> float | None:
    """Reads back a float that `dump_line` wrote. Returns None for anything that is not a number, and an infinity for an
    integer that no float holds.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and value not in ("NaN", "Infinity", "-Infinity"):
        return None
    try:
        return float(value)
    except OverflowError:
        return float(str(value))  # an infinity


def parse_lines(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Yields the records of the lines. A line that holds none, such as one cut short by a crash, is left out."""
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            yield record


def _dump(record: Any) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(", ", ": ")) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
