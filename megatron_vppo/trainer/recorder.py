"""What a step decided about every response, as the report and `rollouts/step_N.jsonl.zst` show it."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from megatron_vppo.algorithm.assemble import Minibatch
from megatron_vppo.algorithm.types import GradedResponse, Response, Scores
from megatron_vppo.data.images import VisionInputs
from megatron_vppo.observability.rollouts import RolloutRecord, png_pair
from megatron_vppo.parallel.policy import MegatronPolicy
from megatron_vppo.trainer.collect import Group

PICTURES_PER_OUTCOME = 4
"""Responses of a step that keep their pictures: so many right and so many wrong ones, each of another prompt."""


@dataclass(frozen=True)
class Recorder:
    tokenizer: Any
    """Of transformers."""
    images: VisionInputs
    policy: MegatronPolicy

    def records(
        self, step: int, minibatches: Sequence[Minibatch], groups: Sequence[Group], scores: Scores
    ) -> Iterator[RolloutRecord]:
        """One per trained response, in the order of the step."""
        graded = [item for group in groups for item in group]
        texts = self._token_texts([item.response for item in graded])
        with_pictures = _pick(groups)
        row = 0
        for minibatch in minibatches:
            for local in range(len(minibatch.batch.responses)):
                item = graded[row]
                record = self._record(item, row, local, minibatch, scores, texts)
                if (item.response.group_id, item.response.sample) in with_pictures:
                    record["images"] = [
                        self._pictures(item.response, i, step, masked=scores.perturbed_logp_BT is not None)
                        for i in range(len(item.response.prompt.images))
                    ]
                yield record
                row += 1

    def _record(
        self, item: GradedResponse, row: int, local: int, minibatch: Minibatch, scores: Scores, texts: dict[int, str]
    ) -> RolloutRecord:
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
        """Each distinct token as text, special tokens included."""
        distinct = sorted({token for response in responses for token in response.token_ids})
        return dict(zip(distinct, self.tokenizer.batch_decode([[token] for token in distinct]), strict=True))

    def _pictures(self, response: Response, index: int, step: int, *, masked: bool) -> dict[str, str]:
        """`masked`: whether the policy was shown the perturbed picture at all."""
        ref, key = response.prompt.images[index], self.policy.perturb_key(response, step)
        perturbed = _png(self.images.perturbed_image(ref, key)) if masked else None
        return png_pair(_png(self.images.image(ref)), perturbed)


def _pick(groups: Sequence[Group]) -> set[tuple[int, int]]:
    """(group, sample) of the responses that keep their pictures: right ones first, wrong ones from the next groups."""
    picked: set[tuple[int, int]] = set()
    right_left = wrong_left = PICTURES_PER_OUTCOME
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


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
