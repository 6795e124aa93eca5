"""The record of a step: what was decided about every response, as the report and `rollouts/step_N.jsonl.zst` show it.

Shape suffix legend: B = responses; T = response tokens, right-padded.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from megatron_vppo.algorithm.assemble import Minibatch
from megatron_vppo.algorithm.types import GradedResponse, PerturbKey, Response, Scores
from megatron_vppo.config.choices import PerturbUnit
from megatron_vppo.data.images import VisionInputs
from megatron_vppo.observability.rollouts import RolloutRecord, png_pair, write_rollouts
from megatron_vppo.trainer.collect import Group

IMAGES_PER_OUTCOME = 4
"""The number of right responses of a step, and of wrong ones, that keep their images; each is of another prompt."""


@dataclass(frozen=True)
class Recorder:
    """Writes the record of each step on one rank."""

    folder: Path
    """The run folder."""
    tokenizer: Any
    """The model's, of transformers."""
    images: VisionInputs
    perturb_per: PerturbUnit
    is_writer: bool
    """True on the rank that writes, if the run keeps records at all. On the others nothing happens."""

    def write(self, step: int, minibatches: Sequence[Minibatch], groups: Sequence[Group], scores: Scores) -> None:
        """Writes the records of one step."""
        if self.is_writer:
            write_rollouts(self.folder, step, self.records(step, minibatches, groups, scores))

    def records(
        self, step: int, minibatches: Sequence[Minibatch], groups: Sequence[Group], scores: Scores
    ) -> Iterator[RolloutRecord]:
        """Yields one record per trained response, in the order of the step."""
        graded = [item for group in groups for item in group]
        texts = self._token_texts([item.response for item in graded])
        with_images = _pick(groups)
        row = 0
        for minibatch in minibatches:
            for local in range(len(minibatch.batch.responses)):
                item = graded[row]
                record = self._record(item, row, local, minibatch, scores, texts)
                if (item.response.group_id, item.response.sample) in with_images:
                    record["images"] = self._images(item.response, step, perturbed=scores.perturbed_logp_BT is not None)
                yield record
                row += 1

    def _record(
        self, item: GradedResponse, row: int, local: int, minibatch: Minibatch, scores: Scores, texts: dict[int, str]
    ) -> RolloutRecord:
        """Builds the record of the response that is number `row` of the step and number `local` of its mini-batch."""
        response, reward, decided = item.response, item.reward, minibatch.record
        length = len(response.token_ids)

        def tokens_of(value_BT: Tensor | None, at: int) -> list[float] | None:
            return None if value_BT is None else [round(x, 6) for x in value_BT[at, :length].tolist()]

        return RolloutRecord(
            split=response.prompt.split,
            row=response.prompt.row,
            sample=response.sample,
            problem=response.prompt.problem,
            answer=response.prompt.answer,
            response=item.text,
            tokens=[texts[token] for token in response.token_ids],
            token_ids=list(response.token_ids),
            rollout_logps=[round(x, 6) for x in response.rollout_logps],
            old_logps=tokens_of(scores.old_logp_BT, row) or [],
            masked_logps=tokens_of(scores.perturbed_logp_BT, row),
            dependency=tokens_of(decided.dependency_BT, local),
            kept=[int(x) for x in decided.token_mask_BT[local, :length].tolist()],
            reward=reward.overall,
            accuracy=reward.accuracy,
            reward_error=reward.error,
            reward_metrics=dict(reward.metrics),
            advantage=float(decided.group_advantage_B[local]),
            scale=float(decided.scale_B[local]),
            finish_reason=response.finish_reason,
        )

    def _token_texts(self, responses: Sequence[Response]) -> dict[int, str]:
        """Decodes each distinct token, special tokens included."""
        distinct = sorted({token for response in responses for token in response.token_ids})
        return dict(zip(distinct, self.tokenizer.batch_decode([[token] for token in distinct]), strict=True))

    def _images(self, response: Response, step: int, *, perturbed: bool) -> list[dict[str, str]]:
        """Encodes a response's images as PNG, each with its perturbed copy if the policy was shown that."""
        key = PerturbKey.of(response, step, per=self.perturb_per)
        return [
            png_pair(
                _png(self.images.image(ref)),
                _png(self.images.perturbed_image(ref, key)) if perturbed else None,
            )
            for ref in response.prompt.images
        ]


def _pick(groups: Sequence[Group]) -> set[tuple[int, int]]:
    """Picks the responses that keep their images, as (group, sample): at most one of a group, right ones first."""
    picked: set[tuple[int, int]] = set()
    right_left = wrong_left = IMAGES_PER_OUTCOME
    for group in groups:
        right = [i for i in group if i.reward.accuracy >= 0.5]
        wrong = [i for i in group if i.reward.accuracy < 0.5]
        if right and right_left:
            item, right_left = right[0], right_left - 1
        elif wrong and wrong_left:
            item, wrong_left = wrong[0], wrong_left - 1
        else:
            continue
        picked.add((item.response.group_id, item.response.sample))
    return picked


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
