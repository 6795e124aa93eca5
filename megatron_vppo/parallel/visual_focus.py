"""The nearness of response tokens' hidden states to those of the image: VGPO's score, without a further forward pass.

The prototype of an image is the mean of the hidden states of its tokens, after the final norm of the model; of several
images of a prompt, the mean over the tokens of all of them. The score of a response token is the cosine of its hidden
state, the one that the model has after it has read the token, and of the prototype.

Shape suffix legend: B = responses; T = response tokens, right-padded; N = response tokens whose hidden state this
context-parallel rank holds, flat; U = those of one chunk; C = tokens of this context-parallel rank; J = image tokens of
one prompt among them; Z = packed sequences that begin with a prompt that has images; h = hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron_vppo.parallel.head_chunk import stat_dtype

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class ReadTokens:
    """The places of one view's tokens among all packed ones; int64 each."""

    prompt: int
    """The number of the prompt; views that share its tokens have the same."""
    image_index: Ints
    """The tokens of the prompt's images; empty without one."""
    own_index: Ints
    """The response tokens."""
    row: int
    """The response's row in the mini-batch."""


@dataclass(frozen=True)
class VisualTokens:
    """The hidden states of a micro-batch that are compared, on this context-parallel rank."""

    image_index: tuple[Tensor, ...]
    """int64 [J] for each prompt; indices among this rank's tokens (C)."""
    own_index_N: Tensor
    """int64; the indices of the response tokens among this rank's."""
    prompt_N: Tensor
    """int64; the number of each token's prompt, in [0, Z)."""
    at: tuple[Tensor, Tensor]
    """int64 [N] each; row and column of each token in [B, T] tensors."""


def visual_tokens(views: Sequence[ReadTokens], index_in_C_K: Ints) -> VisualTokens:
    """Finds what this rank holds of the tokens that are compared.

    Args:
        views: those with images as they are. A response to a prompt without one is left out of the result.
        index_in_C_K: the index of each packed token among this rank's; -1 if another rank holds it.
    """
    with_images = [view for view in views if len(view.image_index)]
    prompts = {view.prompt: view.image_index for view in with_images}
    number_of = {prompt: number for number, prompt in enumerate(prompts)}
    none = np.zeros(0, dtype=np.int64)
    own = index_in_C_K[np.concatenate([none, *(view.own_index for view in with_images)])]
    lengths = [len(view.own_index) for view in with_images]
    of_prompt = np.repeat([number_of[view.prompt] for view in with_images], lengths).astype(np.int64)
    rows = np.repeat([view.row for view in with_images], lengths).astype(np.int64)
    columns = np.concatenate([none, *(np.arange(length) for length in lengths)])
    here = own >= 0
    return VisualTokens(
        image_index=tuple(torch.from_numpy(_held(index_in_C_K[index])) for index in prompts.values()),
        own_index_N=torch.from_numpy(own[here]),
        prompt_N=torch.from_numpy(of_prompt[here]),
        at=(torch.from_numpy(rows[here]), torch.from_numpy(columns[here])),
    )


@torch.no_grad()
def visual_focus(hidden_Ch: Tensor, tokens: VisualTokens, *, group: dist.ProcessGroup, chunk_tokens: int) -> Tensor:
    """Computes the cosines [N] in float32 (float64 for float64 hidden states); a collective over `group`.

    Args:
        hidden_Ch: after the final norm.
        group: the context-parallel ranks, each of which holds some of the images' tokens.
        chunk_tokens: the hidden states that may exist in float32 at once.
    """
    dtype = stat_dtype(hidden_Ch.dtype)
    if not tokens.image_index:
        return hidden_Ch.new_zeros(0, dtype=dtype)
    # One sum after the other rather than index_add, which adds in any order on a GPU.
    sums = [_sum(hidden_Ch, index_J, dtype=dtype, chunk_tokens=chunk_tokens) for index_J in tokens.image_index]
    prototype_Zh = torch.stack(sums)
    if dist.get_world_size(group) > 1:
        dist.all_reduce(prototype_Zh, group=group)
    prototype_Zh = torch.nn.functional.normalize(prototype_Zh, dim=1)  # a cosine knows no length: no need to divide
    found = [hidden_Ch.new_zeros(0, dtype=dtype)]
    for own_U, prompt_U in zip(
        tokens.own_index_N.split(chunk_tokens), tokens.prompt_N.split(chunk_tokens), strict=True
    ):
        own_Uh = torch.nn.functional.normalize(hidden_Ch[own_U].to(dtype), dim=1)
        found.append((own_Uh * prototype_Zh[prompt_U]).sum(1))
    return torch.cat(found)


def _held(index: Ints) -> Ints:
    return index[index >= 0]


def _sum(hidden_Ch: Tensor, index_J: Tensor, *, dtype: torch.dtype, chunk_tokens: int) -> Tensor:
    total_h = hidden_Ch.new_zeros(hidden_Ch.shape[1], dtype=dtype)
    for part_J in index_J.split(chunk_tokens):
        total_h += hidden_Ch[part_J].sum(0, dtype=dtype)
    return total_h
