"""The packing of views of responses into a micro-batch. Views that show the same prompt share it.

Shape suffix legend: N = response tokens of a micro-batch that this context-parallel rank predicts, flat; K = all
packed tokens of a micro-batch; C = tokens of this context-parallel rank; I = image tokens among K; P = patches of
the images that this rank runs the vision tower on; D = values of a patch, as bytes.

Three views of two prompts, p q and x y z; the responses to the first are a b c and d e. The last token of a response is
not read, since it predicts nothing, unless its own hidden state is asked for:

    tokens     p  q | x  y  z  f  g | a  b | d |
    sequence   0      1               2      3       2 and 3 go on from 0, their prefix (see Packing)
    predicts      a           f  g h   b  c   e
                  d

A prompt that only one view shows is a sequence together with its response: 1. Of the others each response is a
sequence of its own, without its first token's prediction: the last token of the prompt predicts the first tokens of all
its responses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_vppo.algorithm.patches import Patches
from megatron_vppo.algorithm.types import ImageRef, PerturbKey, Prompt, Response
from megatron_vppo.models.family import PositionFn
from megatron_vppo.models.layers.context_parallel import padded_packing, tokens_of_rank
from megatron_vppo.models.layers.packed import PackedBatch
from megatron_vppo.models.layers.packing import Packing
from megatron_vppo.parallel.batching import BatchSplit, PatchBytes, Pixels, ResponseBatch, ResponseTokens, View
from megatron_vppo.parallel.image_runs import ImageRuns, ShownImage, runs_of
from megatron_vppo.parallel.token_counts import padded_tokens
from megatron_vppo.parallel.visual_focus import ReadTokens, visual_tokens

Ints = NDArray[np.int64]

_PADDING_TOKEN = 0
_Shown = tuple[tuple[int, ...], tuple[ImageRef, ...], tuple[tuple[int, int, int], ...], PerturbKey | None]
"""A prompt as a view shows it: token ids, images, their grids and their perturbation. Views in which all four are equal
have the same hidden states up to the end of the prompt."""

_Prompted = tuple[tuple[int, ...], tuple[tuple[int, int, int], ...]]
"""The source of rotary positions: the token ids of a prompt, and the grids of its images."""


@dataclass(frozen=True)
class Packer:
    """Packs views of responses into micro-batches, for this rank, on the host and with array operations alone."""

    pixels: Pixels | None
    """None on pipeline stages without the vision tower."""
    positions: PositionFn
    """The family's rotary positions of a sequence, from its token ids and image grids."""
    image_token_id: int
    merge_size: int
    """Patches along one side of a merged vision feature."""
    split: BatchSplit
    shares_prompts: bool = False
    """True if views that show the same prompt share its tokens. Context parallelism takes whole sequences alone."""

    def pack(
        self,
        responses: Sequence[Response],
        views: Sequence[View],
        *,
        limit: int | None = None,
        runs: ImageRuns | None = None,
    ) -> ResponseBatch:
        """Packs one micro-batch; the response tokens are in the order of the views.

        Views with perturbed images come last, and just before them the original views of the same rows.

        Args:
            limit: the tokens that micro-batches are filled up to; they are padded to a few numbers of tokens then. None
                pads no more than ranks need.
            runs: the runs of the tower that its images come from. None: no other micro-batch shows them.

        Raises ValueError for views in another order.
        """
        _check_order(views)
        runs = runs or runs_of(responses, views, ranks=self.split.image_ranks)
        sequences, of_views = self._lay_out(responses, views)
        packing = padded_packing(
            [len(sequence.token_ids) for sequence in sequences],
            tensor=self.split.sequence_ranks,
            context=self.split.context,
            alignment=self.split.token_alignment,
            prefixes=tuple(sequence.prefix for sequence in sequences if sequence.prefix is not None),
            round_up=int if limit is None else partial(padded_tokens, limit=limit),
        )
        token_ids_K = _padded_tokens(sequences, packing)
        return ResponseBatch(
            packed=PackedBatch(
                token_ids_K=torch.from_numpy(token_ids_K),
                positions_3K=torch.from_numpy(self._positions_3K(sequences, packing)),
                packing=packing,
                image_token_index_I=torch.from_numpy(np.flatnonzero(token_ids_K == self.image_token_id)),
                image_feature_index_I=torch.from_numpy(
                    _feature_index_I(sequences, runs.features(merge_size=self.merge_size))
                ),
                runs=tuple(run.of_tower() for run in runs.own),
                earlier=tuple(run.kept for run in runs.earlier if run.kept is not None),
            ),
            tokens=_response_tokens(responses, views, of_views, packing, self.split, self.image_token_id),
            patches=self._patches_of([image for run in runs.own for image in run.of_rank(self.split.image_rank)]),
        )

    def _lay_out(
        self, responses: Sequence[Response], views: Sequence[View]
    ) -> tuple[list[_Sequence], list[tuple[int, int | None]]]:
        """Makes the sequences: whole ones and prefixes first, then the continuations.

        Returns:
            The sequences, and for each view the numbers of the one with its prompt, and of the one with the rest of its
            response; None if they are one sequence, or the response is a single token.
        """
        shown = [_shown(responses[view.row].prompt, view) for view in views]
        counts = Counter(shown) if self.shares_prompts and self.split.context == 1 else Counter[_Shown]()
        whole: list[_Sequence] = []
        continued: list[_Sequence] = []
        of_views: list[tuple[int, int | None]] = []
        number_of: dict[_Shown, int] = {}
        for view, of_view in zip(views, shown, strict=True):
            prompt, read = responses[view.row].prompt, _read(responses[view.row], view)
            if counts[of_view] < 2:
                of_views.append((len(whole), None))
                whole.append(_Sequence(prompt, view.perturb, prompt.token_ids + read))
                continue
            if of_view not in number_of:
                number_of[of_view] = len(whole)
                whole.append(_Sequence(prompt, view.perturb, prompt.token_ids))
            number = number_of[of_view]
            of_views.append((number, len(continued) if read else None))
            if read:
                continued.append(_Sequence(prompt, view.perturb, read, prefix=number))
        first = len(whole)  # of the continuations
        return [*whole, *continued], [(n, None if rest is None else first + rest) for n, rest in of_views]

    def _positions_3K(self, sequences: Sequence[_Sequence], packing: Packing) -> Ints:
        """Returns the rotary positions of all tokens. Those of a prompt and of what follows are worked out once."""
        # What follows a prompt is text, so all that follow it have the same positions, as far as they go.
        longest: dict[_Prompted, tuple[int, ...]] = {}
        for sequence, length in zip(sequences, packing.lengths, strict=False):
            tokens = (*sequence.from_prompt, *(_PADDING_TOKEN,) * (length - len(sequence.token_ids)))
            if len(tokens) > len(longest.get(sequence.prompted, ())):
                longest[sequence.prompted] = tokens
        known = {prompted: self.positions(tokens, prompted[1]).numpy() for prompted, tokens in longest.items()}
        positions = []
        for sequence, length in zip(sequences, packing.lengths, strict=False):
            positions.append(known[sequence.prompted][:, sequence.offset : sequence.offset + length])
        if packing.ends_in_filler:
            positions.append(np.broadcast_to(np.arange(packing.lengths[-1]), (3, packing.lengths[-1])))
        return np.concatenate(positions, axis=1)

    def _patches_of(self, keys: Sequence[ShownImage]) -> PatchBytes | None:
        """Asks for the patches of the images that this rank runs the tower on."""
        if self.pixels is None or not keys:
            return None
        shown = [self.pixels.patches(*key) for key in keys]
        images = list({id(patches.bytes_PD): patches.bytes_PD for patches in shown}.values())
        number_of = {id(image): number for number, image in enumerate(images)}
        hidden_P = None
        if any(patches.hidden_P is not None for patches in shown):
            hidden_P = torch.from_numpy(np.concatenate([_hidden(patches) for patches in shown]))
        return PatchBytes(tuple(images), tuple(number_of[id(patches.bytes_PD)] for patches in shown), hidden_P)


