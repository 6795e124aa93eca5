"""The folder of an evaluation: its settings, which an evaluation that goes on has to have, and a lock.

<out>/
  settings.yaml                  every setting in force, and the model
  responses/<benchmark>.jsonl    responses.py
  logs/engine_<k>.log            what vLLM prints
  summary.json  summary.md  report.html
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_vppo.config.yaml_text import read_yaml, write_yaml
from megatron_vppo.evaluation.responses import FOLDER
from megatron_vppo.evaluation.settings import EvalConfig, differing_settings
from megatron_vppo.system.whole import whole_file

SETTINGS = "settings.yaml"


@dataclass(frozen=True)
class EvalSettings:
    """The model and the settings that an evaluation was made with."""

    model: str
    """The folder, or hub id."""
    fingerprint: str
    """The fingerprint of the model (identity.py)."""
    template: str | None
    """The digest of the text in data.format_prompt's file (identity.py); None: no such file is set."""
    config: EvalConfig


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Makes the folder, and keeps other evaluations out of it within the block.

    Raises ValueError if another one writes into it.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another evaluation is writing {out}; wait for it, or give another --out") from None
        yield
    finally:
        os.close(lock)


def read_settings(out: Path) -> EvalSettings:
    """Reads what the evaluation in a folder was made with.

    Raises ValueError if it is no folder of an evaluation.
    """
    path = out / SETTINGS
    if not path.is_file():
        raise ValueError(f"{out} holds no evaluation (no {SETTINGS}); give the --out folder of one")
    content = read_yaml(path.read_text(encoding="utf-8"), str(path))
    try:
        model = content.pop("model_folder")
        template = content.pop("format_prompt_digest")
        return EvalSettings(model["path"], model["fingerprint"], template, EvalConfig.model_validate(content))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not what an evaluation writes: {error}; give another --out") from error


def take_over(out: Path, settings: EvalSettings) -> None:
    """Writes the settings of an evaluation, or goes on with one that was made with the same.

    Benchmarks may be added, and left out: what was recorded of them stays. Until a response is recorded, everything may
    change.

    Raises ValueError, with both values of each, if a setting differs on which responses depend.
    """
    if (out / SETTINGS).is_file() and any(path.stat().st_size for path in (out / FOLDER).glob("*.jsonl")):
        before = read_settings(out)
        if differences := list(_differences(before, settings)):
            heading = f"{out} holds an evaluation that was made otherwise; give another --out, or the same settings"
            raise ValueError("\n  - ".join([heading, *differences]))
        kept = {one.name: one for one in (*before.config.benchmarks, *settings.config.benchmarks)}
        config = settings.config.model_copy(update={"benchmarks": tuple(kept.values())})
        settings = replace(settings, config=config)
    identity = {
        "model_folder": {"path": settings.model, "fingerprint": settings.fingerprint},
        "format_prompt_digest": settings.template,
    }
    with whole_file(out / SETTINGS) as file:
        file.write(write_yaml({**identity, **settings.config.model_dump(mode="json")}).encode())


def differing_protocol(then: EvalSettings, now: EvalSettings) -> Iterator[tuple[str, Any, Any]]:
    """Yields what differs besides model and benchmarks and responses depend on, as (name, value then, value now)."""
    yield from differing_settings(then.config, now.config)
    if then.template != now.template:
        yield "the digest of data.format_prompt", then.template, now.template


def _differences(then: EvalSettings, now: EvalSettings) -> Iterator[str]:
    if then.fingerprint != now.fingerprint:
        yield f"the model was {then.model} ({then.fingerprint}) and is {now.model} ({now.fingerprint})"
    for name, before, value in differing_protocol(then, now):
        yield f"{name} was {before!r} and is {value!r}"
    shown_alone = {"selection_leak"}  # no response depends on it
    benchmarks = {one.name: one.model_dump(mode="json") for one in then.config.benchmarks}
    for benchmark in now.config.benchmarks:
        old = benchmarks.get(benchmark.name)
        for name, value in benchmark.model_dump(mode="json", exclude=shown_alone).items():
            if old is not None and old[name] != value:
                yield f"{name} of benchmark {benchmark.name} was {old[name]!r} and is {value!r}"
