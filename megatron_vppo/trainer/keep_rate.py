"""The share of groups that are kept, as the steps before have shown it: by it the size of a draw is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from megatron_vppo.system.records import Record, parse_record

MEMORY = 0.5
"""The weight of a step, of which the next one weighs 1."""


class SavedKeepRate(Record):
    """The rate as a checkpoint keeps it. Both numbers are sums over steps, of which older ones weigh less."""

    kept: float = Field(ge=0, allow_inf_nan=False)
    sampled: float = Field(ge=0, allow_inf_nan=False)


class KeepRate:
    """Groups that were kept, and sampled, in the steps so far."""

    def __init__(self) -> None:
        self.seen = (0.0, 0.0)
        """Kept and sampled groups; (0, 0) if nothing is known."""

    def note(self, *, kept: int, sampled: int) -> None:
        """Adds a step. Its numbers must not depend on time, since the next draws follow from them."""
        self.seen = (MEMORY * self.seen[0] + kept, MEMORY * self.seen[1] + sampled)

    def state_dict(self) -> dict[str, Any]:
        """Returns the rate as plain numbers: the fields of SavedKeepRate."""
        return {"kept": self.seen[0], "sampled": self.seen[1]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken. Raises ValueError if it is no such state."""
        saved = parse_record(SavedKeepRate, state)
        self.seen = (saved.kept, saved.sampled)
