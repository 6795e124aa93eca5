"""The runs of a sweep, each with its settings loaded and checked before the first one starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_vppo.config.checks import check_training
from megatron_vppo.config.load import load_config
from megatron_vppo.config.schema import RunConfig
from megatron_vppo.config.yaml_text import read_yaml
from megatron_vppo.setup.run_folder import RunFolder
from megatron_vppo.sweep.sweep_file import OWN_SETTINGS, SweepFile, Variant


@dataclass(frozen=True)
class SweepRun:
    """A variant with one seed."""

    variant: str
    seed: int
    config_file: Path
    overrides: tuple[str, ...]
    """All that `vppo train` is given besides the file."""
    config: RunConfig

    @property
    def name(self) -> str:
        return self.config.trainer.experiment_name

    @property
    def folder(self) -> Path:
        return RunFolder.of(self.config.trainer).root


@dataclass(frozen=True)
class Sweep:
    name: str
    folder: Path
    """runs_dir/<name>; its runs lie in it, and its results."""
    variants: tuple[str, ...]
    seeds: tuple[int, ...]
    baseline: str
    runs: tuple[SweepRun, ...]
    """In the order in which they run: all variants of the first seed, then those of the next."""

    def of(self, variant: str) -> list[SweepRun]:
        """Returns the runs of a variant, in the order of the seeds."""
        return [run for run in self.runs if run.variant == variant]


def plan_sweep(file: SweepFile, overrides: Sequence[str] = ()) -> Sweep:
    """Loads the settings of every run.

    Args:
        overrides: settings of the command line, for all runs. They win over those of the file.

    Raises:
        ValueError: naming what is wrong with any of them.
        FileNotFoundError: there is no such configuration.
    """
    problems = [
        f"'{override}': the sweep gives each run its own; leave it out"
        for override in overrides
        if override.partition("=")[0].strip() in OWN_SETTINGS
    ]
    runs: list[SweepRun] = []
    for seed in file.seeds:
        for variant in file.variants:
            try:
                runs.append(_run_of(file, variant, seed, overrides))
            except ValueError as error:
                problems += [f"{variant.name}: {error}"] if seed == file.seeds[0] else []
    problems += [] if problems else _common_problems(runs)
    if problems:
        heading = f"{file.path}: no run was started"
        raise ValueError("\n  - ".join([heading, *(problem.replace("\n", "\n  ") for problem in problems)]))
    return Sweep(
        name=file.name,
        folder=runs[0].folder.parent,
        variants=tuple(variant.name for variant in file.variants),
        seeds=file.seeds,
        baseline=file.baseline,
        runs=tuple(runs),
    )


def _run_of(file: SweepFile, variant: Variant, seed: int, overrides: Sequence[str]) -> SweepRun:
    own = (_quoted(file.name), f"{variant.name}-seed{seed}", str(seed))
    settings = (f"{setting}={value}" for setting, value in zip(OWN_SETTINGS, own, strict=True))
    words = (*variant.overrides, *overrides, *settings)
    config = load_config(variant.config, words)
    check_training(config)
    if not config.trainer.resume:
        raise ValueError("trainer.resume=false, but a sweep goes on with runs that were interrupted; leave it out")
    return SweepRun(variant.name, seed, variant.config, words, config)


def _quoted(name: str) -> str:
    """Writes a name so that YAML reads it back as a text: one like 2026, 1e3 or off needs quotes."""
    return name if read_yaml(name, "name") == name else f"'{name}'"


def _common_problems(runs: Sequence[SweepRun]) -> Iterator[str]:
    """Yields what only the runs together show."""
    folders = {run.config.trainer.runs_dir for run in runs}
    if len(folders) > 1:
        yield f"trainer.runs_dir is {' and '.join(sorted(folders))}; the runs of a sweep lie in one folder"
    seen: dict[str, str] = {}
    for run in runs:
        if run.seed != runs[0].seed:
            break
        same = _without_name(run.config).model_dump_json()
        if same in seen:
            yield f"{seen[same]} and {run.variant} have the same settings"
        seen.setdefault(same, run.variant)


def _without_name(config: RunConfig) -> RunConfig:
    """Returns the settings without the name of the run."""
    return config.model_copy(update={"trainer": config.trainer.model_copy(update={"experiment_name": ""})})
