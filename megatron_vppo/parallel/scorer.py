"""Scoring: log-probs and entropies of response tokens under a model's present weights. It needs no optimizer.

Shape suffix legend: B = responses; T = response tokens, right-padded; N = response tokens of a micro-batch, flat; C =
tokens of this context-parallel rank; h = hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from megatron_vppo.algorithm.types import PerturbKey, Response, Scores
from megatron_vppo.config.choices import Divergence
from megatron_vppo.models.qwen_vl import QwenVLModel
from megatron_vppo.parallel.batching import ResponseBatch, View
from megatron_vppo.parallel.schedule import ScheduleRunner
from megatron_vppo.parallel.score_chunks import Boundary, ScoreChunks
from megatron_vppo.parallel.score_table import ScoreTable

Views = Literal["original", "both"]


class Scorer:
    """Scores responses with the pipeline stages of a model, forward only; they need no gradient buffers."""

    def __init__(self, runner: ScheduleRunner) -> None:
        self._runner = runner
        self._chunks = ScoreChunks(runner.layout, seconds=runner.settings.scoring_chunk_seconds)

    @property
    def stages(self) -> tuple[QwenVLModel, ...]:
        return self._runner.stages

    def score(
        self,
        responses: Sequence[Response],
        *,
        step: int,
        views: Views,
        divergence: Divergence | None = None,
        boundary: Boundary | None = None,
    ) -> Scores:
        """Scores every response token. A collective: every rank passes all responses and gets all scores.

        Args:
            step: training step; with the response, it seeds the perturbation.
            views: 'both' also scores the perturbed image, in the same forward pass.
            divergence: the full-vocabulary divergence between the two views. None: none is computed.
            boundary: called between chunks of micro-batches; what it raises ends the scoring on every rank. None: there
                is no way out.
        """
        runner = self._runner
        perturbed = [views == "both" and bool(response.prompt.images) for response in responses]
        longest = max(len(response.token_ids) for response in responses)
        table = ScoreTable(len(responses), longest, device=runner.layout.device)
        perturbed_B = torch.tensor(perturbed, device=runner.layout.device)

        def read(batch: ResponseBatch, hidden_C1h: Tensor) -> None:
            if divergence is None:
                self._write_logps(table, batch, hidden_C1h)
            else:
                self._write_divergences(table, batch, hidden_C1h, perturbed_B, divergence)

        micro_batches = runner.scoring_micro_batches(responses, both_views=views == "both")
        micro_views = [self._views(rows, responses, step, perturbed) for rows in micro_batches]
        for chunk in self._chunks.of(micro_views, boundary):
            runner.forward(responses, chunk, read)
        whole = table.sum_over_ranks(counts=runner.holds_results)
        return Scores(
            old_logp_BT=whole.logp_BT,
            entropy_BT=whole.entropy_BT,
            perturbed_logp_BT=whole.perturbed_logp_BT if views == "both" else None,
            divergence_BT=whole.divergence_BT if divergence is not None else None,
        )

    def _views(
        self, rows: Sequence[int], responses: Sequence[Response], step: int, perturbed: Sequence[bool]
    ) -> list[View]:
        """Lists the original views of a micro-batch's rows, then the perturbed views of those that have an image."""
        per = self._runner.settings.perturb_per
        return [View(row, None) for row in rows] + [
            View(row, PerturbKey.of(responses[row], step, per=per)) for row in rows if perturbed[row]
        ]

    def _write_logps(self, table: ScoreTable, batch: ResponseBatch, hidden_C1h: Tensor) -> None:
        """Writes log-probs and entropies of all tokens of a micro-batch, those of both views together."""
        tokens = batch.tokens
        hidden_Nh = tokens.predicting(hidden_C1h)
        logp_N, entropy_N = self._runner.vocab_head(trained=False).token_logps(
            hidden_Nh, tokens.target_N, with_entropy=True
        )
        assert entropy_N is not None
        original_N, perturbed_N = ~tokens.perturbed_N, tokens.perturbed_N
        originals = tokens.select(original_N)
        table.write_original(originals, logp_N[original_N], entropy_N[original_N])
        # A row without an image has no perturbed view: its original one stands for both. The others are overwritten.
        table.write_perturbed(originals, logp_N[original_N])
        table.write_perturbed(tokens.select(perturbed_N), logp_N[perturbed_N])

    def _write_divergences(
        self, table: ScoreTable, batch: ResponseBatch, hidden_C1h: Tensor, perturbed_B: Tensor, kind: Divergence
    ) -> None:
        """Writes log-probs, entropies and divergences of a micro-batch.

        Tokens of rows with an image go through the head in pairs, original and perturbed. Those of rows without an
        image have one view, which stands for both; their divergence stays zero.
        """
        head, tokens = self._runner.vocab_head(trained=False), batch.tokens
        paired_N = perturbed_B[tokens.row_N]
        single = tokens.select(~paired_N)
        # Both views of a row have the same length, so context parallelism cuts them at the same tokens, and rows are
        # packed in the same order: the two selections match token by token.
        originals, perturbed = tokens.select(paired_N & ~tokens.perturbed_N), tokens.select(tokens.perturbed_N)
        logp_N, entropy_N = head.token_logps(single.predicting(hidden_C1h), single.target_N, with_entropy=True)
        assert entropy_N is not None
        table.write_original(single, logp_N, entropy_N)
        table.write_perturbed(single, logp_N)
        both = head.two_views(
            originals.predicting(hidden_C1h),
            perturbed.predicting(hidden_C1h),
            originals.target_N,
            kind=kind,
        )
        table.write_two_views(originals, both)
