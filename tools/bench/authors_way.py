"""The same scoring and update done as the authors' code does it, on one device.

What that is was read in their public repository, huaixuheqing/VPPO-RL (verl/workers/actor/dp_actor.py and
verl/workers/fsdp_workers.py) and EasyR1's log-prob helper (verl/utils/torch_functional.py): transformers' model on
packed rows, flash attention, logits of every position in the model's dtype, divided in place by the temperature, then a
cross-entropy of all of them in float32, compiled; each view scored in a pass of its own; each row with its own copy of
its picture; gradient checkpointing of every layer; float32 master weights and a fused AdamW. Left out: FSDP, which on
one device only copies, and moving pixels to the device, so both cost nothing here.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AutoModelForImageTextToText

from bench.workload import Workload, fill_with_noise
from megatron_vppo.algorithm.loss import surrogate_loss
from megatron_vppo.algorithm.types import Response, TrainBatch
from megatron_vppo.models.language.mrope import mrope_positions

LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-6, 1e-2, 1.0


@dataclass(frozen=True)
class PackedRows:
    """A micro-batch; K = tokens of all rows, N = response tokens."""

    rows: tuple[int, ...]
    token_ids_1K: Tensor
    positions_41K: Tensor
    """Of the text, from 0 in each row; then (frame, row, column)."""
    lengths: tuple[int, ...]
    pixels_PD: Tensor
    grids_I3: Tensor
    predicting_N: Tensor
    """Places whose logits say something about a response token."""
    row_N: Tensor
    column_N: Tensor


class AuthorsWay:
    def __init__(
        self,
        hf_config: Any,
        workload: Workload,
        *,
        device: torch.device,
        dtype: torch.dtype,
        temperature: float,
        rows_per_update: int,
        rows_per_experience: int,
    ) -> None:
        self._workload, self._device, self._temperature = workload, device, temperature
        self._attention = SequenceAttention()
        for name in (SequenceAttention.NAME, SequenceAttention.VISION_NAME):
            AttentionInterface.register(name, self._attention)
        with device:
            self._model = AutoModelForImageTextToText.from_config(
                copy.deepcopy(hf_config), dtype=dtype, attn_implementation=authors_attention()
            )
        if authors_attention() == SequenceAttention.NAME:
            self._model.model.visual.config._attn_implementation = SequenceAttention.VISION_NAME
        fill_with_noise(self._model, seed=0)
        self._model.train()
        self._model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._masters = [parameter.detach().float() for parameter in self._model.parameters()]
        self._optimizer = torch.optim.AdamW(
            self._masters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=device.type == "cuda"
        )
        self._log_probs = _log_probs if device.type == "cpu" else torch.compile(_log_probs, dynamic=True)
        pack = partial(
            _pack, workload, image_token_id=hf_config.image_token_id,
            merge_size=hf_config.vision_config.spatial_merge_size, device=device,
        )  # fmt: skip
        self._update_batches = [pack(rows) for rows in _split(len(workload.responses), rows_per_update)]
        self._score_batches = [pack(rows) for rows in _split(len(workload.responses), rows_per_experience)]

    @torch.no_grad()
    def score(self) -> list[Tensor]:
        """Log-probs of all response tokens given the original and the perturbed picture: two passes, [B, T] each."""
        self._model.eval()
        views = []
        for _ in ("original", "perturbed"):
            logp_BT = self._zeros()
            for batch in self._score_batches:
                logp_BT[batch.row_N, batch.column_N] = self._forward(batch)
            views.append(logp_BT.cpu())
        self._model.train()
        return views

    def update(self, batch: TrainBatch) -> float:
        """One optimizer step; returns the gradient norm."""
        batch = batch.to(self._device)
        for packed in self._update_batches:
            terms = batch.terms_at((packed.row_N, packed.column_N))
            surrogate_loss(self._forward(packed), terms, spec=batch.loss).loss.backward()
        return self._step()

    def _forward(self, batch: PackedRows) -> Tensor:
        self._attention.lengths = batch.lengths
        logits_KV = self._model(
            input_ids=batch.token_ids_1K,
            attention_mask=None,
            position_ids=batch.positions_41K,
            pixel_values=batch.pixels_PD,
            image_grid_thw=batch.grids_I3,
            use_cache=False,
        ).logits.squeeze(0)
        logits_KV.div_(self._temperature)
        logp_K = self._log_probs(logits_KV, batch.token_ids_1K[0].roll(-1))
        return logp_K[batch.predicting_N]

    def _step(self) -> float:
        for master, parameter in zip(self._masters, self._model.parameters(), strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self._masters, MAX_GRAD_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            for master, parameter in zip(self._masters, self._model.parameters(), strict=True):
                parameter.copy_(master)
        return float(norm)

    def _zeros(self) -> Tensor:
        longest = max(len(response.token_ids) for response in self._workload.responses)
        return torch.zeros(len(self._workload.responses), longest, device=self._device)


def authors_attention() -> str:
    """transformers' name of it: theirs, if flash-attn is there."""
    return "flash_attention_2" if importlib.util.find_spec("flash_attn") else SequenceAttention.NAME