@dataclass(frozen=True)
class _Sequence:
    """A packed sequence: a prompt, what follows one, or both."""

    prompt: Prompt
    perturb: PerturbKey | None
    token_ids: tuple[int, ...]
    prefix: int | None = None
    """The number of the sequence that it goes on from; None: it begins with the prompt."""

    @property
    def offset(self) -> int:
        """The number of tokens that come before it."""
        return 0 if self.prefix is None else len(self.prompt.token_ids)

    @property
    def from_prompt(self) -> tuple[int, ...]:
        """The tokens with those that come before."""
        return self.token_ids if self.prefix is None else self.prompt.token_ids + self.token_ids

    @property
    def prompted(self) -> _Prompted:
        return self.prompt.token_ids, self.prompt.grids_thw


def _check_order(views: Sequence[View]) -> None:
    count = sum(view.perturb is not None for view in views)
    first = len(views) - count
    perturbed, originals = views[first:], views[max(0, first - count) : first]
    if (
        any(view.perturb is None for view in perturbed)
        or [v.row for v in perturbed] != [v.row for v in originals][:count]
    ):
        raise ValueError(
            "views with perturbed images come last, and right before them the original views of the same rows; these "
            f"are (row, perturbed): {[(view.row, view.perturb is not None) for view in views]}"
        )


def _shown(prompt: Prompt, view: View) -> _Shown:
    return prompt.token_ids, prompt.images, prompt.grids_thw, view.perturb


