"""report.html: the numbers of the run are on it, foreign text stays text, and damaged runs give a page all the same."""

from __future__ import annotations

import base64
import io
import json
import re
import unicodedata
import zlib
from collections.abc import Mapping
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_vppo.observability.json_lines import dump_line
from megatron_vppo.observability.report import render_report, write_report
from megatron_vppo.observability.report.charts import script_json
from megatron_vppo.observability.report.samples import pick_samples
from megatron_vppo.observability.rollouts import RolloutRecord, png_pair, write_rollouts

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


class Elements(HTMLParser):
    """Every element of the page with its attributes and the text directly inside."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[int] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))
        if tag not in ("meta", "img", "path"):
            self._open.append(len(self.found) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        assert self.found[self._open[-1]][0] == tag, f"</{tag}> closes <{self.found[self._open[-1]][0]}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open:
            self.found[self._open[-1]][2].append(data)

    def all(self, tag: str, css: str | None = None) -> list[tuple[Mapping[str, str | None], str]]:
        return [
            (attrs, "".join(text))
            for name, attrs, text in self.found
            if name == tag and (css is None or css in (attrs.get("class") or "").split())
        ]


def write_metrics(run_dir: Path, rows: list[dict[str, Any]]) -> None:
    (run_dir / "metrics.jsonl").write_text("".join(dump_line({"time": 0.0, **row}) for row in rows))


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (28, 14), level).save(buffer, "PNG")
    return buffer.getvalue()


def record(row: int, *, accuracy: float, dependency: list[float], **other: Any) -> RolloutRecord:
    tokens = other.pop("tokens", [f"t{i}" for i in range(len(dependency))])
    base: RolloutRecord = {
        "split": "train", "row": row, "sample": 0, "problem": "<image>sum?", "answer": "8", "response": "".join(tokens),
        "tokens": tokens, "dependency": dependency, "kept": [int(d > 0.5) for d in dependency],
        "old_logps": [-0.25] * len(tokens), "masked_logps": [-1.5] * len(tokens),
        "rollout_logps": [-0.25] * len(tokens), "reward": accuracy, "accuracy": accuracy, "advantage": 1.0,
        "scale": 1.1, "finish_reason": "stop", "carried_tokens": 0,
    }  # fmt: skip
    return {**base, **other}  # type: ignore[typeddict-item]


def chart(html: str, title: str) -> str:
    (figure,) = [f for f in re.findall(r"<figure class=\"chart.*?</figure>", html, re.S) if f"<h3>{title}</h3>" in f]
    return figure


def hover(figure: str) -> dict[str, Any]:
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', figure, re.S)[1])  # type: ignore[index]


def test_the_result_stands_in_the_header(tmp_path: Path) -> None:
    write_metrics(tmp_path, [{"step": 0, "val/accuracy": 0.375}, {"step": 4, "val/accuracy": 0.625}])
    (tmp_path / "config.yaml").write_text("trainer: {project_name: digits, experiment_name: vppo seed 1}\n")
    page = Elements(render_report(tmp_path))
    assert page.all("h1") == [({}, "vppo seed 1")]
    text = re.sub(r"<[^>]+>", "", re.search(r'<p class="result">.*?</p>', render_report(tmp_path))[0])  # type: ignore[index]
    assert text == "Held-out accuracy rose from 37.5% to 62.5% +25.0 points over 4 training steps."


def test_a_chart_draws_its_values_where_the_axes_say(tmp_path: Path) -> None:
    write_metrics(tmp_path, [{"step": s, "critic/score/mean": v} for s, v in ((1, 0.0), (2, 0.5), (3, 1.0))])
    figure = chart(render_report(tmp_path), "Reward")
    # Steps 1..3 with half a step of room: 1/6, 1/2, 5/6 of the width; rewards 0..1 on an axis from 0 to 1.
    assert 'd="M166.7 1000.0 500.0 500.0 833.3 0.0"' in figure
    assert re.findall(r"bottom:([\d.]+)%\">([^<]+)<", figure) == [("0.00", "0.0"), ("50.00", "0.5"), ("100.00", "1.0")]
    assert hover(figure)["steps"] == [1, 2, 3]
    assert hover(figure)["series"] == [{"label": "mean", "color": 1, "values": [0.0, 0.5, 1.0]}]


def test_time_per_step_adds_up_to_the_step(tmp_path: Path) -> None:
    row = {"timing_s/gen": 3.0, "timing_s/update_actor": 4.0, "timing_s/mystery": 0.5, "timing_s/step": 8.0}
    write_metrics(tmp_path, [{"step": 1, **row}, {"step": 2, **row, "timing_s/step": 6.0}])
    series = {s["label"]: s["values"] for s in hover(chart(render_report(tmp_path), "Time per step"))["series"]}
    assert series == {"sampling": [3.0, 3.0], "policy update": [4.0, 4.0], "other": [1.0, 0.0]}


def test_a_long_run_stacks_means_of_several_steps(tmp_path: Path) -> None:
    # 150 steps in at most 75 bars: two steps each, of 1 s and 3 s.
    rows = [{"step": s, "timing_s/gen": 1.0 + 2.0 * (s % 2), "timing_s/step": 4.0} for s in range(1, 151)]
    write_metrics(tmp_path, rows)
    figure = chart(render_report(tmp_path), "Time per step")
    assert "seconds, mean of 2 steps" in figure
    sampling, other = re.findall(r'<path class="fill"[^>]* d="([^"]*)"', figure)
    # The axis ends at 4 s, where every step ends; the sampling bars reach 2 s.
    assert len(re.findall(r"V500\.0h", sampling)) == 75 and len(re.findall(r"500\.0V0\.0h", other)) == 75


def test_nan_is_counted_and_missing_metrics_say_no_data(tmp_path: Path) -> None:
    write_metrics(tmp_path, [{"step": 1, "actor/grad_norm": float("nan")}, {"step": 2, "actor/grad_norm": 1.0}])
    html = render_report(tmp_path)
    assert "1 NaN or infinite, not drawn" in chart(html, "Gradient norm")
    assert "no data" in chart(html, "Entropy") and "no data" not in chart(html, "Gradient norm")


def test_the_perception_loss_is_named(tmp_path: Path) -> None:
    write_metrics(tmp_path, [{"step": 1, "val/accuracy": 0.5}])
    algorithm = {"use_vppo_on_perception": False, "use_advantage_shaping": False, "online_filtering": True}
    named = []
    for loss in ({}, {"perception_loss_coef": 0.02}):
        (tmp_path / "config.yaml").write_text(json.dumps({"algorithm": {**algorithm, **loss}}))
        named.append("DAPO, perception loss 0.02 (PAPO)" in render_report(tmp_path))
    assert named == [False, True]


def test_foreign_text_stays_text(tmp_path: Path) -> None:
    write_metrics(tmp_path, [{"step": 1, "val/accuracy": 0.5}])
    (tmp_path / "config.yaml").write_text(
        json.dumps({"trainer": {"experiment_name": HOSTILE}, "model": {"path": HOSTILE}})
    )
    tokens = ["<script>", "alert(1)", "</script>", HOSTILE]
    hostile = record(1, accuracy=0.0, dependency=[1.0] * 4, tokens=tokens, problem=HOSTILE, answer=HOSTILE)
    hostile["split"] = hostile["reward_error"] = HOSTILE
    hostile["images"] = [{"original": '" onerror="alert(3)', "masked": base64.b64encode(png(0)).decode()}]
    write_rollouts(tmp_path, 1, [hostile])
    page = Elements(render_report(tmp_path))  # raises where elements do not nest
    with_scripts = len(page.all("figure", "chart")) - len(page.all("figure", "empty")) + len(page.all("article"))
    assert len(page.all("script")) == with_scripts + 1  # page.js
    assert [attrs["src"][:22] for attrs, _ in page.all("img")] == ["data:image/png;base64,"]  # type: ignore[index]
    assert not [attrs for _, attrs, _ in page.found for name in attrs if name.startswith("on")]
    assert [text for _, text in page.all("div", "tokens")] == [""]
    shown = [text for attrs, text in page.all("span") if "--d" in (attrs.get("style") or "") and "class" in attrs]
    assert [text for text in shown if text] == tokens
    assert page.all("h1")[0][1] == HOSTILE


UNSEEN = "nul\x00 \x1b[31mred \x7f\x85 x\u202egnp.exe\u202c \u2066i\u2069 a\u200bb\ufeff \ud83d \r\n\tend"
SHOWN = "nul␀ ␛[31mred ␡<U+0085> x<U+202E>gnp.exe<U+202C> <U+2066>i<U+2069> a<U+200B>b<U+FEFF> <U+D83D> ␍\n\tend"


def test_characters_that_act_unseen_are_shown(tmp_path: Path) -> None:
    """A record keeps them; on the page they are symbols, in every place that shows text of others."""
    folder = tmp_path / "run\u202e\udcff"
    folder.mkdir()
    write_metrics(folder, [{"step": 1, "val/accuracy": 0.5, f"reward/{UNSEEN}": 1.0, f"timing_s/{UNSEEN}": 1.0}])
    settings = {"model": {"path": UNSEEN}, "trainer": {"project_name": UNSEEN}}
    (folder / "config.yaml").write_text(json.dumps(settings))  # PyYAML reads a raw one as the end of the file
    tokens = ["plain", *UNSEEN]
    whole = record(1, accuracy=1.0, dependency=[1.0] * len(tokens), tokens=tokens, problem=UNSEEN, answer=UNSEEN)
    whole["split"] = whole["reward_error"] = UNSEEN
    write_rollouts(folder, 1, [whole, {"response": UNSEEN}])
    html = write_report(folder).read_bytes().decode("utf-8")
    acting = [c for c in html if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in "\n\t"]
    assert acting == []
    page = Elements(html)
    assert page.all("title")[0][1] == f"run<U+202E><U+DCFF> · {SHOWN}"  # a title holds no elements
    text = re.sub(r"<[^>]+>", "", html)  # what is left has no '<' but as an entity
    assert unescape(text).count(SHOWN) == 8  # title, eyebrow, setting, split, problem, two facts, response
    symbols = [text for _, text in page.all("code", "unseen")]
    assert "<U+202E>" in symbols and "␀" in symbols and "x" not in symbols
    (shaded,) = re.findall(r'<div class="tokens">(<span.*?)</div>', html, re.S)
    assert unescape(re.sub(r"<[^>]+>", "", shaded)) == "plain" + SHOWN.replace("\n", "⏎\n")


def test_json_in_a_script_element_cannot_end_it() -> None:
    embedded = script_json({"label": HOSTILE})
    assert "<" not in embedded and json.loads(embedded) == {"label": HOSTILE}


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    write_metrics(tmp_path, [{"step": 1, "val/accuracy": 0.5}])
    write_rollouts(tmp_path, 1, [record(1, accuracy=1.0, dependency=[1.0], images=[png_pair(png(9), png(0))])])
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    html = path.read_text()
    page = Elements(html)
    assert not re.search(r"https?://|@import|url\(", html)
    assert not page.all("link") and not [attrs for attrs, _ in page.all("script") if "src" in attrs]
    original, perturbed = [base64.b64decode((attrs["src"] or "").partition(",")[2]) for attrs, _ in page.all("img")]
    assert (original, perturbed) == (png(9), png(0))


def test_tokens_are_shaded_by_the_root_of_their_dependency(tmp_path: Path) -> None:
    write_metrics(tmp_path, [{"step": 1}])
    write_rollouts(tmp_path, 1, [record(1, accuracy=1.0, dependency=[0.0, 0.25, 1.0, 4.0])])
    page = Elements(render_report(tmp_path))
    spans = [
        (attrs["style"], attrs.get("class"), text) for attrs, text in page.all("span") if re.fullmatch(r"t\d", text)
    ]
    # Full shade at 4 nats: sqrt(d / 4).
    assert spans == [
        ("--d:0.000", None, "t0"), ("--d:0.250", None, "t1"), ("--d:0.500", "k", "t2"), ("--d:1.000", "k", "t3"),
    ]  # fmt: skip
    legend = re.search(r'<ul class="scale">(.*?)</ul>', render_report(tmp_path))
    assert legend and re.findall(r"</span>([^<]+)</li>", legend[1]) == ["0", "0.25", "1", "2.25", "4 nats or more"]
    (article,) = re.findall(r"<article.*?</article>", render_report(tmp_path), re.S)
    assert hover(article) == {
        "dependency": [0.0, 0.25, 1.0, 4.0], "kept": [0.0, 0.0, 1.0, 1.0], "old_logps": [-0.25] * 4,
        "masked_logps": [-1.5] * 4, "rollout_logps": [-0.25] * 4,
    }  # fmt: skip


def test_one_extreme_token_does_not_bleach_the_others(tmp_path: Path) -> None:
    write_metrics(tmp_path, [{"step": 1}])
    write_rollouts(tmp_path, 1, [record(1, accuracy=1.0, dependency=[4.0] * 99 + [10000.0])])
    assert "4 nats or more" in render_report(tmp_path)  # 99th percentile of 100 values: the 99th


def test_samples_are_right_and_wrong_answers_of_first_middle_and_last_step(tmp_path: Path) -> None:
    for step in (1, 5, 10, 15, 20):
        records = [record(row, accuracy=float(row % 2), dependency=[1.0]) for row in range(10)]
        records[7]["images"] = [png_pair(png(1), None)]
        write_rollouts(tmp_path, step, records)
    samples = [(sample.step, sample.record["row"]) for sample in pick_samples(tmp_path)]
    # Row 7 has an image, so it comes first of the right ones; rows without follow in order.
    assert samples == [(step, row) for step in (1, 10, 20) for row in (7, 1, 0, 2)]


def test_samples_of_different_prompts_come_first(tmp_path: Path) -> None:
    write_rollouts(tmp_path, 1, [record(row, accuracy=1.0, dependency=[1.0]) for row in (3, 3, 3, 4)])
    assert [sample.record["row"] for sample in pick_samples(tmp_path)] == [3, 4]


def test_an_empty_run_says_so(tmp_path: Path) -> None:
    html = render_report(tmp_path)
    assert "No steps recorded yet" in html and "No rollouts recorded" in html


def test_a_missing_folder_is_an_error_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_report(tmp_path / "nowhere")


def test_damaged_files_cost_only_what_they_held(tmp_path: Path) -> None:
    write_metrics(tmp_path, [{"step": 1, "val/accuracy": 0.25}])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('\x00\x00{"step": 2\n{"step": 3, "val/accuracy": 0.75}\n{"step": 4, "val/acc')
    (tmp_path / "config.yaml").write_text("trainer: [unclosed\n")
    noise = [zlib.crc32(bytes([i % 256, i // 256])) / 2**32 for i in range(40000)]
    records = [record(row, accuracy=1.0, dependency=noise[row * 4000 : row * 4000 + 4000]) for row in range(10)]
    path = write_rollouts(tmp_path, 1, records)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (tmp_path / "rollouts" / "step_2.jsonl.zst").write_bytes(b"not zstd")
    html = render_report(tmp_path)
    assert "<b>25%</b> to <b>75%</b>" in html
    assert html.count("<article") >= 1 and "trainer: [unclosed" in html


def test_records_with_missing_fields_are_shown(tmp_path: Path) -> None:
    write_metrics(tmp_path, [{"step": 1}])
    write_rollouts(tmp_path, 1, [{"response": "only text"}, record(1, accuracy=1.0, dependency=[1.0], kept=None)])
    html = render_report(tmp_path)
    assert "only text" in html and html.count("<article") == 2
