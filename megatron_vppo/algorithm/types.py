"""The records that the phases of a training step hand to each other.

Records are built once, when every field is known, and never edited. They are light (token ids, log-probs, references to
images; never pixels), so every rank holds all of them, and every rank computes the algorithm's statistics on the same
rows.

Shape suffix legend: B = responses; T = response tokens, right-padded; N = response tokens, flat; R = statistics per
position, one for each of the engine's likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vppo.config.choices import KlKind, PerturbUnit, PolicyLoss


@dataclass(frozen=True, slots=True)
class ImageRef:
    """A reference to one image of one row of a data set; never the pixels.

    Example: ImageRef(split="train", row=17, index=0) is the first image of row 17.
    """

    split: str
    """'train' or 'val': the run's data set."""
    row: int
    index: int
    """The position among the row's images."""


@dataclass(frozen=True, slots=True)
class PerturbKey:
    """Seeds the perturbation of an image: the same key gives the same one on every rank and after a resume."""

    step: int
    draw: int | None
    """Tells apart the perturbations that an image has in a step: group x 2**16 + sample, a number that no other
    response has; or -1, -2, ... where responses share them. None if there is one."""

    @classmethod
    def of(cls, response: Response, step: int, *, per: PerturbUnit) -> PerturbKey:
        """Returns the key of a response's images: its own ('row'), or that of the responses which share it."""
        if per == "image":
            return cls(step=step, draw=None)
        if per == "row":
            return cls(step=step, draw=response.group_id * 2**16 + response.sample)
        return cls(step=step, draw=-1 - response.sample % per)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question, tokenised."""

    split: str
    row: int
    """The row of the data set; (split, row) identifies the prompt over the whole run."""
    problem: str
    answer: str
    """The ground truth."""
    token_ids: tuple[int, ...]
    """The tokens that the model reads: an image's placeholder is repeated once per merged patch."""
    compact_token_ids: tuple[int, ...]
    """The same with one placeholder per image, as vLLM takes it."""
    images: tuple[ImageRef, ...]
    grids_thw: tuple[tuple[int, int, int], ...]
    """Per image: (frames, rows, columns) in vision patches, before the spatial merge."""


@dataclass(frozen=True, slots=True)
class Response:
    """The tokens that the model sampled for a prompt.

    Example: group_id=4, sample=0, token_ids=(785, 4226, 374, 220, 22, 151645), finish_reason='stop', weight_version=12
    """

    prompt: Prompt
    group_id: int
    """The number of the group, unique within a step; the responses to one prompt share it."""
    sample: int
    """The index within the group."""
    token_ids: Sequence[int]
    """Everything sampled, EOS included if the model stopped by itself. Like the log-probs an array.array where it comes
    from an engine, with a fifth of the bytes of a tuple."""
    rollout_logps: Sequence[float]
    """Nats; the log-prob of each token in the sampling distribution, as the rollout engine reports it."""
    finish_reason: str
    """'stop' (EOS) or 'length' (cut at the limit)."""
    weight_version: int
    """The optimizer step whose weights sampled it, or the end of it."""
    carried_tokens: int = 0
    """The tokens at its beginning that an earlier step sampled, with older weights; see rollout/carry.py."""
    likeliest_ids: Sequence[int] = ()
    likeliest_logps: Sequence[float] = ()
    """The engine's likeliest tokens at each position and their log-probs, as many for each, one position after the
    other. Empty unless they are asked for."""


@dataclass(frozen=True, slots=True)
class Reward:
    """The reward function's verdict on one response."""

    overall: float
    """The number that the advantage is computed from."""
    accuracy: float
    """In [0, 1]; group filtering and validation look at it."""
    metrics: Mapping[str, float]
    """Everything else the reward function returned."""
    error: str | None = None
    """The reason why `overall` is zero, if the reward function raised or ran out of time."""
    vote: str | None = None
    """The answer that an evaluation found in the response, in the spelling by which a majority counts it."""


@dataclass(frozen=True, slots=True)
class GradedResponse:
    """A response with its text and its reward."""

    response: Response
    text: str
    """The response decoded, without special tokens."""
    reward: Reward