def _read(response: Response, view: View) -> tuple[int, ...]:
    """Returns the tokens of a response that the model reads."""
    return tuple(response.token_ids if view.to_end else response.token_ids[:-1])


def _padded_tokens(sequences: Sequence[_Sequence], packing: Packing) -> Ints:
    """Returns the tokens of all sequences. Padding comes last, and attention is causal: no real token sees it."""
    token_ids_K = np.full(packing.num_tokens, _PADDING_TOKEN)
    for start, sequence in zip(packing.starts, sequences, strict=False):  # a filler has no sequence of its own
        token_ids_K[start : start + len(sequence.token_ids)] = sequence.token_ids
    return token_ids_K


def _feature_index_I(sequences: Sequence[_Sequence], features: Mapping[ShownImage, range]) -> Ints:
    """Returns int64 [I]: the merged feature of each image token."""
    indices = [
        np.asarray(features[image, sequence.perturb])
        for sequence in sequences
        if sequence.prefix is None
        for image in sequence.prompt.images
    ]
    return np.concatenate(indices) if indices else np.zeros(0, dtype=np.int64)


def _hidden(patches: Patches) -> NDArray[np.bool_]:
    return np.zeros(len(patches.bytes_PD), dtype=bool) if patches.hidden_P is None else patches.hidden_P.numpy()


def _response_tokens(
    responses: Sequence[Response],
    views: Sequence[View],
    of_views: Sequence[tuple[int, int | None]],
    packing: Packing,
    split: BatchSplit,
    image_token_id: int,
) -> ResponseTokens:
    """Finds the response tokens whose predicting hidden states this context-parallel rank holds."""
    # A token is predicted by the hidden state before it. Say there are two sequences of eight tokens. The second has
    # the prompt p p p and the response a b c, of which c is not read. Two context-parallel ranks share the tokens: each
    # sequence is cut into four chunks, of which rank 0 takes the outer two and rank 1 the inner two.
    #
    #     sequence          p  p  p  a  b  .  .  .     . is padding
    #     predicts                a  b  c
    #     index in K        8  9 10 11 12 13 14 15     start 8; the response starts at 8 + 2
    #     held by rank      0  0  1  1  1  1  0  0
    #     index in C of 1   -  -  4  5  6  7  -  -     0 to 3 are of the first sequence
    #
    # Rank 1 predicts all three: hidden_index_N = 4 5 6, target_N = a b c, columns 0 1 2. Rank 0 predicts none.
    index, targets, rows, columns, perturbed, read_to_end = [], [], [], [], [], []
    for view, (with_prompt, with_rest) in zip(views, of_views, strict=True):
        response = responses[view.row]
        first, length = packing.starts[with_prompt] + len(response.prompt.token_ids) - 1, len(response.token_ids)
        predicting = np.arange(first, first + length)
        if with_rest is not None:
            predicting[1:] = packing.starts[with_rest] + np.arange(length - 1)
        if view.to_end and view.perturb is None:
            read_to_end.append(_read_tokens(response, view.row, with_prompt, with_rest, packing, image_token_id))
        count = length if view.counted else 0
        index.append(predicting[:count])
        targets.append(np.asarray(response.token_ids[:count], dtype=np.int64))
        rows.append(np.full(count, view.row))
        columns.append(np.arange(count))
        perturbed.append(np.full(count, view.perturb is not None))
    own_C = tokens_of_rank(packing, rank=split.context_rank, size=split.context).numpy()
    index_in_C_K = np.full(packing.num_tokens, -1)
    index_in_C_K[own_C] = np.arange(len(own_C))
    hidden_index = index_in_C_K[np.concatenate(index)]
    here = hidden_index >= 0
    return ResponseTokens(
        hidden_index_N=torch.from_numpy(hidden_index[here]),
        target_N=torch.from_numpy(np.concatenate(targets)[here]),
        at=(torch.from_numpy(np.concatenate(rows)[here]), torch.from_numpy(np.concatenate(columns)[here])),
        num_perturbed=int(np.concatenate(perturbed)[here].sum()),
        visual=visual_tokens(read_to_end, index_in_C_K) if read_to_end else None,
    )


def _read_tokens(
    response: Response, row: int, with_prompt: int, with_rest: int | None, packing: Packing, image_token_id: int
) -> ReadTokens:
    """Finds the image tokens of a view's prompt, and the tokens of its response, among all packed ones."""
    prompt = np.asarray(response.prompt.token_ids)
    start = packing.starts[with_prompt]
    first = start + len(prompt) if with_rest is None else packing.starts[with_rest]
    return ReadTokens(
        prompt=with_prompt,
        image_index=start + np.flatnonzero(prompt == image_token_id),
        own_index=first + np.arange(len(response.token_ids)),
        row=row,
    )
