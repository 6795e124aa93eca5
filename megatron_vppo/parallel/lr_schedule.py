"""The learning rate of each training step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_vppo.config.choices import LrScheduleKind


@dataclass(frozen=True)
class LrSchedule:
    """A linear warm-up to `peak`, then a constant rate or a decay to `min_ratio` of it after the last step."""

    peak: float
    kind: LrScheduleKind
    warmup_steps: int
    total_steps: int
    """The training steps of the whole run, warm-up included."""
    min_ratio: float

    def at(self, step: int) -> float:
        """Returns the rate of training step `step`, counted from 1.

        The first step after the warm-up has the peak rate.
        """
        if step <= self.warmup_steps:
            return self.peak * step / self.warmup_steps
        progress = (step - 1 - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        left = {
            "constant": 1.0,
            "linear": 1.0 - progress,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        }[self.kind]
        return self.peak * (self.min_ratio + (1.0 - self.min_ratio) * left)
