"""The trained model as the loop sees it: a Scorer and an Updater over the same weights.

Every rank holds the records of all rows and calls every method. Each works on its data-parallel share of the rows, and
results come back whole on every rank.

Shape suffix legend: B = responses; T = response tokens, right-padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from megatron_vppo.algorithm.types import Response, Scores, TrainBatch
from megatron_vppo.config.choices import Divergence
from megatron_vppo.models.hf_config import HfConfig
from megatron_vppo.parallel.batching import Pixels
from megatron_vppo.parallel.layout import Layout
from megatron_vppo.parallel.reference import ReferenceWeights
from megatron_vppo.parallel.schedule import PolicySettings, ScheduleRunner
from megatron_vppo.parallel.score_chunks import Boundary
from megatron_vppo.parallel.scorer import Scorer, Views
from megatron_vppo.parallel.training import Trainable
from megatron_vppo.parallel.updater import Updater
from megatron_vppo.weights.stream import hf_weights


class MegatronPolicy:
    """Scores responses and is updated. Every method is a collective over all trainer ranks."""

    def __init__(
        self,
        trainable: Trainable,
        *,
        hf_config: HfConfig,
        layout: Layout,
        settings: PolicySettings,
        pixels: Pixels,
        reference: ReferenceWeights | None = None,
    ) -> None:
        """`reference`: the weights by which responses are scored a second time; None: there is no reference model."""
        runner = ScheduleRunner(trainable.stages, hf_config=hf_config, layout=layout, settings=settings, pixels=pixels)
        self.trainable = trainable
        self.layout = layout
        self.settings = settings
        self._scorer = Scorer(runner)
        self._reference = reference
        self._updater = Updater(trainable, runner)

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
        """Scores every response token, by the reference model too if there is one; see Scorer.score."""
        scores = self._scorer.score(
            responses,
            step=step,
            views=views,
            divergence=divergence,
            with_visual_focus=with_visual_focus,
            boundary=boundary,
        )
        if self._reference is None:
            return scores
        with self._reference.in_place():
            by_reference = self._scorer.score(responses, step=step, views="original", boundary=boundary)
        return replace(scores, reference_logp_BT=by_reference.old_logp_BT)

    def update(self, batch: TrainBatch) -> dict[str, float]:
        """See Updater.update."""
        return self._updater.update(batch)

    def accumulate_gradients(self, batch: TrainBatch) -> dict[str, float]:
        """See Updater.accumulate_gradients."""
        return self._updater.accumulate_gradients(batch)

    def hf_weights(self, *, only_trained: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yields the present weights under their Hugging Face names, whole on every rank; see weights/stream.py.

        Args:
            only_trained: leave out frozen parts of the model.
        """
        return hf_weights(self.trainable.stages, without=self.trainable.frozen if only_trained else ())

    @property
    def frozen_hf_names(self) -> frozenset[str]:
        """The tensors that training does not change, under their Hugging Face names."""
        entries = self.trainable.stages[0].weight_map
        return frozenset(n for entry in entries if entry.part in self.trainable.frozen for n in entry.hf_names)
