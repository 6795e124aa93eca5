"""Sampled responses with every token shaded by its visual dependency.

The strength of the shading is sqrt(min(d / top, 1)) for a dependency of d nats. `top` is the 99th percentile over all
tokens that the page shows, so that one extreme token does not make the others pale. The square root spreads small
dependencies, which most are.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from megatron_vppo.observability.json_lines import number
from megatron_vppo.observability.report.charts import script_json
from megatron_vppo.observability.report.scales import significant
from megatron_vppo.observability.report.text import html_text
from megatron_vppo.observability.rollouts import read_rollouts, rollout_path, rollout_steps

PER_VERDICT = 2
"""The number of right responses per step, and of wrong ones."""

MAX_TOKENS = 800
"""The number of tokens shown of one response."""

_BASE64 = re.compile(r"[A-Za-z0-9+/=]+")


@dataclass(frozen=True, slots=True)
class Sample:
    step: int
    record: Mapping[str, Any]

    @property
    def right(self) -> bool:
        return (number(self.record.get("accuracy")) or 0.0) >= 0.5


def pick_samples(run_dir: Path) -> list[Sample]:
    """Picks right and wrong responses of the first, the middle and the last recorded step."""
    steps = rollout_steps(run_dir)
    chosen = sorted({steps[0], steps[(len(steps) - 1) // 2], steps[-1]}) if steps else []
    samples = []
    for step in chosen:
        records = _readable(rollout_path(run_dir, step))
        for right in (True, False):
            kind = [sample for sample in (Sample(step, record) for record in records) if sample.right == right]
            kind.sort(key=lambda sample: not sample.record.get("images"))  # stable: those with images first
            samples += _different_prompts(kind)[:PER_VERDICT]
    return samples


def shading_top(samples: Iterable[Sample]) -> float:
    """Returns the dependency with full shading, in nats: the 99th percentile of those shown; 0.0 if none is."""
    shown = (_numbers(sample.record, "dependency")[:MAX_TOKENS] for sample in samples)
    values = sorted(d for dependencies in shown for d in dependencies if d is not None)
    return values[max(math.ceil(0.99 * len(values)) - 1, 0)] if values else 0.0


def shade(dependency: float | None, top: float) -> float:
    """Returns the strength of the shading, in [0, 1]."""
    if dependency is None or top <= 0 or dependency <= 0:
        return 0.0
    return math.sqrt(min(dependency / top, 1.0))


def samples_html(samples: Sequence[Sample]) -> str:
    """Draws the legend and the cards, or says that there are no samples."""
    if not samples:
        return '<p class="nodata">No rollouts recorded (trainer.save_rollouts)</p>'
    top = shading_top(samples)
    html = [_legend_html(top)]
    for step in sorted({sample.step for sample in samples}):
        cards = "".join(_card_html(sample, top) for sample in samples if sample.step == step)
        html.append(f'<h3 class="step">Step {step}</h3><div class="cards">{cards}</div>')
    return "".join(html)


def _card_html(sample: Sample, top: float) -> str:
    record = sample.record
    verdict, sign = ("right", "✓") if sample.right else ("wrong", "✗")
    facts = [("Ground truth", str(record.get("answer", "")))]
    for label, name in (("Reward", "reward"), ("Advantage", "advantage"), ("Factor", "scale")):
        value = number(record.get(name))
        if value is not None:
            facts.append((label, significant(value, 3)))
    facts.append(("Tokens", f"{len(_list(record, 'tokens'))}"))
    if record.get("finish_reason") == "length":
        facts.append(("Ended", "at the length limit"))
    if record.get("reward_error"):
        facts.append(("Reward error", str(record["reward_error"])))
    listed = "".join(f"<div><dt>{label}</dt><dd>{html_text(text)}</dd></div>" for label, text in facts)
    where = html_text(f"{record.get('split', 'row')} {record.get('row', '')}")
    problem = html_text(str(record.get("problem", ""))).replace("&lt;image&gt;", "<span>image</span>")
    return (
        f'<article class="sample">{_images_html(record)}<div class="text">'
        f'<header><span class="verdict {verdict}">{sign} {verdict}</span><span class="where">{where}</span></header>'
        f'<p class="problem">{problem}</p>'
        f'<div class="tokens">{_tokens_html(record, top)}</div><dl>{listed}</dl></div>'
        f'<script type="application/json">{script_json(_tooltips(record))}</script></article>'
    )


def _images_html(record: Mapping[str, Any]) -> str:
    figures = []
    for pair in _list(record, "images"):
        for name, caption in (("original", "image"), ("masked", "perturbed image")):
            data = pair.get(name) if isinstance(pair, Mapping) else None
            if isinstance(data, str) and _BASE64.fullmatch(data):
                figures.append(
                    f'<figure><img src="data:image/png;base64,{data}" alt="{caption}"/>'
                    f"<figcaption>{caption}</figcaption></figure>"
                )
    if not figures:
        return '<div class="images none">image not recorded</div>'
    return f'<div class="images">{"".join(figures)}</div>'


def _tokens_html(record: Mapping[str, Any], top: float) -> str:
    tokens = [str(token) for token in _list(record, "tokens")]
    if not tokens:
        return html_text(str(record.get("response", "")))
    dependency = _numbers(record, "dependency")
    kept = _numbers(record, "kept")
    spans = []
    for index, token in enumerate(tokens[:MAX_TOKENS]):
        strength = shade(dependency[index] if index < len(dependency) else None, top)
        mark = ' class="k"' if index < len(kept) and kept[index] else ""
        spans.append(f'<span{mark} style="--d:{strength:.3f}">{_token_html(token)}</span>')
    if len(tokens) > MAX_TOKENS:
        spans.append(f'<em class="more"> … {len(tokens) - MAX_TOKENS:,} more tokens</em>')
    return "".join(spans)


def _token_html(token: str) -> str:
    """Writes a token as HTML, with symbols for line breaks and for an empty token."""
    return html_text(token).replace("\n", "⏎\n") if token else "∅"


def _tooltips(record: Mapping[str, Any]) -> dict[str, list[float | None]]:
    """Returns the numbers that page.js shows over a token, one list entry per token."""
    return {
        name: [None if value is None else float(f"{value:.4g}") for value in _numbers(record, name)[:MAX_TOKENS]]
        for name in ("dependency", "kept", "old_logps", "masked_logps", "rollout_logps")
    }


def _legend_html(top: float) -> str:
    stops = "".join(
        f'<li><span class="swatch" style="--d:{strength:.3f}"></span>{significant(top * strength**2, 3)}{more}</li>'
        for strength, more in ((0.0, ""), (0.25, ""), (0.5, ""), (0.75, ""), (1.0, " nats or more"))
    )
    if top <= 0:
        return '<div class="shading">No visual dependency recorded</div>'
    return (
        f'<div class="shading"><span>Visual dependency</span><ul class="scale">{stops}</ul>'
        '<span class="kept"><span class="k">kept</span> carries policy gradient</span></div>'
    )


def _numbers(record: Mapping[str, Any], name: str) -> list[float | None]:
    """Reads a per-token list, with None for values that are missing or not finite."""
    parsed = [number(int(value) if isinstance(value, bool) else value) for value in _list(record, name)]
    return [value if value is not None and math.isfinite(value) else None for value in parsed]


def _list(record: Mapping[str, Any], name: str) -> list[Any]:
    """Returns a field that is a list; [] for anything else."""
    value = record.get(name)
    return value if isinstance(value, list) else []


def _different_prompts(samples: Sequence[Sample]) -> list[Sample]:
    """Sorts samples: first one of each prompt, then the others."""
    seen: set[tuple[str, str]] = set()
    first: list[Sample] = []
    rest: list[Sample] = []
    for sample in samples:
        prompt = (str(sample.record.get("split")), str(sample.record.get("row")))
        (rest if prompt in seen else first).append(sample)
        seen.add(prompt)
    return first + rest


def _readable(path: Path) -> list[dict[str, Any]]:
    """Reads the records of a file, up to the place where it is damaged."""
    records: list[dict[str, Any]] = []
    with contextlib.suppress(OSError, UnicodeDecodeError, zstandard.ZstdError):
        for record in read_rollouts(path):
            records.append(record)
    return records
