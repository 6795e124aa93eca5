"""The results of a scoring pass, written token by token and summed over the ranks that hold them.

Shape suffix legend: B = responses; T = response tokens, right-padded; N = response tokens of a micro-batch, flat.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vppo.parallel.batching import ResponseTokens
from megatron_vppo.parallel.vocab_head import TwoViews


class ScoreTable:
    """Log-probs, entropies, divergences and the like of all response tokens; 0.0 until they are written."""

    def __init__(self, num_responses: int, num_tokens: int, *, device: torch.device) -> None:
        self._tables_6BT = torch.zeros(6, num_responses, num_tokens, device=device)
        self.logp_BT, self.entropy_BT, self.perturbed_logp_BT = self._tables_6BT[:3].unbind()
        self.divergence_BT, self.perturbed_entropy_BT, self.visual_focus_BT = self._tables_6BT[3:].unbind()

    def write_original(self, tokens: ResponseTokens, logp_N: Tensor, entropy_N: Tensor) -> None:
        at = _place(tokens)
        self.logp_BT[at], self.entropy_BT[at] = logp_N, entropy_N

    def write_perturbed(self, tokens: ResponseTokens, logp_N: Tensor) -> None:
        self.perturbed_logp_BT[_place(tokens)] = logp_N

    def write_two_views(self, tokens: ResponseTokens, views: TwoViews) -> None:
        self.write_original(tokens, views.logp_N, views.entropy_N)
        self.write_perturbed(tokens, views.perturbed_logp_N)
        self.divergence_BT[_place(tokens)] = views.divergence_N
        self.perturbed_entropy_BT[_place(tokens)] = views.perturbed_entropy_N

    def write_visual_focus(self, at: tuple[Tensor, Tensor], focus_N: Tensor) -> None:
        """`at`: int64 [N] each; the rows and columns."""
        self.visual_focus_BT[at] = focus_N

    def sum_over_ranks(self, *, counts: bool) -> ScoreTable:
        """Adds up the tables of all ranks, in host memory and equal on every rank: one counting rank wrote each token.

        A collective over all ranks; the table itself is used up.
        """
        if not counts:
            self._tables_6BT.zero_()
        dist.all_reduce(self._tables_6BT)
        whole = ScoreTable(*self.logp_BT.shape, device=torch.device("cpu"))
        whole._tables_6BT.copy_(self._tables_6BT)
        return whole


def _place(tokens: ResponseTokens) -> tuple[Tensor, Tensor]:
    assert tokens.at is not None, "scoring sends the places of tokens"
    return tokens.at