@dataclass(frozen=True, slots=True)
class Scores:
    """The old policy's view of every response token; no gradient. fp32, 0.0 where padded."""

    old_logp_BT: Tensor
    """Nats; log-probs given the original image, at the rollout temperature."""
    entropy_BT: Tensor
    """Nats; the entropy of the full distribution given the original image."""
    perturbed_logp_BT: Tensor | None
    """Nats; log-probs given the perturbed image. None if the perturbed view was not scored."""
    divergence_BT: Tensor | None
    """Nats; kl_full or jsd between the two views; or the difference of two probabilities, top1_drop. None for
    k3_sampled, which needs log-probs alone."""
    reference_logp_BT: Tensor | None = None
    """Nats; log-probs of the reference model, given the original image. None if there is none."""
    perturbed_entropy_BT: Tensor | None = None
    """Nats; the entropy given the perturbed image, 0.0 in rows without one. None without a divergence."""
    visual_focus_BT: Tensor | None = None
    """In [-1, 1]; the cosine of the hidden state of each token and the mean of those of the image's tokens, 0.0 in rows
    without an image. None if nothing asked for it."""
    perturb_keys: tuple[PerturbKey | None, ...] = ()
    """The perturbation of each response's images in this step; None for one without images."""

    def rows(self, which: slice) -> Scores:
        """Selects some responses."""

        def of(value_BT: Tensor | None) -> Tensor | None:
            return None if value_BT is None else value_BT[which]

        return Scores(
            self.old_logp_BT[which],
            self.entropy_BT[which],
            of(self.perturbed_logp_BT),
            of(self.divergence_BT),
            of(self.reference_logp_BT),
            of(self.perturbed_entropy_BT),
            of(self.visual_focus_BT),
            self.perturb_keys[which],
        )


@dataclass(frozen=True, slots=True)
class LossSpec:
    """The numbers that the loss goes by; docs/algorithm.md, "Loss"."""

    clip_ratio_low: float
    clip_ratio_high: float
    clip_ratio_dual: float
    """The bound on the ratio of tokens with a negative advantage."""
    entropy_kind: str
    """'nll' (the authors': -log pi of the sampled token) or 'entropy' (of the full distribution)."""
    kl_kind: KlKind
    policy_loss: PolicyLoss
    sapo_tau_positive: float
    sapo_tau_negative: float
    """The steepness of SAPO's gate, where the advantage is positive and elsewhere."""
    centering_cap: float | None = None
    """The cap of the weights that score centering counts on; None: tokens are not weighted."""


@dataclass(frozen=True, slots=True)
class PerceptionTerms:
    """PAPO's part of a mini-batch's loss: sum_BT(entropy_weight * entropy term of the perturbed view) -
    sum_BT(weight * divergence between the views). See perception.py.
    """

    weight_BT: Tensor
    """fp32; the coefficient divided by its denominator; 0.0 where padded and for rows without an image."""
    entropy_weight_BT: Tensor | None
    """fp32; the same of the entropy term. None if the perturbed views are constant, and so would be the term."""
    perturb_keys: tuple[PerturbKey | None, ...] | None
    """The perturbed view that the update reads of each response; None for one without an image. None for all if these
    views are constant in the loss."""
    perturbed_logp_BT: Tensor | None
    """fp32 nats; log-probs given the perturbed image, under the policy that was scored, if they are constant."""

    def terms_at(self, at: tuple[Tensor, ...]) -> TokenPerception:
        """Returns the terms of some tokens, as TrainBatch.terms_at."""
        return TokenPerception(
            self.weight_BT[at],
            None if self.entropy_weight_BT is None else self.entropy_weight_BT[at],
            None if self.perturbed_logp_BT is None else self.perturbed_logp_BT[at],
        )


