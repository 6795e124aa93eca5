"""The page of layouts lists those that are tested, and the table says what a run recorded."""

from __future__ import annotations

import subprocess

import layout_table
import pytest

from tests.proofs.test_layouts import GRADIENT_TOLERANCE, LAYOUTS, LOGP_TOLERANCE, MODELS


def test_the_page_lists_the_tested_layouts_within_their_bounds() -> None:
    page = layout_table.PAGE.read_text()
    assert layout_table.layouts_of(page) == list(LAYOUTS)
    body = page[page.index(layout_table.BEGIN) : page.index(layout_table.END)]
    for line in body.splitlines()[3:]:
        values = [float(cell) for cell in line.split("|")[2:-1]]
        assert len(values) == 2 * len(MODELS)
        assert max(values[::2]) < LOGP_TOLERANCE and max(values[1::2]) < GRADIENT_TOLERANCE


def test_a_row_per_layout() -> None:
    rows = {"TP 2": {"A: log-probs": 1.26e-6, "A: gradients": 3e-5}, "one": {"A: log-probs": 0.0, "A: gradients": 1e-7}}
    assert layout_table.table(rows) == (
        "| Layout | A: log-probs | A: gradients |\n| --- | --- | --- |\n"
        "| TP 2 | 1e-06 | 3e-05 |\n| one | 0e+00 | 1e-07 |\n"
    )


def test_a_failed_layout_leaves_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    before = layout_table.PAGE.read_text()
    failed = subprocess.CompletedProcess(args=[], returncode=1)
    monkeypatch.setattr(layout_table.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(SystemExit, match="a layout failed"):
        layout_table.run_layouts()
    assert layout_table.PAGE.read_text() == before
