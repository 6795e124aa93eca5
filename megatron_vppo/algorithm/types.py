"""The records that the stages of a training step hand to each other.

Records are built once, when every field is known, and never edited. They are light (token ids, log-probs, references to
images; never pixels), so every rank holds all of them, and every rank computes the algorithm's statistics on the same
rows.

Shape suffix legend: B = responses; T = response tokens, right-padded; N = response tokens, flat.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_vppo.config.choices import PerturbUnit


@dataclass(frozen=True, slots=True)
class ImageRef:
    """One image of one data set row: where its pixels come from, never the pixels."""

    split: str
    """'train' or 'val': which of the run's data sets."""
    row: int
    index: int
    """Position among the row's images."""


@dataclass(frozen=True, slots=True)
class PerturbKey:
    """Seeds the perturbation of an image: the same key gives the same one on every rank and after a resume."""

    step: int
    response_row: int | None
    """A number of the response that is unique within the step. None if one perturbation serves all responses."""

    @classmethod
    def of(cls, response: Response, step: int, *, per: PerturbUnit) -> PerturbKey:
        """The key of a response's images: its own ('row'), or that of all responses to its prompt ('image')."""
        return cls(step=step, response_row=response.group_id * 2**16 + response.sample if per == "row" else None)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question, tokenised."""

    split: str
    row: int
    """Row of the data set; (split, row) identifies the prompt over the whole run."""
    problem: str
    answer: str
    token_ids: tuple[int, ...]
    """What the model reads: each image placeholder repeated once per merged patch of its image."""
    compact_token_ids: tuple[int, ...]
    """The same with one placeholder per image, as vLLM takes it."""
    images: tuple[ImageRef, ...]
    grids_thw: tuple[tuple[int, int, int], ...]
    """Per image: (frames, rows, columns) in vision patches, before the spatial merge."""


@dataclass(frozen=True, slots=True)
class Response:
    """One sampled answer."""

    prompt: Prompt
    group_id: int
    """Unique within a step; the samples of one prompt share it."""
    sample: int
    """Index within the group."""
    token_ids: tuple[int, ...]
    """Up to and including EOS where the model stopped by itself."""
    rollout_logps: tuple[float, ...]
    """Nats; log-prob of each token in the sampling distribution, as the rollout engine reports it."""
    finish_reason: str
    """'stop' (EOS) or 'length' (cut at the limit)."""
    weight_version: int
    """The optimizer step whose weights sampled it."""


@dataclass(frozen=True, slots=True)
class Reward:
    overall: float
    """What the advantage is computed from."""
    accuracy: float
    """In [0, 1]; what group filtering and validation look at."""
    metrics: Mapping[str, float]
    """Everything else the reward function returned."""
    error: str | None = None
    """Why `overall` is zero, if the reward function raised or ran out of time."""


@dataclass(frozen=True, slots=True)
class GradedResponse:
    response: Response
    text: str
    """Decoded without special tokens."""
    reward: Reward


@dataclass(frozen=True, slots=True)
class Scores:
    """What the old policy says of every response token; no gradient. fp32, 0.0 where padded."""

    old_logp_BT: Tensor
    """Nats, given the original image, at the rollout temperature."""
    entropy_BT: Tensor
    """Nats; of the full distribution given the original image."""
    perturbed_logp_BT: Tensor | None
    """Nats, given the perturbed image; None where no second view was asked for."""
    divergence_BT: Tensor | None
    """Nats; kl_full or jsd between the two views; None for k3_sampled."""


@dataclass(frozen=True, slots=True)
class LossSpec:
    """The numbers of the clipped surrogate (spec 1.6)."""

    clip_ratio_low: float
    clip_ratio_high: float
    clip_ratio_dual: float
    """Bound on the ratio where the advantage is negative."""
    entropy_kind: str
    """'nll' (the authors': -log pi of the sampled token) or 'entropy' (of the full distribution)."""


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """One optimizer mini-batch. The loss is sum_BT(pg_weight * surrogate) + sum_BT(entropy_weight * entropy term).

    Masks, denominators and coefficients are inside the two weights, final before the first micro-batch is formed: no
    split into devices, micro-batches or packed sequences can change loss or gradient.
    """

    responses: tuple[Response, ...]
    old_logp_BT: Tensor
    """fp32 nats; 0.0 where padded."""
    advantage_BT: Tensor
    """fp32; shaped."""
    pg_weight_BT: Tensor
    """fp32; token mask over the global denominator; 0.0 where the token carries no policy gradient."""
    entropy_weight_BT: Tensor
    """fp32; coefficient over its denominator; added to the loss with a plus sign; 0.0 where unused."""
    response_mask_BT: Tensor
    """fp32; 1.0 on response tokens; for metrics."""
    loss: LossSpec

    def to(self, device: torch.device) -> TrainBatch:
        """The batch with its tensors on a device."""
        names = ("old_logp_BT", "advantage_BT", "pg_weight_BT", "entropy_weight_BT", "response_mask_BT")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def terms_at(self, at: tuple[Tensor, ...]) -> TokenTerms:
        """The terms of some tokens, given their rows and columns; int64 [N] each."""
        return TokenTerms(
            self.old_logp_BT[at], self.advantage_BT[at], self.pg_weight_BT[at], self.entropy_weight_BT[at]
        )


@dataclass(frozen=True, slots=True)
class TokenTerms:
    """A TrainBatch at some response tokens: what their loss needs besides the present log-probs. [N] fp32 each."""

    old_logp_N: Tensor
    advantage_N: Tensor
    pg_weight_N: Tensor
    entropy_weight_N: Tensor
