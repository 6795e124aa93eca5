"""A packed micro-batch of responses, and the way from its hidden states back to [B, T] tensors.

packer.py packs them.

Shape suffix legend: B = responses of the whole mini-batch; T = response tokens, right-padded; N = response tokens of a
micro-batch that this context-parallel rank predicts, flat; C = tokens of this context-parallel rank; P = patches; D =
values of a patch; h = hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vppo.algorithm.types import ImageRef, PerturbKey
from megatron_vppo.models.layers.packed import PackedBatch


class Pixels(Protocol):
    """The source of pixels. `Packer.pack` asks it for an image just before the image's micro-batch runs."""

    def patches(self, ref: ImageRef, perturb: PerturbKey | None) -> Tensor:
        """Returns the patches of an image, float32 [P, D]; perturbed if there is a key."""
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


@dataclass(frozen=True)
class ResponseTokens:
    """The response tokens that this context-parallel rank predicts in a micro-batch, and their places."""

    hidden_index_N: Tensor
    """int64; the index among this rank's packed tokens (C) of the hidden state that predicts each token."""
    target_N: Tensor
    """int64; the tokens."""
    row_N: Tensor
    column_N: Tensor
    """int64; the row and column of each token in [B, T] tensors."""
    perturbed_N: Tensor
    """bool; True if the token belongs to a view with perturbed images."""

    @property
    def at(self) -> tuple[Tensor, Tensor]:
        """The index of these tokens into [B, T] tensors."""
        return self.row_N, self.column_N

    def predicting(self, hidden_C1h: Tensor) -> Tensor:
        """Returns [N, h]: the hidden state that predicts each token; that of a shared prompt's end several times.

        As an embedding, because its backward pass sums repeated rows in the same order every time. That of plain
        indexing adds with several threads at once.
        """
        return F.embedding(self.hidden_index_N, hidden_C1h[:, 0])

    def select(self, which: Tensor | slice) -> ResponseTokens:
        """Selects some of the tokens, by indices, mask or slice."""
        return ResponseTokens(
            self.hidden_index_N[which],
            self.target_N[which],
            self.row_N[which],
            self.column_N[which],
            self.perturbed_N[which],
        )

    def to(self, device: torch.device) -> ResponseTokens:
        return ResponseTokens(
            self.hidden_index_N.to(device),
            self.target_N.to(device),
            self.row_N.to(device),
            self.column_N.to(device),
            self.perturbed_N.to(device),
        )


@dataclass(frozen=True)
class ResponseBatch:
    """One packed micro-batch: the input of the model, and the tokens whose log-probs its output gives."""

    packed: PackedBatch
    tokens: ResponseTokens


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
