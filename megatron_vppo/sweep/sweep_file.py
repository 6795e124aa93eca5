"""The file of a sweep: variants of a configuration, and the seeds that each of them is run with.

name: digits_sweep                # the folder of its runs, in trainer.runs_dir; default: the name of the file
config: config.yaml               # relative to this file
overrides: [trainer.val_freq=2]   # for all variants
seeds: [1, 2, 3]
variants:
  vppo: []                        # overrides
  dapo: {config: dapo.yaml}       # or another configuration, and overrides if needed
grid:                             # every combination of these, for each variant
  algorithm.top_p_perception_tokens: [0.2, 0.4]
baseline: dapo                    # the variant that the others are compared with; default: the first
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, ValidationError

from megatron_vppo.config.yaml_text import read_yaml

OWN_SETTINGS = ("trainer.project_name", "trainer.experiment_name", "trainer.seed")
"""The settings that the sweep gives each run."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


@dataclass(frozen=True)
class Variant:
    """One set of settings; it is run once per seed."""

    name: str
    config: Path
    overrides: tuple[str, ...]
    """Settings that replace those of the file, `key=value`, except for those of OWN_SETTINGS."""


@dataclass(frozen=True)
class SweepFile:
    """The file as it was read. Whether its settings load is another question (plan.py)."""

    path: Path
    name: str
    seeds: tuple[int, ...]
    variants: tuple[Variant, ...]
    baseline: str


def read_sweep_file(path: Path) -> SweepFile:
    """Reads the file of a sweep.

    Raises:
        FileNotFoundError: there is none.
        ValueError: naming everything that is wrong with it: unknown keys with the nearest known one, values, names.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no sweep file {path}")
    content = read_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no sections such as 'config:' and 'seeds:'; docs/sweeps.md has an example")
    try:
        written = _Written.model_validate(content)
    except ValidationError as error:
        raise _refusal(path, [_describe(problem) for problem in error.errors()]) from error
    name = path.stem if written.name is None else written.name
    variants = tuple(_variants(written, path.parent))
    names = [variant.name for variant in variants]
    baseline = names[0] if written.baseline is None and names else written.baseline
    problems = [*_wrong_names([name, *names]), *_taken_settings(variants), *_twice("seeds", written.seeds)]
    if not names:
        problems.append("variants and grid are both empty; name a variant, such as 'variants: {vppo: []}'")
    elif baseline not in names:
        problems.append(f"baseline: '{baseline}' is no variant; {_nearest(str(baseline), names)}")
    problems += _twice("variants", names)
    if problems:
        raise _refusal(path, problems)
    return SweepFile(path, name, tuple(written.seeds), variants, str(baseline))


# --- What is written --------------------------------------------------------------------------------------------------


def _as_mapping(value: Any) -> Any:
    """Reads a variant: nothing, a list of overrides, or a mapping."""
    if value is None:
        return {}
    return {"overrides": value} if isinstance(value, list) else value


class _WrittenVariant(BaseModel):
    model_config = ConfigDict(extra="forbid")
    config: str | None = None
    overrides: list[str] = []


class _Written(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str | None = None
    config: str
    overrides: list[str] = []
    seeds: list[Annotated[StrictInt, Field(ge=0, lt=2**32)]] = Field(min_length=1)
    variants: dict[str, Annotated[_WrittenVariant, BeforeValidator(_as_mapping)]] = {}
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    baseline: str | None = None


def _variants(written: _Written, folder: Path) -> Iterator[Variant]:
    """Yields each variant with each combination of the grid."""
    alone = {"": _WrittenVariant()} if written.grid else {}
    combinations = list(
        itertools.product(*([(key, value) for value in values] for key, values in written.grid.items()))
    )
    for name, variant in (written.variants or alone).items():
        for combination in combinations:
            parts = [name, *(f"{key.rpartition('.')[2]}_{_in_a_name(value)}" for key, value in combination)]
            yield Variant(
                name="-".join(filter(None, parts)),
                config=folder / (variant.config or written.config),
                overrides=(
                    *written.overrides,
                    *variant.overrides,
                    *(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in combination),
                ),
            )


def _in_a_name(value: Any) -> str:
    """Writes a value with the characters that a name may have: [0.9, 0.95] as 0.9_0.95."""
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", text).strip("_")


# --- Problems ---------------------------------------------------------------------------------------------------------


def _refusal(path: Path, problems: Sequence[str]) -> ValueError:
    heading = f"{path}: {len(problems)} problem{'s' if len(problems) > 1 else ''} in the sweep file"
    return ValueError("\n  - ".join([heading, *problems]))


def _describe(problem: Mapping[str, Any]) -> str:
    """Formats one of pydantic's errors as `key = value: what was expected`."""
    *outer, last = (str(part) for part in problem["loc"])
    name = ".".join([*outer, last])
    if problem["type"] == "extra_forbidden":
        keys = _WrittenVariant.model_fields if outer else _Written.model_fields
        return f"{name} is no key; {_nearest(last, list(keys))}"
    if problem["type"] == "missing":
        return f"{name} must be set"
    return f"{name} = {problem['input']!r}: {problem['msg'].replace('Input should be', 'should be')}"


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"


def _wrong_names(names: Sequence[str]) -> list[str]:
    return [
        f"'{name}' names a folder; begin it with a letter or digit, and go on with letters, digits, '_', '-', '.', '+'"
        for name in names
        if not _NAME.fullmatch(name)
    ]


def _taken_settings(variants: Sequence[Variant]) -> list[str]:
    taken = {
        override
        for variant in variants
        for override in variant.overrides
        if override.partition("=")[0].strip() in OWN_SETTINGS
    }
    return [f"'{override}': the sweep gives each run its own; leave it out" for override in sorted(taken)]


def _twice(key: str, values: Sequence[Any]) -> list[str]:
    return [f"{key}: {value} is there twice" for value in dict.fromkeys(v for v in values if values.count(v) > 1)]
