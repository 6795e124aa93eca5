"""Megatron's pipeline schedule over packed micro-batches of responses: what scoring and updates share.

Shape suffix legend: C = tokens of this context-parallel rank; P = patches of the images that this rank runs the vision
tower on; D = values of a patch; h = hidden size; V = this rank's vocabulary rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_vppo.algorithm.types import Response, TokenTerms, TrainBatch
from megatron_vppo.config.choices import Fp8Phase, PerturbUnit
from megatron_vppo.models.families import family_of
from megatron_vppo.models.hf_config import HfConfig
from megatron_vppo.models.layers.te_support import amaxes_untouched
from megatron_vppo.models.precision import language_precision
from megatron_vppo.models.qwen_vl import QwenVLModel
from megatron_vppo.parallel.ahead import made_ahead, read_by_all
from megatron_vppo.parallel.batching import BatchSplit, Pixels, PlannedBatch, ResponseBatch, ResponseTokens, View
from megatron_vppo.parallel.image_runs import Showing
from megatron_vppo.parallel.layout import Layout
from megatron_vppo.parallel.micro_batches import Reading, Rows, cut_by_rows, fill_by_tokens, groups_of_rank
from megatron_vppo.parallel.packer import Packer
from megatron_vppo.parallel.staging import Staged, Stager
from megatron_vppo.parallel.vocab_head import VocabHead, check_targets

ReadHidden = Callable[[ResponseTokens, Tensor], None]
"""(the tokens of a micro-batch, hidden states [C, 1, h] after the final norm) -> None; called on the last stage."""
LossOf = Callable[[ResponseTokens, TokenTerms, Tensor], Tensor]
"""(tokens, their terms, hidden states as above) -> the micro-batch's loss, a scalar with gradient; called on the last
stage."""
TermsAt = Callable[[tuple[Tensor, Tensor]], TokenTerms]
"""(rows and columns of tokens in their original views) -> their terms, on the host."""


@dataclass(frozen=True)
class PolicySettings:
    """The numbers of a run that scoring and updates go by."""

    temperature: float
    """The rollouts' temperature; log-probs are those of the distribution that was sampled."""
    banned_ids: tuple[int, ...]
    """Tokens that rollouts cannot sample; the distribution leaves them out."""
    rows_per_update: int
    """The most responses in a micro-batch of an update."""
    rows_per_experience: int
    """The most responses in a micro-batch of a scoring pass."""
    head_chunk_tokens: int
    """Rows of logits that may exist at once."""
    perturb_per: PerturbUnit
    shared_prefix: bool
    """True if a prompt that several views of a micro-batch show runs once for all of them; not under context
    parallelism."""
    max_tokens_per_micro_batch: int | None = None
    """Tokens of a micro-batch of an update, in all views that it reads; in scoring, as many in each view. None:
    micro-batches have equally many rows."""
    patch_work: float = 0.0
    """The work of the vision tower on a patch over that of the language model on a token; ranks are balanced by it."""
    fp8_scope: frozenset[Fp8Phase] = frozenset()
    """The phases in which the language model's linear layers run in FP8; needs `ModelOptions.fp8`."""
    token_alignment: int = 1
    """The tokens of a rank are padded to a multiple of this."""
    scoring_chunk_seconds: float = math.inf
    """The time that a scoring pass may take from one boundary to the next."""


