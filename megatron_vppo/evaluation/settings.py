"""The file of a suite: how questions become prompts, how responses are sampled and graded, and the benchmarks.

preset: paper                     # what is written out below wins over it
data: {format_prompt: examples/format_prompt/math_format_perception.jinja}
rollout: {n: 8}
benchmarks:
  - {name: Geo3K, source: geometry3k, path: data/geometry3k@test}
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from megatron_vppo.config.choices import EvalPreset
from megatron_vppo.config.evaluation import EvalDataConfig, EvalModelConfig, EvalRolloutConfig, with_preset
from megatron_vppo.config.load import load_settings
from megatron_vppo.config.ranges import LEAST_TEMPERATURE
from megatron_vppo.config.schema import EngineConfig, GradingWorkersConfig, Section
from megatron_vppo.evaluation.suite import Benchmark

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_FREE = {"preset", "reward.num_workers", "data.num_workers", *(f"rollout.{name}" for name in EngineConfig.model_fields)}
"""Settings that may change from one attempt to the next: responses depend on them by rounding alone."""


class EvalConfig(Section):
    """Every setting of an evaluation."""

    preset: EvalPreset | None = None
    """Values for the settings marked (Preset): the paper's protocol, or that of the program PAPO-Eval; and 'mathruler'
    as the grader of every benchmark. None: the file has to set them."""
    seed: int = Field(default=1, ge=0, lt=2**32)
    """The seed of all samples."""
    model: EvalModelConfig = EvalModelConfig()
    data: EvalDataConfig
    rollout: EvalRolloutConfig
    reward: GradingWorkersConfig = GradingWorkersConfig()
    benchmarks: tuple[Benchmark, ...]

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        return with_preset(values)


def load_suite(path: Path, overrides: Sequence[str] = ()) -> EvalConfig:
    """Reads the file of a suite (and its `base` files), and lays `key.name=value` overrides over it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: naming every unknown setting with the nearest known one, every wrong value, and every combination
            that cannot be.
    """
    return load_settings(EvalConfig, path, overrides, checks=_problems_of)


def differing_settings(then: EvalConfig, now: EvalConfig) -> Iterator[tuple[str, Any, Any]]:
    """Yields the settings that differ and on which responses depend, as (name, value then, value now).

    Those of benchmarks are left out.
    """
    before = dict(_leaves(then.model_dump(mode="json", exclude={"benchmarks"})))
    for name, value in _leaves(now.model_dump(mode="json", exclude={"benchmarks"})):
        if name not in _FREE and before[name] != value:
            yield name, before[name], value


def _leaves(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _problems_of(config: EvalConfig) -> list[str]:
    names = [benchmark.name for benchmark in config.benchmarks]
    problems = [f"benchmarks: {name} is there twice; rename one" for name in sorted({*names}) if names.count(name) > 1]
    if not names:
        problems.append("benchmarks is empty; name one")
    problems += [
        f"benchmarks: '{name}' names a file; begin it with a letter or digit, and go on with letters, digits, '_', "
        "'-', '.', '+'"
        for name in names
        if not _NAME.fullmatch(name)
    ]
    rollout = config.rollout
    if 0 < rollout.temperature < LEAST_TEMPERATURE:
        problems.append(
            f"rollout.temperature={rollout.temperature:g}: vLLM would take {LEAST_TEMPERATURE} for it; set at least "
            "that, or 0 (greedy)"
        )
    if rollout.temperature == 0 and rollout.n > 1:
        problems.append(f"rollout.temperature=0 (greedy) gives rollout.n={rollout.n} equal samples; set rollout.n=1")
    if rollout.top_k == 0 or rollout.top_k < -1:
        problems.append(f"rollout.top_k={rollout.top_k}; set -1 (off) or at least 1")
    return problems
