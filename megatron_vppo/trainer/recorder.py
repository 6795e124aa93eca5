"""The record of a step: what was decided about every response, as the report and `rollouts/step_N.jsonl.zst` show it;
and the responses of a validation, as `validation/step_N.jsonl.zst` has them.

All that the loop does for it is to keep what the record is made of. A thread gathers the arrays and reads images, and
sends them to a process of its own, which makes the JSON (observability/record_writer.py).

Shape suffix legend: B = responses; T = response tokens, right-padded; N = response tokens, flat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from megatron_vppo.algorithm.assemble import Minibatch
from megatron_vppo.algorithm.padding import length_mask
from megatron_vppo.algorithm.types import GradedResponse, PerturbKey, Response, Scores
from megatron_vppo.config.choices import PerturbUnit
from megatron_vppo.data.images import VisionInputs
from megatron_vppo.observability.record_writer import Records, RecordWriter
from megatron_vppo.observability.rollouts import RolloutRecord
from megatron_vppo.observability.step_records import StepRecords
from megatron_vppo.observability.validations import ValidationRecord, ValidationRecords
from megatron_vppo.trainer.grader import Group

IMAGES_PER_OUTCOME = 4
"""The number of right responses of a step, and of wrong ones, that keep their images; each is of another prompt."""


@dataclass(frozen=True)
class Recorder:
    """Gathers the record of each step on one rank, and has it written while the next step goes on."""

    tokenizer: Any
    """The model's, of transformers."""
    images: VisionInputs
    perturb_per: PerturbUnit
    writer: RecordWriter | None
    """On the rank that writes, if the run keeps records at all. On the others nothing happens."""
    known_texts: dict[int, str] = field(default_factory=dict)
    """The texts of the tokens of earlier steps."""
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="records"))
    _handed_over: list[Future[None]] = field(default_factory=list)
    """The records that the thread has not been seen to hand over."""

    def write(self, step: int, minibatches: Sequence[Minibatch], groups: Sequence[Group], scores: Scores) -> None:
        """Has the records of one step written. Raises OSError if those of the step before could not be written."""
        self._hand_over(step, lambda: self.step_records(step, minibatches, groups, scores))

    def write_validation(self, step: int, graded: Sequence[GradedResponse]) -> None:
        """Has the responses to the held-out prompts written. Raises as `write` does."""
        self._hand_over(step, lambda: ValidationRecords([_validated(item) for item in graded]))

    def _hand_over(self, step: int, make: Callable[[], Records]) -> None:
        writer = self.writer
        if writer is None:
            return
        self.wait()
        self._handed_over.append(self._thread.submit(lambda: writer.write(step, make())))

    def wait(self) -> None:
        """Returns when the records of all steps are on the disk. Raises OSError if they could not be written."""
        while self._handed_over:
            self._handed_over.pop().result()
        if self.writer is not None:
            self.writer.wait()

    def close(self) -> None:
        """Waits for the records, and ends what writes them. Raises as `wait` does."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            if self.writer is not None:
                self.writer.close()

    def step_records(
        self, step: int, minibatches: Sequence[Minibatch], groups: Sequence[Group], scores: Scores
    ) -> StepRecords:
        """Builds one record per trained response, in the order of the step."""
        graded = [item for group in groups for item in group]
        responses = [item.response for item in graded]
        lengths = [len(response.token_ids) for response in responses]
        token_ids_N = np.concatenate([np.asarray(response.token_ids, np.int32) for response in responses])
        decided = [minibatch.record for minibatch in minibatches]
        advantages = [number for record in decided for number in record.group_advantage_B.tolist()]
        scales = [number for record in decided for number in record.scale_B.tolist()]
        with_images = _pick(groups)
        in_update = any(m.batch.perception and m.batch.perception.perturb_keys for m in minibatches)
        perturbed = scores.perturbed_logp_BT is not None or in_update
        return StepRecords(
            heads=[_head(*parts) for parts in zip(graded, advantages, scales, strict=True)],
            lengths=lengths,
            token_texts=self._token_texts(token_ids_N),
            token_ids_N=token_ids_N,
            floats_N={
                "rollout_logps": np.concatenate([np.asarray(r.rollout_logps, np.float64) for r in responses]),
                "old_logps": _flat([scores.old_logp_BT], lengths),
                "masked_logps": _flat([scores.perturbed_logp_BT], lengths),
                "dependency": _flat([record.dependency_BT for record in decided], lengths),
            },
            kept_N=np.asarray(_flat([record.token_mask_BT for record in decided], lengths), np.int8),
            images={
                number: self._images(response, step, perturbed=perturbed)
                for number, response in enumerate(responses)
                if (response.group_id, response.sample) in with_images
            },
        )

    def _token_texts(self, token_ids_N: np.ndarray) -> dict[int, str]:
        """Decodes each distinct token, special tokens included."""
        distinct: list[int] = np.flatnonzero(np.bincount(token_ids_N)).tolist()
        new = [token for token in distinct if token not in self.known_texts]
        if new:  # of no rows, transformers makes one text
            self.known_texts.update(zip(new, self.tokenizer.batch_decode([[token] for token in new]), strict=True))
        return {token: self.known_texts[token] for token in distinct}

    def _images(
        self, response: Response, step: int, *, perturbed: bool
    ) -> list[tuple[Image.Image, Image.Image | None]]:
        """Returns a response's images, each with its perturbed copy if the policy was shown that."""
        key = PerturbKey.of(response, step, per=self.perturb_per)
        return [
            (self.images.image(ref), self.images.perturbed_image(ref, key) if perturbed else None)
            for ref in response.prompt.images
        ]


def _head(item: GradedResponse, advantage: float, scale: float) -> RolloutRecord:
    """Builds the part of a record that is no list of tokens."""
    response, reward = item.response, item.reward
    return RolloutRecord(
        split=response.prompt.split,
        row=response.prompt.row,
        sample=response.sample,
        problem=response.prompt.problem,
        answer=response.prompt.answer,
        response=item.text,
        reward=reward.overall,
        accuracy=reward.accuracy,
        reward_error=reward.error,
        reward_metrics=dict(reward.metrics),
        advantage=advantage,
        scale=scale,
        finish_reason=response.finish_reason,
        carried_tokens=response.carried_tokens,
    )


def _validated(item: GradedResponse) -> ValidationRecord:
    response, reward = item.response, item.reward
    return ValidationRecord(
        split=response.prompt.split,
        row=response.prompt.row,
        sample=response.sample,
        problem=response.prompt.problem,
        answer=response.prompt.answer,
        response=item.text,
        response_length=len(response.token_ids),
        reward=reward.overall,
        accuracy=reward.accuracy,
        reward_error=reward.error,
        finish_reason=response.finish_reason,
    )


def _flat(parts: Sequence[Tensor | None], lengths: Sequence[int]) -> np.ndarray | None:
    """Returns the tokens [N] of parts [B, T], which hold the rows in order; None if they are None."""
    flat = []
    start = 0
    for part_BT in parts:
        if part_BT is None:
            return None
        rows = lengths[start : start + len(part_BT)]
        start += len(part_BT)
        mask_BT = length_mask(rows, width=part_BT.shape[1]).bool()
        flat.append(part_BT.detach().cpu()[mask_BT].numpy())
    return np.concatenate(flat)


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
