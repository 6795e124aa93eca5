"""The trained model as the loop sees it: `score` and `update`, over Megatron's pipeline schedules.

Every rank holds the records of all rows and calls every method; each works on its data-parallel share of the rows, and
results come back whole on every rank. Shape suffix legend: B = responses, T = response tokens (right-padded), N =
response tokens of one micro-batch (flat), H = hidden size, V = vocabulary rows of this tensor-parallel rank.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_vppo.algorithm.loss import surrogate_loss
from megatron_vppo.algorithm.types import PerturbKey, Response, Scores, TrainBatch
from megatron_vppo.config.choices import Divergence, Fp8Phase, PerturbUnit
from megatron_vppo.models.precision import language_precision
from megatron_vppo.parallel.batching import (
    BatchSplit,
    PatchSource,
    PositionFn,
    ResponseBatch,
    View,
    pack_views,
    rows_of_rank,
)
from megatron_vppo.parallel.layout import Layout
from megatron_vppo.parallel.training import Trainable
from megatron_vppo.parallel.vocab_head import score_two_views, token_logps
from megatron_vppo.weights.stream import hf_weights

Views = Literal["original", "both"]


@dataclass(frozen=True)
class PolicySettings:
    temperature: float
    """Of the rollouts; log-probs are those of the distribution that was sampled."""
    vocab_size: int
    """Without padding."""
    banned_ids: tuple[int, ...]
    """Tokens that rollouts cannot sample; left out of the distribution."""
    image_token_id: int
    merge_size: int
    rows_per_update: int
    """Responses per micro-batch of the update."""
    rows_per_experience: int
    """Responses per micro-batch of the scoring pass."""
    head_chunk_tokens: int
    perturb_per: PerturbUnit
    fp8_scope: frozenset[Fp8Phase] = frozenset()
    """Where the language model's linear layers run in FP8; needs `ModelOptions.fp8`."""
    token_alignment: int = 1
    """What the tokens of a rank are padded to a multiple of."""


