"""A packed micro-batch of responses, and the way from its hidden states back to [B, T] tensors.

packer.py packs them.

Shape suffix legend: B = responses of the whole mini-batch; T = response tokens, right-padded; N = response tokens of a
micro-batch that this context-parallel rank predicts, flat; C = tokens of this context-parallel rank; P = patches of the
images that this rank runs the vision tower on; D = values of a patch; h = hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vppo.algorithm.patches import Patches, PatchValues
from megatron_vppo.algorithm.types import ImageRef, PerturbKey, TokenTerms
from megatron_vppo.models.layers.packed import PackedBatch
from megatron_vppo.models.stage_input import StageInput
from megatron_vppo.parallel.visual_focus import VisualTokens


class Pixels(Protocol):
    """The source of pixels. `Packer.pack` asks it for an image while the micro-batch before the image's runs."""

    @property
    def values(self) -> PatchValues:
        """The values of the bytes that `patches` returns."""
        ...

    def patches(self, ref: ImageRef, perturb: PerturbKey | None) -> Patches:
        """Returns the patches of an image, perturbed if there is a key. Called from another thread."""
        ...


@dataclass(frozen=True)
class View:
    """One look at one response: with its images as they are, or perturbed.

    Example: View(row=3, perturb=PerturbKey(step=7, draw=65536)) is the perturbed view of sample 0 of group
    1, which is row 3 of the mini-batch.
    """

    row: int
    """The response's row in the mini-batch."""
    perturb: PerturbKey | None
    """The perturbation of its images. None: they are shown as they are."""
    counted: bool = True
    """False for a stand-in, from which no response token is read: the view that a rank without micro-batches of its own
    runs to take part in the collectives of the others."""
    to_end: bool = False
    """True if the last token of the response is read, too. It predicts nothing, but has a hidden state of its own."""


def views_of(rows: Sequence[int], keys: Sequence[PerturbKey | None], *, to_end: bool = False) -> list[View]:
    """Lists the views of a micro-batch's rows: the original ones, those of rows without a perturbed view first, and
    then the perturbed views of the others, in the same order.

    Args:
        keys: the perturbed view of each row of the mini-batch; None for rows that have none.
        to_end: see View.
    """
    paired = [row for row in rows if keys[row] is not None]
    return [
        *(View(row, None, to_end=to_end) for row in rows if keys[row] is None),
        *(View(row, None, to_end=to_end) for row in paired),
        *(View(row, keys[row], to_end=to_end) for row in paired),
    ]


@dataclass(frozen=True)
class ResponseTokens:
    """The response tokens that this context-parallel rank predicts in a micro-batch, and their places."""

    hidden_index_N: Tensor
    """int64; the index among this rank's packed tokens (C) of the hidden state that predicts each token."""
    target_N: Tensor
    """int64; the tokens."""
    at: tuple[Tensor, Tensor] | None
    """int64 [N] each; row and column of each token in [B, T] tensors. None on the device in an update, whose terms the
    host has picked already."""
    num_perturbed: int
    """The number of tokens of views with perturbed images, which are the last ones. Just before them lie the tokens of
    the same rows' original views, in the same order."""
    visual: VisualTokens | None = None
    """The hidden states that are compared with those of the images; None if no view is read to its end."""

    def predicting(self, hidden_C1h: Tensor) -> Tensor:
        """Returns [N, h]: the hidden state that predicts each token; that of a shared prompt's end several times.

        As an embedding, because its backward pass sums repeated rows in the same order every time. That of plain
        indexing adds with several threads at once.
        """
        return F.embedding(self.hidden_index_N, hidden_C1h[:, 0])

    @property
    def originals(self) -> slice:
        """The tokens of views with the images as they are."""
        return slice(0, len(self.target_N) - self.num_perturbed)

    @property
    def single(self) -> slice:
        """Those of them whose row has no perturbed view."""
        return slice(0, len(self.target_N) - 2 * self.num_perturbed)

    @property
    def paired(self) -> slice:
        """Those of them whose row has one; they match those of `perturbed` one by one."""
        return slice(self.single.stop, self.originals.stop)

    @property
    def perturbed(self) -> slice:
        """The tokens of views with perturbed images."""
        return slice(self.originals.stop, len(self.target_N))

    def select(self, which: slice) -> ResponseTokens:
        """Selects some of the tokens, all of original or all of perturbed views."""
        return ResponseTokens(
            self.hidden_index_N[which],
            self.target_N[which],
            at=None if self.at is None else (self.at[0][which], self.at[1][which]),
            num_perturbed=self.num_perturbed if which == self.perturbed else 0,
        )


@dataclass(frozen=True)
class PatchBytes:
    """The images that this rank runs the vision tower on, as bytes. Views that differ in hidden patches share them."""

    images: tuple[Tensor, ...]
    """uint8 [patches, D as bytes] each; every image once."""
    shown: tuple[int, ...]
    """The number of the image that the tower runs on, first to last."""
    hidden_P: Tensor | None
    """bool; patches that are shown black, over all that the tower runs on. None: none are."""

    def pixels(self, values: PatchValues) -> Tensor:
        """Returns [P, D] in the dtype of the values."""
        return values(torch.cat([self.images[number] for number in self.shown]), self.hidden_P)


@dataclass(frozen=True)
class ResponseBatch:
    """One packed micro-batch: sequences, pixels, and the tokens whose log-probs the model's output gives."""

    packed: PackedBatch
    tokens: ResponseTokens
    patches: PatchBytes | None
    """None where this rank runs the vision tower on nothing."""


@dataclass(frozen=True)
class PlannedBatch:
    """The same as a stage's forward pass and the loss read it."""

    stage: StageInput
    tokens: ResponseTokens
    terms: TokenTerms | None
    """The other inputs of the loss, for the tokens of original views; None in scoring."""
    patches: PatchBytes | None


@dataclass(frozen=True)
class BatchSplit:
    """The numbers of ranks that work on one micro-batch together, and this rank's place among them."""

    context: int
    """The number of context-parallel ranks."""
    context_rank: int
    sequence_ranks: int
    """The number of tensor-parallel ranks that share out the tokens between layers; 1 without sequence parallelism."""
    image_ranks: int
    """The number of ranks that share out the images, each taking whole ones through the vision tower."""
    image_rank: int
    token_alignment: int = 1
    """The tokens that each rank holds are padded to a multiple of this; FP8 needs it."""
