"""Scoring: log-probs and entropies of response tokens under a model's present weights. It needs no optimizer.

Shape suffix legend: B = responses; T = response tokens, right-padded; N = response tokens of a micro-batch, flat; C =
tokens of this context-parallel rank; h = hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from functools import partial
from typing import Literal

from torch import Tensor

from megatron_vppo.algorithm.types import PerturbKey, Response, Scores
from megatron_vppo.config.choices import Divergence
from megatron_vppo.models.qwen_vl import QwenVLModel
from megatron_vppo.parallel.batching import ResponseTokens, views_of
from megatron_vppo.parallel.image_runs import showings
from megatron_vppo.parallel.schedule import ScheduleRunner
from megatron_vppo.parallel.score_chunks import Boundary, ScoreChunks
from megatron_vppo.parallel.score_table import ScoreTable
from megatron_vppo.parallel.visual_focus import visual_focus
from megatron_vppo.parallel.vocab_head import VocabHead

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
        with_visual_focus: bool = False,
        boundary: Boundary | None = None,
    ) -> Scores:
        """Scores every response token. A collective: every rank passes all responses and gets all scores.

        Args:
            step: training step; with the response, it seeds the perturbation.
            views: 'both' also scores the perturbed image, in the same forward pass.
            divergence: the full-vocabulary divergence between the two views. None: none is computed.
            with_visual_focus: also compare the tokens' hidden states with those of the images (see visual_focus.py).
            boundary: called between chunks of micro-batches; what it raises ends the scoring on every rank. None: there
                is no way out.
        """
        runner = self._runner
        per = runner.settings.perturb_per
        keys = [PerturbKey.of(response, step, per=per) if response.prompt.images else None for response in responses]
        read_keys = keys if views == "both" else [None] * len(responses)
        longest = max(len(response.token_ids) for response in responses)
        table = ScoreTable(len(responses), longest, device=runner.layout.device)
        head = functools.cache(partial(runner.vocab_head, trained=False))  # only the last stage has one

        def read(tokens: ResponseTokens, hidden_C1h: Tensor) -> None:
            if divergence is None:
                _write_logps(table, head(), tokens, hidden_C1h)
            else:
                _write_divergences(table, head(), tokens, hidden_C1h, divergence)
            if tokens.visual is not None:
                focus_N = visual_focus(
                    hidden_C1h[:, 0],
                    tokens.visual,
                    group=runner.layout.groups.cp,
                    chunk_tokens=runner.settings.head_chunk_tokens,
                )
                table.write_visual_focus(tokens.visual.at, focus_N)

        micro_batches = runner.scoring_micro_batches(responses, both_views=views == "both", to_end=with_visual_focus)
        micro_views = [views_of(rows, read_keys, to_end=with_visual_focus) for rows in micro_batches]
        showing = showings(responses, micro_views, ranks=runner.packer.split.image_ranks)
        for chunk in self._chunks.of(showing, boundary):
            runner.forward(responses, chunk, read, both_views=views == "both")
        whole = table.sum_over_ranks(counts=runner.holds_results)
        return Scores(
            old_logp_BT=whole.logp_BT,
            entropy_BT=whole.entropy_BT,
            perturbed_logp_BT=whole.perturbed_logp_BT if views == "both" else None,
            divergence_BT=whole.divergence_BT if divergence is not None else None,
            perturbed_entropy_BT=whole.perturbed_entropy_BT if divergence is not None else None,
            visual_focus_BT=whole.visual_focus_BT if with_visual_focus else None,
            perturb_keys=tuple(keys),
        )


def _write_logps(table: ScoreTable, head: VocabHead, tokens: ResponseTokens, hidden_C1h: Tensor) -> None:
    """Writes log-probs and entropies of all tokens of a micro-batch, those of both views together."""
    logp_N, entropy_N = head.token_logps(tokens.predicting(hidden_C1h), tokens.target_N, with_entropy=True)
    assert entropy_N is not None
    originals, perturbed = tokens.originals, tokens.perturbed
    table.write_original(tokens.select(originals), logp_N[originals], entropy_N[originals])
    # A row without an image has no perturbed view: its original one stands for both.
    table.write_perturbed(tokens.select(tokens.single), logp_N[tokens.single])
    table.write_perturbed(tokens.select(perturbed), logp_N[perturbed])


def _write_divergences(
    table: ScoreTable, head: VocabHead, tokens: ResponseTokens, hidden_C1h: Tensor, kind: Divergence
) -> None:
    """Writes log-probs, entropies and divergences of a micro-batch.

    Tokens of rows with an image go through the head in pairs, original and perturbed. Those of rows without an image
    have one view, which stands for both; their divergence stays zero.
    """
    single, originals, perturbed = (tokens.select(of) for of in (tokens.single, tokens.paired, tokens.perturbed))
    logp_N, entropy_N = head.token_logps(single.predicting(hidden_C1h), single.target_N, with_entropy=True)
    assert entropy_N is not None
    table.write_original(single, logp_N, entropy_N)
    table.write_perturbed(single, logp_N)
    both = head.two_views(
        originals.predicting(hidden_C1h), perturbed.predicting(hidden_C1h), originals.target_N, kind=kind
    )
    table.write_two_views(originals, both)