class MegatronPolicy:
    """Every method is a collective over all trainer ranks."""

    def __init__(
        self,
        trainable: Trainable,
        *,
        layout: Layout,
        settings: PolicySettings,
        patches: PatchSource,
        positions: PositionFn,
    ) -> None:
        self.trainable = trainable
        self.layout = layout
        self.settings = settings
        self._patches = patches if layout.is_first_stage else None
        self._positions = positions
        self._split = BatchSplit(
            context=layout.context,
            context_rank=layout.context_rank,
            sequence_ranks=layout.tensor if trainable.config.sequence_parallel else 1,
            picture_ranks=layout.vision_groups.images.size(),
            picture_rank=layout.vision_groups.images.rank(),
            token_alignment=settings.token_alignment,
        )

    # ---- scoring

    @torch.no_grad()
    def score(
        self, responses: Sequence[Response], *, step: int, views: Views, divergence: Divergence | None = None
    ) -> Scores:
        """Log-probs and entropies of every response token under the present weights; no gradient.

        Args:
            step: training step; with the row, the seed of the perturbation.
            views: 'both' also scores the perturbed image, in the same forward pass.
            divergence: full-vocabulary divergence between the two views; None: none is computed.
        """
        perturbed = [bool(r.prompt.images) for r in responses] if views == "both" else [False] * len(responses)
        shape = (len(responses), max(len(r.token_ids) for r in responses))
        names = ("logp", "entropy", "masked_logp", "divergence")
        results_BT = {name: torch.zeros(shape, device=self.layout.device) for name in names}

        def collect(batch: ResponseBatch, hidden_T1H: Tensor, *, non_loss_data: bool) -> None:
            self._score_tokens(batch, hidden_T1H, perturbed, divergence, results_BT)

        micro_batches = self._micro_batches(responses, rows_each=self.settings.rows_per_experience)
        views_of = [self._views(rows, responses, step, perturbed) for rows in micro_batches]
        self.trainable.train(False)
        self._run(responses, views_of, collect, phase="scoring")
        self.trainable.train(True)
        stacked = torch.stack([results_BT[name] for name in names])
        if not self._reports:
            stacked.zero_()
        dist.all_reduce(stacked)
        logp, entropy, masked_logp, div = stacked.cpu().unbind()
        return Scores(
            old_logp_BT=logp,
            entropy_BT=entropy,
            perturbed_logp_BT=masked_logp if views == "both" else None,
            divergence_BT=div if divergence is not None else None,
        )

    def _views(
        self, rows: Sequence[int], responses: Sequence[Response], step: int, perturbed: Sequence[bool]
    ) -> list[View]:
        """The original views of a micro-batch's rows, then the perturbed views of those that have an image."""
        return [View(row, None) for row in rows] + [
            View(row, self.perturb_key(responses[row], step)) for row in rows if perturbed[row]
        ]

    def perturb_key(self, response: Response, step: int) -> PerturbKey:
        return PerturbKey.of(response, step, per=self.settings.perturb_per)

    def _score_tokens(
        self,
        batch: ResponseBatch,
        hidden_T1H: Tensor,
        perturbed: Sequence[bool],
        divergence: Divergence | None,
        results_BT: dict[str, Tensor],
    ) -> None:
        """Writes one micro-batch's results. Original views come first; a row without image is its own masked view."""
        hidden_NH = hidden_T1H[batch.hidden_index_N, 0]
        first_masked = int((~batch.perturbed_N).sum())
        own, masked = slice(0, first_masked), slice(first_masked, None)
        at, masked_at = ((batch.row_N[part], batch.column_N[part]) for part in (own, masked))
        if divergence is None:
            logp_N, entropy_N = self._logps(hidden_NH, batch.target_N, with_entropy=True)
            assert entropy_N is not None
            results_BT["logp"][at], results_BT["entropy"][at] = logp_N[own], entropy_N[own]
            results_BT["masked_logp"][at] = logp_N[own]
            results_BT["masked_logp"][masked_at] = logp_N[masked]
            return
        has_image_N = torch.tensor(perturbed, device=hidden_NH.device)[batch.row_N[own]]
        alone_N = (~has_image_N).nonzero()[:, 0]
        logp_N, entropy_N = self._logps(hidden_NH[alone_N], batch.target_N[alone_N], with_entropy=True)
        assert entropy_N is not None
        alone_at = (batch.row_N[alone_N], batch.column_N[alone_N])
        results_BT["logp"][alone_at] = results_BT["masked_logp"][alone_at] = logp_N
        results_BT["entropy"][alone_at] = entropy_N
        both = score_two_views(
            hidden_NH[own][has_image_N],
            hidden_NH[masked],
            self._head_weight_Vh,
            batch.target_N[masked],
            kind=divergence,
            **self._head_arguments(),
        )
        results_BT["logp"][masked_at], results_BT["entropy"][masked_at] = both.logp_N, both.entropy_N
        results_BT["masked_logp"][masked_at] = both.perturbed_logp_N
        results_BT["divergence"][masked_at] = both.divergence_N

    # ---- update

    def update(self, batch: TrainBatch) -> dict[str, float]:
        """One optimizer step on one mini-batch. The batch's weights hold every mask and denominator.

        Returns metrics over the whole mini-batch, the same on every rank. A step whose gradient norm is not finite
        changes nothing and is reported as actor/skipped_updates = 1.
        """
        metrics = self.accumulate_gradients(batch)
        grad_norm = self.trainable.step()
        return {
            **metrics,
            "actor/grad_norm": grad_norm,
            "actor/skipped_updates": float(not math.isfinite(grad_norm)),
        }

    def accumulate_gradients(self, batch: TrainBatch) -> dict[str, float]:
        """The gradient of the mini-batch's loss, in the parameters' `main_grad`; the metrics of `update`."""
        device = self.layout.device
        pg_weight_BT, entropy_weight_BT = batch.pg_weight_BT.to(device), batch.entropy_weight_BT.to(device)
        old_logp_BT, advantage_BT = batch.old_logp_BT.to(device), batch.advantage_BT.to(device)
        weighted: dict[str, float] = {}
        per_token: dict[str, float] = {}

        def loss(rows: ResponseBatch, hidden_T1H: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            with_entropy = batch.loss.entropy_kind == "entropy"
            new_logp_N, entropy_N = self._logps(
                hidden_T1H[rows.hidden_index_N, 0], rows.target_N, with_entropy=with_entropy
            )
            at = (rows.row_N, rows.column_N)
            terms = surrogate_loss(
                new_logp_N,
                old_logp_BT[at],
                advantage_BT[at],
                pg_weight_BT[at],
                entropy_weight_BT[at],
                spec=batch.loss,
                entropy_N=entropy_N if with_entropy else None,
            )
            _accumulate(weighted, terms.weighted_sums)
            _accumulate(per_token, terms.token_sums)
            return terms.loss, torch.zeros((), dtype=torch.int, device=device), {}

        self.trainable.zero_gradients()
        micro_batches = self._micro_batches(batch.responses, rows_each=self.settings.rows_per_update)
        self._run(batch.responses, [[View(row, None) for row in rows] for rows in micro_batches], loss, phase="update")
        response_tokens = float(batch.response_mask_BT.sum())
        return {
            **self._sum_over_ranks(weighted if self._reports else {}, divide_by=1.0),
            **self._sum_over_ranks(per_token if self._reports else {}, divide_by=response_tokens),
        }

    def hf_weights(self, *, only_trained: bool = False) -> Iterator[tuple[str, Tensor]]:
        """The present weights under their Hugging Face names, whole on every rank; see weights/stream.py.

        Args:
            only_trained: without frozen parts of the model.
        """
        return hf_weights(self.trainable.stages, without=self.trainable.frozen if only_trained else ())

    @property
    def frozen_hf_names(self) -> frozenset[str]:
        """Tensors that training does not change, under their Hugging Face names."""
        entries = self.trainable.stages[0].weight_map
        return frozenset(n for entry in entries if entry.part in self.trainable.frozen for n in entry.hf_names)

    # ---- shared

    @property
    def _reports(self) -> bool:
        """Whether this rank's results count: the last stage has them, the same on all its tensor-parallel ranks, and
        each context-parallel rank those of its own tokens.
        """
        return self.layout.is_last_stage and self.layout.tensor_rank == 0

    def _micro_batches(self, responses: Sequence[Response], *, rows_each: int) -> list[Sequence[int]]:
        """This rank's rows. Neighbours stay together: responses to a prompt share one vision forward of its images."""
        rows = rows_of_rank(responses, data_rank=self.layout.data_rank, data=self.layout.data)
        return [rows[i : i + rows_each] for i in range(0, len(rows), rows_each)]

    def _run(
        self,
        responses: Sequence[Response],
        micro_views: Sequence[Sequence[View]],
        on_hidden: Callable[..., object],
        *,
        phase: Fp8Phase,
    ) -> None:
        """Runs the schedule over the micro-batches; `on_hidden(batch, hidden)` is called on the last stage. Only the
        update runs backward.

        Every rank must run it, so one without rows runs a row that counts for nothing. With several stages per rank
        Megatron's schedule takes a multiple of the pipeline size.
        """
        stages = len(self.trainable.stages)
        multiple = self.layout.pipeline if stages > 1 else 1
        num_micro_batches = math.ceil(max(1, len(micro_views)) / multiple) * multiple
        idle = [[View(0, None, counted=False)]] * (num_micro_batches - len(micro_views))

        def forward_step(batches: object, model: torch.nn.Module) -> tuple[Tensor, Callable[..., object]]:
            batch = next(batches)  # type: ignore[call-overload]
            hidden_T1H = model(batch.packed)
            return hidden_T1H, lambda hidden, **kwargs: on_hidden(batch, hidden, **kwargs)

        packed = (
            pack_views(
                responses,
                views,
                patches=self._patches,
                positions=self._positions,
                image_token_id=self.settings.image_token_id,
                merge_size=self.settings.merge_size,
                split=self._split,
                device=self.layout.device,
            )
            for views in [*micro_views, *idle]
        )
        iterators = list(itertools.tee(packed, stages))
        with language_precision(self.trainable.stages, fp8=phase in self.settings.fp8_scope):
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iterators if stages > 1 else iterators[0],
                model=list(self.trainable.ddps),
                num_microbatches=num_micro_batches,
                seq_length=1,  # the real lengths travel with the tensors (variable_seq_lengths)
                micro_batch_size=1,
                forward_only=phase == "scoring",
                collect_non_loss_data=phase == "scoring",
            )

    def _logps(self, hidden_NH: Tensor, target_N: Tensor, *, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
        weight_Vh = self._head_weight_Vh
        return token_logps(
            hidden_NH,
            weight_Vh,
            target_N,
            with_entropy=with_entropy,
            # Where the optimizer sums: no copy of the gradient in the model's dtype in between.
            weight_grad_VH=weight_Vh.main_grad if weight_Vh.requires_grad else None,  # type: ignore[attr-defined]
            **self._head_arguments(),
        )

    @property
    def _head_weight_Vh(self) -> Tensor:
        return self.trainable.stages[-1].head_weight_Vh()

    def _sum_over_ranks(self, sums: dict[str, float], *, divide_by: float) -> dict[str, float]:
        gathered: list[dict[str, float]] = [{} for _ in range(self.layout.world_size)]
        dist.all_gather_object(gathered, sums)
        names = dict.fromkeys(name for part in gathered for name in part)
        return {name: sum(part.get(name, 0.0) for part in gathered) / divide_by for name in names}

    def _head_arguments(self) -> dict[str, Any]:
        return {
            "group": self.layout.groups.tp,
            "vocab_start": self.layout.tensor_rank * self._head_weight_Vh.shape[0],
            "vocab_size": self.settings.vocab_size,
            "banned_ids": self.settings.banned_ids,
            "temperature": self.settings.temperature,
            "chunk_tokens": self.settings.head_chunk_tokens,
        }


def _accumulate(sums: dict[str, float], terms: Mapping[str, Tensor]) -> None:
    for name, value in terms.items():
        sums[name] = sums.get(name, 0.0) + float(value)
