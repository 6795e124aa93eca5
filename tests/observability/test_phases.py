"""The table of phases against the words that settings, metrics and the documents use for them."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from megatron_vppo.config.choices import Fp8Phase
from megatron_vppo.observability.phases import PHASES, PhaseName
from megatron_vppo.setup.holdings import HOLDINGS, RESTART, START, WRITE

ROOT = Path(__file__).parents[2]


def test_every_phase_stands_in_the_table_once() -> None:
    assert [phase.name for phase in PHASES] == list(get_args(PhaseName))
    for names in (
        [phase.span for phase in PHASES],
        [phase.label for phase in PHASES],
        [phase.report_label for phase in PHASES if phase.report_label],
        [phase.report_color for phase in PHASES if phase.report_color],
    ):
        assert len(set(names)) == len(names)


def test_the_spans_are_those_that_the_documents_promise() -> None:
    metrics = (ROOT / "docs" / "metrics.md").read_text()
    assert [phase.span for phase in PHASES if f"`timing_s/{phase.span}`" not in metrics] == []


def test_every_word_of_the_fp8_setting_is_a_phase() -> None:
    assert [phase.fp8_scope for phase in PHASES if phase.fp8_scope] == list(get_args(Fp8Phase))


def test_placement_moves_memory_between_phases_of_the_table() -> None:
    assert HOLDINGS.keys() - {phase.name for phase in PHASES} == {START, WRITE, RESTART}
