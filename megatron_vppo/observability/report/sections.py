"""The charts of the report, in order, and the metrics that they show (docs/metrics.md)."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vppo.observability.phases import PHASES
from megatron_vppo.observability.report.charts import Chart, Line
from megatron_vppo.observability.report.data import RunData, ratio, rest_of_step


@dataclass(frozen=True, slots=True)
class ReportSection:
    anchor: str
    title: str
    lead: str
    charts: tuple[Chart, ...]


def sections(run: RunData) -> tuple[ReportSection, ...]:
    return (
        ReportSection("learning", "Learning", "Is the model getting better at the task?", _learning(run)),
        ReportSection(
            "perception",
            "Visual perception",
            "Which tokens depend on the image and get the gradient?",
            _vppo(run),
        ),
        ReportSection("update", "Policy update", "Is the optimisation well behaved?", _update(run)),
        ReportSection(
            "system", "Rollout and system", "Do the engines agree, and where does the time go?", _system(run)
        ),
    )


def _learning(run: RunData) -> tuple[Chart, ...]:
    accuracy = (
        Line("held-out", run.series("val/accuracy"), 2),
        Line("sampled in training", run.series("reward/accuracy"), 1),
    )
    return (
        Chart("Accuracy", "fraction", accuracy, scale="zero", wide=True),
        Chart("Reward", "per response", (Line("mean", run.series("critic/score/mean"), 1),), scale="zero"),
        Chart("Entropy", "nats per token", (Line("mean", run.series("actor/entropy"), 4),), scale="zero"),
        Chart(
            "Response length",
            "tokens",
            (
                Line("mean", run.series("response_length/mean"), 1),
                Line("longest", run.series("response_length/max"), 5),
            ),
            scale="zero",
        ),
        Chart(
            "Cut at the length limit",
            "fraction",
            (Line("responses", run.series("response_length/clip_ratio"), 7),),
            scale="zero",
        ),
    )


def _vppo(run: RunData) -> tuple[Chart, ...]:
    target = run.number_setting("algorithm.top_p_perception_tokens")
    filtering = run.setting("algorithm.use_vppo_on_perception")
    return (
        Chart(
            "Tokens with policy gradient",
            "fraction",
            (Line("kept", run.series("actor/perception_token_fraction"), 1),),
            scale="zero",
            reference=("asked for", target) if target is not None and filtering else None,
        ),
        Chart(
            "Visual dependency of tokens",
            "nats, log scale",
            (
                Line("kept", run.series("actor/low_var_kl_mean_selected"), 1),
                Line("left out", run.series("actor/low_var_kl_mean_rejected"), 2),
            ),
            scale="log",
            wide=True,
        ),
        Chart(
            "Visual dependency of responses",
            "nats, log scale",
            (
                Line("highest", run.series("actor/global_sensitivity_score_max"), 5),
                Line("mean", run.series("actor/sensitivity_score_mean"), 1),
                Line("lowest", run.series("actor/global_sensitivity_score_min"), 2),
            ),
            scale="log",
            wide=True,
        ),
        Chart(
            "Factor on the advantage",
            "×",
            (
                Line("largest", run.series("actor/dynamic_scaling_max"), 5),
                Line("mean", run.series("actor/scaling_factor_mean"), 1),
            ),
        ),
    )


def _update(run: RunData) -> tuple[Chart, ...]:
    return (
        Chart(
            "Loss",
            "",
            (
                Line("policy gradient", run.series("actor/pg_loss"), 1),
                Line("entropy term", run.series("actor/entropy_penalty"), 4),
                Line("perception loss", run.series("actor/perception_loss"), 5),
                Line("entropy term, perturbed view", run.series("actor/perturbed_entropy_penalty"), 3),
                Line("sum", run.series("actor/loss"), 2),
            ),
        ),
        Chart(
            "Gradient norm",
            "before clipping",
            (Line("global", run.series("actor/grad_norm"), 1),),
            scale="zero",
        ),
        Chart(
            "Clipped tokens",
            "fraction",
            (
                Line("ratio above the bound", run.series("actor/pg_clipfrac_higher"), 1),
                Line("dual clip", run.series("actor/pg_clipfrac_lower"), 2),
            ),
            scale="zero",
        ),
        Chart("Distance from the old policy", "nats per token", (Line("KL", run.series("actor/ppo_kl"), 1),)),
        Chart(
            "Prompts that carry a gradient",
            "fraction",
            (Line("with right and wrong responses", ratio(run, "rollout/kept_groups", "rollout/sampled_groups"), 3),),
            scale="zero",
        ),
        Chart("Learning rate", "", (Line("rate", run.series("actor/lr"), 1),), scale="zero"),
    )


def _system(run: RunData) -> tuple[Chart, ...]:
    bound = run.number_setting("rollout.logprob_diff_bound")
    return (
        Chart("Time per step", "seconds", _phases(run), scale="stack", wide=True),
        Chart(
            "Throughput",
            "tokens per second and device",
            (Line("sampled tokens, prompts included", run.series("perf/throughput"), 3),),
            scale="zero",
        ),
        Chart(
            "Rollout–trainer gap",
            "nats, log scale",
            (
                Line("largest log-prob difference", run.series("training/rollout_logp_diff_max"), 2),
                Line("mean", run.series("training/rollout_logp_diff_mean"), 1),
            ),
            scale="log",
            reference=("bound", bound) if bound is not None and bound > 0 else None,
        ),
        Chart(
            "Tokens over the bound",
            "fraction",
            (Line("of all response tokens", run.series("training/rollout_logp_diff_frac_over"), 2),),
            scale="zero",
        ),
        Chart(
            "Peak memory",
            "GiB, first rank",
            (Line("so far", run.series("perf/max_memory_allocated_gb"), 4),),
            scale="zero",
        ),
    )


def _phases(run: RunData) -> tuple[Line, ...]:
    """Returns the seconds of the logged phases that have a bar of their own, in order; the rest is 'other'."""
    logged = set(run.names("timing_s/"))
    bars = [
        (f"timing_s/{phase.span}", phase.report_label, phase.report_color)
        for phase in PHASES
        if phase.report_label is not None and f"timing_s/{phase.span}" in logged
    ]
    lines = [Line(label, run.series(name), color) for name, label, color in bars]
    rest = rest_of_step(run, [name for name, _, _ in bars])
    return (*lines, Line("other", rest, 0))
