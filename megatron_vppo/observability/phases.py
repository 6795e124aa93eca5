"""The phases of a step, in their order: one table for the loop, the terminal, the report, placement and FP8's scope.

A phase has one name in the code. Its other names are what files and people already know: the span is a key of
metrics.jsonl (docs/metrics.md), the word of `fp8.scope` is a setting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_vppo.config.choices import Fp8Phase

PhaseName = Literal["sample", "reward", "score", "advantage", "update", "sync", "validate"]


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of a step under all of its names.

    Example: `UPDATE` takes timing_s/update_actor seconds; the terminal calls it "update", the report "policy update".
    """

    name: PhaseName
    span: str
    """The name given to `RunLog.span`; its seconds are logged as timing_s/<span>."""
    label: str
    """The word on the terminal's line."""
    report_label: str | None = None
    """The name of its bar in the report's chart of seconds per step; None: it is part of 'other'."""
    report_color: int = 0
    """The slot of the palette in page.css, 1-8; 0: neutral."""
    fp8_scope: Fp8Phase | None = None
    """The word of `fp8.scope` that turns FP8 on for this phase; None: FP8 does not apply to it."""


SAMPLE = Phase("sample", span="gen", label="rollout", report_label="sampling", report_color=1)
REWARD = Phase("reward", span="reward", label="reward", report_label="reward", report_color=4)
SCORE = Phase(
    "score", span="score", label="score", report_label="scoring, both views", report_color=3, fp8_scope="scoring"
)
ADVANTAGE = Phase("advantage", span="adv", label="adv")
UPDATE = Phase(
    "update", span="update_actor", label="update", report_label="policy update", report_color=2, fp8_scope="update"
)
SYNC = Phase("sync", span="update_weights", label="sync", report_label="weights to vLLM", report_color=5)
VALIDATE = Phase("validate", span="testing", label="val", report_label="validation", report_color=6)

PHASES = (SAMPLE, REWARD, SCORE, ADVANTAGE, UPDATE, SYNC, VALIDATE)
