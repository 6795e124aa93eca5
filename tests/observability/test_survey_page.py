"""The page of a survey: its numbers, its lists, and text that is no markup."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_vppo.observability.survey_page import render_survey, write_survey_page


def one_set(source: str, **changes: Any) -> dict[str, Any]:
    spread = {"min": 1, "p10": 2, "median": 3, "p90": 4, "max": 5}
    return {
        "source": source, "rows": 9, "usable": 7, "broken": ["rows.jsonl, row 4: <script>"], "repeated": [[1, 2, 6]],
        "images_per_row": {"0": 2, "1": 5}, "width": spread, "height": spread, "prompt_tokens": {}, **changes,
    }  # fmt: skip


def test_numbers_and_lists(tmp_path: Path) -> None:
    shared = {"one": "a<b", "other": "c", "same": [[5, 8]], "images": [], "question": [[1, 2]]}
    report = {"sets": [one_set("a<b"), one_set("c")], "shared": [shared]}
    html = render_survey(report)
    for text in (
        "<h1>a&lt;b</h1>", "row 4: &lt;script&gt;", "<li>1, 2, 6</li>", "<td>that repeat another row</td><td>2</td>",
        "<td>with 1 image</td><td>5</td>", "<td>with 0 images</td><td>2</td>", "row 5 is row 8 of the other",
        "<h2>Rows of a&lt;b that c has too",
        "<td>width</td><td>1</td><td>2</td><td>3</td><td>4</td><td>5</td>",
    ):  # fmt: skip
        assert text in html
    assert "<script>" not in html and "prompt_tokens" not in html
    write_survey_page({"sets": [one_set("a")], "shared": []}, tmp_path / "page.html")
    assert "has too" not in (tmp_path / "page.html").read_text()