@dataclass(frozen=True, slots=True)
class TokenPerception:
    """PerceptionTerms at some response tokens. [N] fp32 each."""

    weight_N: Tensor
    entropy_weight_N: Tensor | None
    perturbed_logp_N: Tensor | None


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """One optimizer mini-batch. The loss is sum_BT(pg_weight * surrogate) + sum_BT(entropy_weight * entropy term), and
    what `perception` and the reference model add.

    Masks, denominators and coefficients are inside the weights. They are final before the first micro-batch is
    formed, so no split into devices, micro-batches or packed sequences can change loss or gradient.
    """

    responses: tuple[Response, ...]
    old_logp_BT: Tensor
    """fp32 nats; log-probs under the policy that was scored. 0.0 where padded."""
    advantage_BT: Tensor
    """fp32; the shaped advantage of the response; 0.0 where padded."""
    pg_weight_BT: Tensor
    """fp32; the token mask divided by the global denominator; 0.0 where a token carries no policy gradient."""
    entropy_weight_BT: Tensor
    """fp32; the coefficient divided by its denominator; 0.0 where unused. Added to the loss, it lowers the entropy."""
    response_mask_BT: Tensor
    """fp32; 1.0 on response tokens. Metrics are means over it."""
    loss: LossSpec
    reference_logp_BT: Tensor | None = None
    """fp32 nats; log-probs under the reference model. None if its divergence is no part of the loss."""
    kl_weight_BT: Tensor | None = None
    """fp32; the coefficient of that divergence divided by its denominator; 0.0 where unused."""
    centering_weight_BT: Tensor | None = None
    """fp32; the weight of score centering: that of the policy gradient, without the importance weights of tokens. None
    without centering."""
    perception: PerceptionTerms | None = None
    """The perception loss; None if there is none."""

    def terms_at(self, at: tuple[Tensor, ...]) -> TokenTerms:
        """Returns the terms of some tokens, given their rows and columns; int64 [N] each, row after row."""
        length_B = None
        if self.loss.policy_loss == "gspo":
            length_B = torch.unique_consecutive(at[0], return_counts=True)[1]
        return TokenTerms(
            self.old_logp_BT[at],
            self.advantage_BT[at],
            self.pg_weight_BT[at],
            self.entropy_weight_BT[at],
            length_B,
            None if self.reference_logp_BT is None else self.reference_logp_BT[at],
            None if self.kl_weight_BT is None else self.kl_weight_BT[at],
            None if self.centering_weight_BT is None else self._likeliest_at(at, self.centering_weight_BT[at]),
            None if self.perception is None else self.perception.terms_at(at),
        )

    def _likeliest_at(self, at: tuple[Tensor, ...], weight_N: Tensor) -> LikeliestTerms:
        ids, logps, done = [], [], 0
        rows, counts = torch.unique_consecutive(at[0], return_counts=True)
        for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
            response, columns = self.responses[row], at[1][done : done + count]
            ids.append(torch.tensor(response.likeliest_ids).view(len(response.token_ids), -1)[columns])
            logps.append(torch.tensor(response.likeliest_logps).view(len(response.token_ids), -1)[columns])
            done += count
        if not ids:
            none_NR = weight_N.new_zeros(0, 1)
            return LikeliestTerms(none_NR.long(), none_NR, weight_N)
        return LikeliestTerms(torch.cat(ids).long(), torch.cat(logps).float(), weight_N)


@dataclass(frozen=True, slots=True)
class TokenTerms:
    """A TrainBatch at some response tokens: what their loss needs besides the present log-probs. [N] fp32 each."""

    old_logp_N: Tensor
    advantage_N: Tensor
    pg_weight_N: Tensor
    entropy_weight_N: Tensor
    length_B: Tensor | None = None
    """int64; the number of these tokens in each of their rows, for a loss that needs it."""
    reference_logp_N: Tensor | None = None
    kl_weight_N: Tensor | None = None
    likeliest: LikeliestTerms | None = None
    perception: TokenPerception | None = None


@dataclass(frozen=True, slots=True)
class LikeliestTerms:
    """The engine's likeliest tokens at some positions, by which the policy gradient is centred."""

    ids_NR: Tensor
    """int64."""
    rollout_logp_NR: Tensor
    """fp32 nats; as the engine reports them."""
    weight_N: Tensor
    """fp32."""
