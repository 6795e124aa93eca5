"""The share of responses that keep the format, looked at once, before the first update.

A format that the start model never keeps gives no signal, or one that drowns all others. With Qwen3-VL Instruct the
usual reason is the tokens of <think> (data/plain_think.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_vppo.algorithm.types import GradedResponse
from megatron_vppo.data.plain_think import THINK_TAGS

LEAST_SHARE = 0.05
"""A share below it counts as none."""
METRIC = "format"
"""The name of the format's reward, in `reward.parts` and in the results of EasyR1's functions."""

logger = logging.getLogger(__name__)


@dataclass
class FormatShare:
    """Says the share, and warns of a small one."""

    grader: str
    """reward.reward_function."""
    asks: bool
    """True if template or system prompt ask for the tags."""
    has_tokens: bool
    """True if the tokenizer has tokens of their own for the tags."""
    say: Callable[[str], None]
    is_said: bool = False

    def look(self, items: Sequence[GradedResponse], *, where: str) -> None:
        """Looks at the first responses that are graded, and at none after them.

        Args:
            where: names them, for the message.
        """
        share = None if self.is_said else share_of_format(items, grader=self.grader)
        self.is_said = True
        if share is None:
            return
        self.say(f"format: {share:.1%} of {len(items)} responses {where} keep it")
        if share < LEAST_SHARE and (self.asks or any(THINK_TAGS[0] in one.response.prompt.problem for one in items)):
            logger.warning("%s", self._warning(share))

    def _warning(self, share: float) -> str:
        fix = (
            f"The tokenizer has tokens of their own for {' and '.join(THINK_TAGS)}, which Instruct models were not "
            "trained with: set data.plain_think_tokens=true"
            if self.has_tokens
            else "The tags are plain text to the tokenizer already, so the model does not do what the prompt asks for: "
            "read its responses in `vppo report`, and change data.format_prompt or the weight of the format"
        )
        return (
            f"the prompt asks for {THINK_TAGS[0]}, and {share:.1%} of the responses before the first update keep the "
            f"format, which is below {LEAST_SHARE:.0%}. {fix}"
        )


def share_of_format(items: Sequence[GradedResponse], *, grader: str) -> float | None:
    """Returns the mean of the format's reward; None if the reward has no such part."""
    if grader == METRIC:
        kept = [item.reward.accuracy for item in items]
    else:
        kept = [item.reward.metrics[METRIC] for item in items if METRIC in item.reward.metrics]
    return sum(kept) / len(kept) if kept else None
