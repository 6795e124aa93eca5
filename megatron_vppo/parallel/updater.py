"""Updates: the gradient of a mini-batch's loss, and the optimizer's step.

Shape suffix legend: B = responses; T = response tokens, right-padded; N = response tokens of a micro-batch,
flat; R = statistics per position, one for each of the engine's likeliest tokens; C = tokens of this context-parallel
rank; h = hidden size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vppo.algorithm.loss import surrogate_loss
from megatron_vppo.algorithm.perception import PerturbedView
from megatron_vppo.algorithm.types import TokenTerms, TrainBatch
from megatron_vppo.parallel.batching import ResponseTokens, views_of
from megatron_vppo.parallel.chosen_logps import chosen_logps
from megatron_vppo.parallel.image_runs import showings
from megatron_vppo.parallel.schedule import ScheduleRunner
from megatron_vppo.parallel.training import Trainable


class Updater:
    """Trains a model on mini-batches."""

    def __init__(self, trainable: Trainable, runner: ScheduleRunner) -> None:
        """`runner` runs the stages of `trainable`."""
        self._trainable = trainable
        self._runner = runner

    def update(self, batch: TrainBatch) -> dict[str, float]:
        """Takes one optimizer step on one mini-batch; a collective over all trainer ranks.

        The batch's weights hold every mask and denominator. A step whose gradient norm is not finite changes nothing
        and is reported as actor/skipped_updates = 1.

        Returns:
            Metrics over the whole mini-batch, the same on every rank.
        """
        metrics = self.accumulate_gradients(batch)
        grad_norm = self._trainable.step()
        return {
            **metrics,
            "actor/grad_norm": grad_norm,
            "actor/skipped_updates": float(not math.isfinite(grad_norm)),
        }

    def accumulate_gradients(self, batch: TrainBatch) -> dict[str, float]:
        """Leaves the gradient of the mini-batch's loss in the parameters' `main_grad`; returns the loss's metrics."""
        runner, reduction = self._runner, self._trainable.reduction
        head = functools.cache(partial(runner.vocab_head, trained=True))  # only the last stage has one
        with_entropy = batch.loss.entropy_kind == "entropy"
        keys = None if batch.perception is None else batch.perception.perturb_keys
        weighted: dict[str, Tensor] = {}
        per_token: dict[str, Tensor] = {}

        def loss_of(tokens: ResponseTokens, terms: TokenTerms, hidden_C1h: Tensor) -> Tensor:
            hidden_Nh = tokens.predicting(hidden_C1h)
            reduction.after_head(hidden_Nh)
            logp_N, entropy_N = head().token_logps(hidden_Nh, tokens.target_N, with_entropy=with_entropy)
            likeliest_logp_NR = None
            if terms.likeliest is not None:
                likeliest_logp_NR = chosen_logps(head(), hidden_Nh[tokens.originals], terms.likeliest.ids_NR)
            sums = surrogate_loss(
                logp_N[tokens.originals],
                terms,
                spec=batch.loss,
                entropy_N=None if entropy_N is None else entropy_N[tokens.originals],
                likeliest_logp_NR=likeliest_logp_NR,
                perturbed=None if keys is None else _perturbed_view(tokens, logp_N, entropy_N),
            )
            _accumulate(weighted, sums.weighted_sums)
            _accumulate(per_token, sums.token_sums)
            return sums.loss

        self._trainable.zero_gradients()
        micro_batches = runner.update_micro_batches(batch.responses, both_views=keys is not None)
        views = [views_of(rows, keys or [None] * len(batch.responses)) for rows in micro_batches]
        showing = runner.filled_up(showings(batch.responses, views, ranks=runner.packer.split.image_ranks))
        with reduction.of_mini_batch(tower_again=showing[-1].reads_several_runs):
            runner.forward_backward(batch, showing, loss_of, models=self._trainable.ddps)
        response_tokens = float(batch.response_mask_BT.sum())
        return self._sum_over_ranks({**weighted, **{name: sums / response_tokens for name, sums in per_token.items()}})

    def _sum_over_ranks(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        gathered: list[dict[str, float]] = [{} for _ in range(self._runner.layout.world_size)]
        dist.all_gather_object(gathered, _read(sums) if self._runner.holds_results else {})
        names = dict.fromkeys(name for of_rank in gathered for name in of_rank)
        return {name: sum(of_rank.get(name, 0.0) for of_rank in gathered) for name in names}


def _perturbed_view(tokens: ResponseTokens, logp_N: Tensor, entropy_N: Tensor | None) -> PerturbedView:
    """Picks the perturbed views of a micro-batch's tokens. The original view of a row without an image stands for both,
    as in scoring.
    """

    def picked(value_N: Tensor) -> Tensor:
        return torch.cat([value_N[tokens.single].detach(), value_N[tokens.perturbed]])

    return PerturbedView(picked(logp_N), None if entropy_N is None else picked(entropy_N))


def _accumulate(sums: dict[str, Tensor], terms: Mapping[str, Tensor]) -> None:
    """Adds the terms of a micro-batch, in float64 and where they are: reading them would wait for the device."""
    for name, value in terms.items():
        sums[name] = sums[name] + value.double() if name in sums else value.double()


def _read(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Reads all sums at once."""
    return dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True)) if sums else {}
