"""The page: header, sections of charts, samples, settings. page.css and page.js are inlined."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_vppo.observability.progress import clock
from megatron_vppo.observability.report.charts import chart_html
from megatron_vppo.observability.report.data import RunData, load_run
from megatron_vppo.observability.report.document import document_html
from megatron_vppo.observability.report.samples import pick_samples, samples_html
from megatron_vppo.observability.report.scales import significant, step_axis
from megatron_vppo.observability.report.sections import sections
from megatron_vppo.observability.report.text import html_text
from megatron_vppo.observability.sinks import METRICS_FILE
from megatron_vppo.system.whole import whole_file


def write_report(run_dir: str | Path) -> Path:
    """Writes <run_dir>/report.html and returns its path. For an empty or damaged run, the page says what is missing.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is not that of a run.
    """
    path = Path(run_dir) / "report.html"
    html = render_report(run_dir)
    if not (Path(run_dir) / METRICS_FILE).exists():
        raise ValueError(f"{run_dir} has no {METRICS_FILE}; give the folder of a run")
    with whole_file(path) as file:
        file.write(html.encode("utf-8"))
    return path


def render_report(run_dir: str | Path) -> str:
    """Renders the whole page as one HTML document without outside references."""
    run = load_run(run_dir)
    project, name = _names(run)
    body = f"{_header_html(run, project, name)}<main>{_body_html(run)}</main>"
    return document_html(f"{name} · {project}", body, charts=True)


def _body_html(run: RunData) -> str:
    html = []
    if run.rows:
        steps = step_axis([int(row["step"]) for row in run.rows])
        for section in sections(run):
            charts = "".join(chart_html(chart, steps) for chart in section.charts)
            html.append(_section_html(section.anchor, section.title, section.lead, f'<div class="grid">{charts}</div>'))
    else:
        html.append(
            '<section class="blank"><h2>No steps recorded yet</h2><p>This run folder has no readable line in '
            "<code>metrics.jsonl</code>. A line is written at the end of each training step: run the report again "
            "when the first step has ended.</p></section>"
        )
    lead = "Responses from the first, middle and last recorded step. Point at a token for its numbers."
    html.append(_section_html("samples", "Samples", lead, samples_html(pick_samples(run.folder))))
    if run.config_text:
        html.append(
            '<section id="settings"><details><summary>All settings (config.yaml)</summary>'
            f"<pre>{html_text(run.config_text)}</pre></details></section>"
        )
    return "".join(html)


def _section_html(anchor: str, title: str, lead: str, content: str) -> str:
    return (
        f'<section id="{anchor}"><header class="sectionhead"><h2>{html_text(title)}</h2>'
        f"<p>{html_text(lead)}</p></header>{content}</section>"
    )


def _header_html(run: RunData, project: str, name: str) -> str:
    tiles = "".join(
        f'<div class="tile {kind}"><dt>{html_text(label)}</dt>'
        f"<dd>{html_text(value)}<small>{html_text(extra)}</small></dd></div>"
        for label, value, extra, kind in _tiles(run)
    )
    settings = "".join(
        f"<div><dt>{html_text(label)}</dt><dd>{html_text(value)}</dd></div>" for label, value in _settings(run)
    )
    written = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return (
        f'<header class="page"><p class="eyebrow">{html_text(project)}<span>report of {written}</span></p>'
        f'<h1>{html_text(name)}</h1><p class="result">{_result(run)}</p><dl class="tiles">{tiles}</dl>'
        f'<dl class="settings">{settings}</dl></header>'
    )


def _names(run: RunData) -> tuple[str, str]:
    project = run.setting("trainer.project_name") or run.folder.resolve().parent.name or "run"
    return str(project), str(run.setting("trainer.experiment_name") or run.folder.resolve().name)


def _result(run: RunData) -> str:
    """Says in one sentence what the run achieved."""
    accuracy = run.series("val/accuracy")
    last = int(run.rows[-1]["step"]) if run.rows else 0
    steps = f"{last:,} training step{'' if last == 1 else 's'}"
    if len(accuracy.values) < 2:
        if accuracy.values:
            return f"Held-out accuracy {_percent(accuracy.values[0])} at step {accuracy.steps[0]}; {steps} so far."
        return f"{steps}; no validation recorded." if run.rows else "Nothing recorded yet."
    start, end = accuracy.values[0], accuracy.values[-1]
    points = f"{abs(end - start) * 100:.1f} points"
    verb = "stayed at" if abs(end - start) < 5e-4 else "rose from" if end > start else "fell from"
    if verb == "stayed at":
        return f"Held-out accuracy {verb} <b>{_percent(end)}</b> over {steps}."
    change = "up" if end > start else "down"
    return (
        f"Held-out accuracy {verb} <b>{_percent(start)}</b> to <b>{_percent(end)}</b> "
        f'<span class="{change}">{"+" if end > start else "−"}{points}</span> over {steps}.'
    )


def _tiles(run: RunData) -> list[tuple[str, str, str, str]]:
    """Lists the tiles as (label, value, small print, kind); tiles without data are left out."""
    tiles = []
    reward = run.series("critic/score/mean").values
    if reward:
        few = max(1, min(5, len(reward) // 2))
        first, last = (significant(sum(part) / few, 3) for part in (reward[:few], reward[-few:]))
        note = f"mean of the first and last {few} steps" if few > 1 else "first and last step"
        one = len(reward) == 1
        tiles.append(("Training reward", last if one else f"{first} → {last}", "one step" if one else note, ""))
    seconds = run.series("timing_s/step").values
    if seconds:
        per_step = f"{significant(sum(seconds) / len(seconds), 3)} s per step"
        tiles.append(("Time in steps", clock(sum(seconds)), per_step, ""))
    difference = run.series("training/rollout_logp_diff_max").values
    if difference:
        note = "largest log-prob difference, nats"
        tiles.append(("Rollout against trainer", significant(max(difference), 2), note, ""))
    checks = run.series("weight_sync/checksums_ok").values
    if checks:
        bad = sum(1 for value in checks if value < 1)
        text = f"{len(checks):,} of {len(checks):,} equal" if not bad else f"{bad:,} of {len(checks):,} differ"
        tiles.append(("Weight checksums", text, "steps verified", "bad" if bad else ""))
    for name, label, note in (
        ("rollout/skipped_steps", "Skipped steps", "no prompt had right and wrong responses"),
        ("reward/errors", "Reward errors", "graded zero after an error or time-out"),
    ):
        total = sum(run.series(name).values)
        if total:
            tiles.append((label, f"{total:,.0f}", note, "bad"))
    return tiles


def _paths(files: Any) -> list[Any]:
    """Lists the paths of data.train_files, which is one path or several files with their settings."""
    return [file["path"] for file in files] if isinstance(files, list) else [files]


def _settings(run: RunData) -> list[tuple[str, str]]:
    """Lists the settings that tell this run from others. Settings missing in config.yaml are left out."""
    get = run.setting
    rows: list[tuple[str, Sequence[tuple[str, Any]]]] = [
        ("Model", [("", get("model.path")), ("", get("model.dtype"))]),
        ("Algorithm", [("", _algorithm(run)), ("preset", get("algorithm.preset"))]),
        ("Dependency", [("", get("algorithm.dependency")), ("", get("algorithm.perturb.kind"))]),
        ("Data", [("", path) for path in _paths(get("data.train_files"))]),
        ("Batch", [("", _times(get("data.rollout_batch_size"), get("rollout.n"), "prompts", "responses"))]),
        ("Layout", [("TP", get("parallel.tensor_model_parallel_size")),
                    ("PP", get("parallel.pipeline_model_parallel_size")),
                    ("DP", get("parallel.data_parallel_size"))]),
        ("Learning rate", [("", get("actor.optim.lr"))]),
        ("Seed", [("", get("trainer.seed"))]),
    ]  # fmt: skip
    listed = []
    for label, parts in rows:
        text = " · ".join(f"{key} {value}".strip() for key, value in parts if value not in (None, ""))
        if text:
            listed.append((label, text))
    return listed


def _algorithm(run: RunData) -> str | None:
    perception = run.number_setting("algorithm.perception_loss_coef")
    base = _base_algorithm(run)
    return f"{base}, perception loss {perception:g} (PAPO)" if perception else base


def _base_algorithm(run: RunData) -> str | None:
    filtering = run.setting("algorithm.use_vppo_on_perception")
    shaping = run.setting("algorithm.use_advantage_shaping")
    if filtering is None and shaping is None:
        return None
    if filtering and shaping:
        return f"VPPO, {_percent(run.number_setting('algorithm.top_p_perception_tokens') or 0.0)} of tokens"
    if filtering or shaping:
        return "token filtering only" if filtering else "advantage shaping only"
    return "DAPO" if run.setting("algorithm.online_filtering") else "GRPO"


def _times(count: Any, each: Any, of: str, what: str) -> str | None:
    return None if count is None or each is None else f"{count} {of} × {each} {what}"


def _percent(value: float) -> str:
    return f"{value * 100:.1f}".removesuffix(".0") + "%"
