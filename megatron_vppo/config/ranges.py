"""Ranges that several settings have, each declared once. `schema.py` says the others next to the setting.

A range ends where a value cannot work: where C integers, float32 numbers, file names or a library's own limits end.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

LARGEST_INT = 2**31 - 1
"""The largest 32-bit integer. torch, vLLM and the operating system take counts and sizes as such."""
LARGEST_FLOAT = 3.4e38
"""Just below the largest float32 number. torch refuses a larger bound of a float32 tensor."""
MOST_RESPONSES = 2**16
"""Responses to a prompt: the number of a response has 16 bits in the keys of its perturbations."""
LEAST_TEMPERATURE = 0.01
"""vLLM raises a lower temperature to this one, except for 0, which is greedy; the trainer would divide by the lower."""
LONGEST_NAME = 255
"""Bytes of a file's or folder's name that Linux allows."""
LONGEST_PATH = 4095
"""Bytes of a path that Linux allows."""


def holds_numbers(annotation: Any) -> bool:
    """Returns True for the type of a setting that is a number, a list of numbers, or may be either."""
    return annotation in (int, float) or any(holds_numbers(inner) for inner in get_args(annotation))


def _not_empty(value: str) -> str:
    if not value.strip() or "\0" in value:
        raise PydanticCustomError("empty_text", "Input should be a text that is not empty and has no NUL character")
    return value


def _path(value: str) -> str:
    _not_empty(value)
    if value.startswith("~") or re.search(r"\$[A-Za-z_{]", value):
        raise PydanticCustomError(
            "shell_path", "Input should be a path as it is: ~ and $NAME are not expanded; write out what they stand for"
        )
    if len(value.encode()) > LONGEST_PATH or any(len(part.encode()) > LONGEST_NAME for part in value.split("/")):
        raise PydanticCustomError(
            "long_path",
            "Input should be a path of at most {whole} bytes, each name in it of at most {longest} bytes",
            {"whole": LONGEST_PATH, "longest": LONGEST_NAME},
        )
    return value


def _one_folder(value: str) -> str:
    if value in ("", ".", "..") or "/" in value or "\0" in value or len(value.encode()) > LONGEST_NAME:
        raise PydanticCustomError(
            "folder_name",
            "Input should be the name of one folder: at most {longest} bytes, not '.' or '..', without '/' and NUL",
            {"longest": LONGEST_NAME},
        )
    return value


Count = Annotated[int, Field(gt=0, le=LARGEST_INT)]
CountOrZero = Annotated[int, Field(ge=0, le=LARGEST_INT)]
Pixels = Annotated[int, Field(gt=0, le=2**27)]
"""vLLM makes an image of the most pixels when it starts, and PIL opens none of more than 179 million."""
Workers = Annotated[int, Field(gt=0, le=1024)]
"""Threads or processes that start at once. More than 1024 do not get started."""

Share = Annotated[float, Field(ge=0, le=1)]
ShareAboveZero = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0, le=LARGEST_FLOAT)]
PositiveOrZero = Annotated[float, Field(ge=0, le=LARGEST_FLOAT)]
Wait = Annotated[float, Field(ge=1, le=30 * 24 * 3600)]
"""Seconds that processes wait for one another: up to 30 days. No process answers within less than one."""

Text = Annotated[str, AfterValidator(_not_empty)]
FilePath = Annotated[str, AfterValidator(_path)]
"""A path of a file or folder, a hub id, or `file.py:function`."""
FolderName = Annotated[str, AfterValidator(_one_folder)]