class ScheduleRunner:
    """Runs micro-batches through the stages of a model.

    `forward` and `forward_backward` are collectives over all trainer ranks.
    """

    def __init__(
        self,
        stages: Sequence[QwenVLModel],
        *,
        hf_config: HfConfig,
        layout: Layout,
        settings: PolicySettings,
        pixels: Pixels,
    ) -> None:
        """Takes bare stages, as build_model makes them, with or without Megatron's wrappers around them."""
        self.stages = tuple(stages)
        self.layout = layout
        self.settings = settings
        self._vocab_size = hf_config.text_config.vocab_size
        self.packer = Packer(
            pixels=pixels if layout.is_first_stage else None,
            positions=family_of(hf_config).positions(hf_config),
            image_token_id=hf_config.image_token_id,
            merge_size=hf_config.vision_config.spatial_merge_size,
            split=BatchSplit(
                context=layout.context,
                context_rank=layout.context_rank,
                sequence_ranks=layout.tensor if self.stages[0].config.sequence_parallel else 1,
                image_ranks=layout.vision_groups.images.size(),
                image_rank=layout.vision_groups.images.rank(),
                token_alignment=settings.token_alignment,
            ),
            shares_prompts=settings.shared_prefix,
        )
        self._stager = Stager(layout.device)
        self._values = pixels.values.to(layout.device, self.stages[0].config.params_dtype)

    @property
    def holds_results(self) -> bool:
        """True if this rank's results count.

        The last stage has them, the same on all of its tensor-parallel ranks; each context-parallel rank has those of
        its own tokens.
        """
        return self.layout.is_last_stage and self.layout.tensor_rank == 0

    def update_micro_batches(self, responses: Sequence[Response], *, both_views: bool = False) -> list[Rows]:
        """Divides this rank's rows into micro-batches: by tokens if there is a limit for them, else by rows.

        Args:
            both_views: the update reads the perturbed view, too.
        """
        reading = self.reading(both_views=both_views)
        return self._micro_batches(responses, self.settings.rows_per_update, reading, limit=self.update_limit)

    def scoring_micro_batches(
        self, responses: Sequence[Response], *, both_views: bool, to_end: bool = False
    ) -> list[Rows]:
        """Divides them for a scoring pass, which reads the original view or both; `to_end`: see View."""
        reading = replace(self.reading(both_views=both_views), to_end=to_end)
        limit = self.scoring_limit(both_views=both_views)
        return self._micro_batches(responses, self.settings.rows_per_experience, reading, limit=limit)

    def _micro_batches(
        self, responses: Sequence[Response], rows_each: int, reading: Reading, *, limit: int | None
    ) -> list[Rows]:
        groups = groups_of_rank(responses, data_rank=self.layout.data_rank, data=self.layout.data, reading=reading)
        if limit is None:
            return cut_by_rows(groups, rows_each=rows_each)
        return fill_by_tokens(responses, groups, most_tokens=limit, reading=reading)

    def filled_up(self, micro_batches: Sequence[Showing]) -> list[Showing]:
        """Returns as many micro-batches as Megatron's schedule takes.

        Every rank must run it, so a rank without rows runs a row that counts for nothing. With several stages per rank,
        it takes a multiple of the pipeline size.
        """
        multiple = self.layout.pipeline if len(self.stages) > 1 else 1
        missing = math.ceil(max(1, len(micro_batches)) / multiple) * multiple - len(micro_batches)
        return [*micro_batches, *[Showing([View(0, None, counted=False)])] * missing]

    @property
    def update_limit(self) -> int | None:
        """The tokens of a micro-batch of an update, in all views together: they bound what its backward pass keeps."""
        return self.settings.max_tokens_per_micro_batch

    def scoring_limit(self, *, both_views: bool) -> int | None:
        """Returns the tokens of a micro-batch of scoring, which keeps nothing: as many in each view."""
        most = self.settings.max_tokens_per_micro_batch
        return None if most is None else most * self.reading(both_views=both_views).views

    def reading(self, *, both_views: bool) -> Reading:
        """Returns the way in which rows are read, which says what they cost."""
        return Reading(
            shares_prompts=self.settings.shared_prefix and self.layout.context == 1,
            perturb_per=self.settings.perturb_per if both_views else None,
            patch_work=self.settings.patch_work,
        )

    def vocab_head(self, *, trained: bool) -> VocabHead:
        """Returns the vocabulary head of the last stage.

        Args:
            trained: a backward pass follows. It adds the weight's gradient to Megatron's `main_grad`, the optimizer's
                own sum, without a copy in the model's dtype in between.
        """
        weight_Vh = self.stages[-1].head_weight_Vh()
        return VocabHead(
            weight_Vh,
            vocab_size=self._vocab_size,
            temperature=self.settings.temperature,
            chunk_tokens=self.settings.head_chunk_tokens,
            group=self.layout.groups.tp,
            vocab_start=self.layout.tensor_rank * weight_Vh.shape[0],
            banned_ids=self.settings.banned_ids,
            weight_grad_Vh=weight_Vh.main_grad if trained and weight_Vh.requires_grad else None,  # type: ignore[attr-defined]
        )

    def forward(
        self,
        responses: Sequence[Response],
        micro_batches: Sequence[Showing],
        read: ReadHidden,
        *,
        both_views: bool = False,
    ) -> None:
        """Runs the micro-batches forward through the bare stages, without dropout and gradient; changes no state.

        Args:
            both_views: micro-batches were filled for two views of each row, whether one has an image or not.
        """

        def collect(batch: PlannedBatch, hidden_C1h: Tensor, *, non_loss_data: bool) -> None:
            read(batch.tokens, hidden_C1h)

        for stage in self.stages:
            stage.eval()
        with torch.no_grad(), amaxes_untouched(self.stages):
            pack = partial(self.pack, responses, limit=self.scoring_limit(both_views=both_views))
            self._run(pack, micro_batches, collect, models=self.stages, phase="scoring")
        for stage in self.stages:
            stage.train()

    def forward_backward(
        self,
        batch: TrainBatch,
        micro_batches: Sequence[Showing],
        loss_of: LossOf,
        *,
        models: Sequence[torch.nn.Module],
    ) -> None:
        """Runs the micro-batches forward and backward; gradients add up where the wrappers keep them.

        Args:
            models: the stages in Megatron's data-parallel wrappers.
        """
        no_tokens = torch.zeros((), dtype=torch.int, device=self.layout.device)  # that Megatron would divide by

        def loss(micro_batch: PlannedBatch, hidden_C1h: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            assert micro_batch.terms is not None
            return loss_of(micro_batch.tokens, micro_batch.terms, hidden_C1h), no_tokens, {}

        pack = partial(self.pack, batch.responses, limit=self.update_limit, terms_at=batch.terms_at)
        self._run(pack, micro_batches, loss, models=models, phase="update")

    def pack(
        self,
        responses: Sequence[Response],
        micro_batch: Showing,
        *,
        limit: int | None,
        terms_at: TermsAt | None = None,
    ) -> Staged[PlannedBatch]:
        """Packs a micro-batch whose response tokens the vocabulary head can score; see check_targets. Touches the host
        alone.

        Args:
            limit: as in Packer.pack.
            terms_at: the terms of the tokens of original views; None in scoring.
        """
        views = micro_batch.views
        rows = dict.fromkeys(view.row for view in views)
        targets = list(itertools.chain.from_iterable(responses[row].token_ids for row in rows))
        check_targets(targets, vocab_size=self._vocab_size, banned_ids=self.settings.banned_ids)
        packed = self.packer.pack(responses, views, limit=limit, runs=micro_batch.runs)
        return self.plan(packed, terms_at=terms_at)

    def plan(self, batch: ResponseBatch, *, terms_at: TermsAt | None = None) -> Staged[PlannedBatch]:
        """Works out what this rank's stages read of a packed micro-batch, still on the host."""
        tokens, terms = batch.tokens, None
        if terms_at is not None and tokens.at is not None:
            terms = terms_at((tokens.at[0][tokens.originals], tokens.at[1][tokens.originals]))
            tokens = replace(tokens, at=None)
        return self._stager.pack(PlannedBatch(self.stages[0].plan(batch.packed), tokens, terms, batch.patches))

    def send(self, staged: Staged[PlannedBatch]) -> tuple[PlannedBatch, Tensor]:
        """Brings a micro-batch to the device. Its pixels, [P, D], are made there; no rows if this rank has no image."""
        batch = self._stager.send(staged)
        if batch.patches is None:
            return batch, torch.zeros(0, 0, device=self.layout.device)
        return replace(batch, patches=None), batch.patches.pixels(self._values)

    def _run(
        self,
        pack: Callable[[Showing], Staged[PlannedBatch]],
        micro_batches: Sequence[Showing],
        on_hidden: Callable[..., object],
        *,
        models: Sequence[torch.nn.Module],
        phase: Fp8Phase,
    ) -> None:
        """Runs the schedule, which calls `on_hidden(batch, hidden)` on the last stage."""
        micro_batches = self.filled_up(micro_batches)

        def forward_step(
            batches: Iterator[tuple[PlannedBatch, Tensor]], model: torch.nn.Module
        ) -> tuple[Tensor, Callable[..., object]]:
            batch, pixels_PD = next(batches)
            return model(batch.stage, pixels_PD), partial(on_hidden, batch)

        # The images of a micro-batch are read and packed while the one before runs. Every stage of this rank asks for
        # it once, so they share it.
        packed = made_ahead(pack, micro_batches, device=self.layout.device)
        iterators = read_by_all(map(self.send, packed), readers=len(models))
        with language_precision(self.stages, fp8=phase in self.settings.fp8_scope):
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iterators if len(models) > 1 else iterators[0],
                model=list(models),
                num_microbatches=len(micro_batches),
                seq_length=1,  # the real lengths travel with the tensors (variable_seq_lengths)
                micro_batch_size=1,
                forward_only=phase == "scoring",
                collect_non_loss_data=phase == "scoring",
            )