def _log_probs(logits_KV: Tensor, labels_K: Tensor) -> Tensor:
    return -F.cross_entropy(logits_KV.float(), labels_K, reduction="none")


def _split(rows: int, each: int) -> Iterator[tuple[int, ...]]:
    for first in range(0, rows, each):
        yield tuple(range(first, min(first + each, rows)))


def _pack(
    workload: Workload, rows: Sequence[int], *, image_token_id: int, merge_size: int, device: torch.device
) -> PackedRows:
    responses: list[Response] = [workload.responses[row] for row in rows]
    sequences = [(*response.prompt.token_ids, *response.token_ids) for response in responses]
    positions, places, row_numbers, columns, start = [], [], [], [], 0
    for row, response, tokens in zip(rows, responses, sequences, strict=True):
        text_1L = torch.arange(len(tokens))[None]
        grids = response.prompt.grids_thw
        angles_3L = mrope_positions(tokens, grids, image_token_id=image_token_id, merge_size=merge_size)
        positions.append(torch.cat([text_1L, angles_3L]))
        count = len(response.token_ids)
        first = start + len(response.prompt.token_ids) - 1
        places.append(torch.arange(first, first + count))
        row_numbers.append(torch.full((count,), row))
        columns.append(torch.arange(count))
        start += len(tokens)
    pictures = [workload.patches(response.prompt.images[0], None) for response in responses]
    return PackedRows(
        rows=tuple(rows),
        token_ids_1K=torch.tensor([token for tokens in sequences for token in tokens], device=device)[None],
        positions_41K=torch.cat(positions, dim=1)[:, None].to(device),
        lengths=tuple(len(tokens) for tokens in sequences),
        pixels_PD=torch.cat(pictures).to(device),
        grids_I3=torch.tensor([response.prompt.grids_thw[0] for response in responses], device=device),
        predicting_N=torch.cat(places).to(device),
        row_N=torch.cat(row_numbers).to(device),
        column_N=torch.cat(columns).to(device),
    )


class SequenceAttention:
    """In place of flash-attn where it is not installed: torch's own attention, on a GPU its flash kernels, over each
    packed row, and over all windows of one length together. No token looks at another sequence, nothing is padded.
    """

    NAME = "by_sequence"
    """transformers makes no mask for a name that it does not know."""
    VISION_NAME = "flash_by_sequence"
    """To what has 'flash' in its name the vision tower hands all windows at once, with their bounds; to others one by
    one. A model cannot be built with such a name where flash-attn is missing, but run with it."""

    def __init__(self) -> None:
        self.lengths: tuple[int, ...] = ()
        """Of the packed rows that run next."""
        self._bounds: tuple[Tensor | None, tuple[int, ...]] = (None, ())

    def __call__(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """[1, heads, tokens, values] each; the result has tokens before heads, as transformers wants it."""
        causal = module.is_causal  # the language model's, over rows; the vision tower's is over windows or pictures
        if causal:
            lengths = self.lengths
        else:  # without bounds, transformers has cut them apart itself
            lengths = (query.shape[2],) if cu_seq_lens_q is None else self._lengths_of(cu_seq_lens_q)
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        if starts[-1] != query.shape[2]:
            raise ValueError(f"sequences of {starts[-1]} tokens, but {query.shape[2]} came")
        attend = partial(F.scaled_dot_product_attention, is_causal=causal, scale=scaling, enable_gqa=True)
        pieces = []
        for first, count in _runs(lengths):
            span = slice(starts[first], starts[first + count])
            q, k, v = (_sequences(part[:, :, span], count) for part in (query, key, value))
            pieces.append(attend(q, k, v).transpose(0, 1).flatten(1, 2)[None])
        output = torch.cat(pieces, dim=2)
        return output.transpose(1, 2), None

    def _lengths_of(self, bounds: Tensor) -> tuple[int, ...]:
        """Read from the device once for all layers that get the same tensor."""
        if self._bounds[0] is not bounds:
            self._bounds = (bounds, tuple((bounds[1:] - bounds[:-1]).tolist()))
        return self._bounds[1]


def _runs(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of neighbours of equal length."""
    first = 0
    for number in range(1, len(lengths) + 1):
        if number == len(lengths) or lengths[number] != lengths[first]:
            yield first, number - first
            first = number


def _sequences(tokens_1HKD: Tensor, count: int) -> Tensor:
    """[count, heads, tokens of one, values]."""
    _, heads, tokens, values = tokens_1HKD.shape
    return tokens_1HKD[0].view(heads, count, tokens // count, values).transpose(0, 1)
