"""The results of a sweep so far: curves over steps, accuracy before and after, and differences to the baseline.

A variant is judged by its finished runs. As long as it has none, by those that have begun, at the steps that all of
them have reached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_vppo.observability.metrics import read_metrics
from megatron_vppo.observability.statistics import Estimate, PairedTest, estimate, paired_test
from megatron_vppo.sweep.answers import accuracies, steps_of_all
from megatron_vppo.sweep.plan import Sweep
from megatron_vppo.sweep.status import RunStatus

ACCURACY = "val/accuracy"
METRICS = (ACCURACY, "val/reward_score", "critic/score/mean", "response_length/mean")
"""The metrics that have a curve."""


@dataclass(frozen=True)
class MeanCurve:
    """A metric at the steps at which all seeds have it."""

    steps: tuple[int, ...]
    estimates: tuple[Estimate, ...]


@dataclass(frozen=True)
class PairedDifference:
    """A variant against the baseline, at the last step that both have validated with the same seeds."""

    step: int
    seeds: tuple[int, ...]
    test: PairedTest


@dataclass(frozen=True)
class VariantResults:
    name: str
    seeds: tuple[int, ...]
    """The seeds whose runs count; () if nothing is recorded yet."""
    finished: tuple[int, ...]
    """The seeds whose runs are finished."""
    curves: Mapping[str, MeanCurve]
    """One of each of METRICS; without steps where there is nothing."""
    difference: PairedDifference | None
    """None: it is the baseline, or cannot be paired with it; `why_not` says so."""
    why_not: str | None


@dataclass(frozen=True)
class SweepResults:
    name: str
    folder: Path
    baseline: str
    num_seeds: int
    variants: tuple[VariantResults, ...]


def gather_results(sweep: Sweep, states: Mapping[str, RunStatus]) -> SweepResults:
    """Reads the folders of all runs."""
    finished = {name: _seeds_in(sweep, states, name, "finished") for name in sweep.variants}
    counting = {name: finished[name] or _seeds_in(sweep, states, name, "unfinished") for name in sweep.variants}
    variants = []
    for name in sweep.variants:
        pair = _difference(counting[name], counting[sweep.baseline]) if name != sweep.baseline else None
        variants.append(
            VariantResults(
                name=name,
                seeds=tuple(counting[name]),
                finished=tuple(finished[name]),
                curves=_curves(list(counting[name].values())),
                difference=pair if isinstance(pair, PairedDifference) else None,
                why_not=pair if isinstance(pair, str) else None,
            )
        )
    return SweepResults(sweep.name, sweep.folder, sweep.baseline, len(sweep.seeds), tuple(variants))


def _seeds_in(sweep: Sweep, states: Mapping[str, RunStatus], variant: str, state: str) -> dict[int, Path]:
    """Returns the folders of the variant's runs that are in a state and have ended a step, by seed."""
    return {
        run.seed: run.folder
        for run in sweep.of(variant)
        if states[run.name].state == state and states[run.name].step is not None
    }


def _curves(folders: Sequence[Path]) -> dict[str, MeanCurve]:
    lines = [read_metrics(folder) for folder in folders]
    return {
        metric: _curve([{int(x["step"]): x[metric] for x in run if metric in x} for run in lines]) for metric in METRICS
    }


def _curve(runs: Sequence[Mapping[int, float]]) -> MeanCurve:
    steps = sorted(set.intersection(*(set(run) for run in runs))) if runs else []
    return MeanCurve(tuple(steps), tuple(estimate([run[step] for run in runs]) for step in steps))


def _difference(ours: Mapping[int, Path], theirs: Mapping[int, Path]) -> PairedDifference | str:
    """Returns the difference, or the reason why there is none."""
    seeds = tuple(seed for seed in ours if seed in theirs)
    if not seeds:
        return "no seed has begun in both"
    our_runs, their_runs = [ours[seed] for seed in seeds], [theirs[seed] for seed in seeds]
    steps = steps_of_all([*our_runs, *their_runs])
    if not steps:
        return "no step whose validation both have recorded; trainer.save_rollouts has to be true"
    our_answers, their_answers = accuracies(our_runs, steps[-1]), accuracies(their_runs, steps[-1])
    shared = [question for question in our_answers if question in their_answers]
    if not shared:
        return "they have not answered the same questions"
    test = paired_test([our_answers[q] for q in shared], [their_answers[q] for q in shared])
    return PairedDifference(steps[-1], seeds, test)
