"""The same scoring and update as in the authors' code, on one device.

Their public repository, huaixuheqing/VPPO-RL, shows it in verl/workers/actor/dp_actor.py and
verl/workers/fsdp_workers.py, with EasyR1's log-prob helper in verl/utils/torch_functional.py:

- transformers' model on packed rows with flash attention; each row has its own copy of its image;
- logits of every position in the model's dtype, divided in place by the temperature, then their compiled float32
  cross-entropy;
- each view scored in a pass of its own;
- gradient checkpointing of every layer, float32 master weights, fused AdamW.

Two things are left out and cost nothing here: FSDP, which on one device only copies, and moving pixels to the device.

Shape suffix legend: K = packed tokens of all rows; N = response tokens; B = responses; T = response tokens,
right-padded; V = vocabulary rows; P = patches; D = values of one patch; H = attention heads; E = values per attention
head; L = tokens of one packed sequence.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
    """A micro-batch of packed rows."""

    rows: tuple[int, ...]
    token_ids_1K: Tensor
    positions_41K: Tensor
    """Four position numbers per token: the text's, from 0 in each row, then (frame, row, column)."""
    lengths: tuple[int, ...]
    pixels_PD: Tensor
    grids: Tensor
    """int64 [images, 3]: the frames, rows and columns of each patch grid."""
    predicting_N: Tensor
    """The indices into K whose logits predict a response token."""
    row_N: Tensor
    column_N: Tensor
    """The place of each response token in [B, T]."""


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
        """Computes the log-probs of all response tokens, [B, T], in two passes: original and perturbed images."""
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
        """Takes one optimizer step and returns the gradient norm."""
        names = ("old_logp_BT", "advantage_BT", "pg_weight_BT", "entropy_weight_BT")
        batch = replace(batch, **{name: getattr(batch, name).to(self._device) for name in names})
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
            image_grid_thw=batch.grids,
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
    """Returns transformers' name of the attention: flash attention, as theirs, if flash-attn is installed."""
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
    patches = [workload.patches(response.prompt.images[0], None) for response in responses]
    images = [workload.values(image.bytes_PD) for image in patches]
    return PackedRows(
        rows=tuple(rows),
        token_ids_1K=torch.tensor([token for tokens in sequences for token in tokens], device=device)[None],
        positions_41K=torch.cat(positions, dim=1)[:, None].to(device),
        lengths=tuple(len(tokens) for tokens in sequences),
        pixels_PD=torch.cat(images).to(device),
        grids=torch.tensor([response.prompt.grids_thw[0] for response in responses], device=device),
        predicting_N=torch.cat(places).to(device),
        row_N=torch.cat(row_numbers).to(device),
        column_N=torch.cat(columns).to(device),
    )


class SequenceAttention:
    """Attention for environments without flash-attn: torch's own, which uses flash kernels on a GPU.

    It runs on each packed row, and on all windows of one length together. No token sees another sequence, and nothing
    is padded.
    """

    NAME = "by_sequence"
    """A name that transformers does not know, so that it makes no mask."""
    VISION_NAME = "flash_by_sequence"
    """A name with 'flash' in it. The vision tower then passes all windows at once with their bounds, otherwise one by
    one. Without flash-attn a model cannot be built under such a name, but it can be run under it."""

    def __init__(self) -> None:
        self.lengths: tuple[int, ...] = ()
        """The lengths of the packed rows that run next."""
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
        """Takes [1, heads, tokens, values] each. The result has tokens before heads, as transformers expects."""
        # True in the language model, over rows; False in the vision tower, over windows or images.
        causal = module.is_causal
        if causal:
            lengths = self.lengths
        else:  # without bounds, transformers has already cut the windows apart
            lengths = (query.shape[2],) if cu_seq_lens_q is None else self._lengths_of(cu_seq_lens_q)
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        if starts[-1] != query.shape[2]:
            raise ValueError(f"the sequences have {starts[-1]} tokens, but the query has {query.shape[2]}")
        attend = partial(F.scaled_dot_product_attention, is_causal=causal, scale=scaling, enable_gqa=True)
        pieces = []
        for first, count in _runs(lengths):
            span = slice(starts[first], starts[first + count])
            q, k, v = (_sequences(part[:, :, span], count) for part in (query, key, value))
            pieces.append(attend(q, k, v).transpose(0, 1).flatten(1, 2)[None])
        output = torch.cat(pieces, dim=2)
        return output.transpose(1, 2), None

    def _lengths_of(self, bounds: Tensor) -> tuple[int, ...]:
        """Reads bounds from the device, once for all layers that get the same tensor."""
        if self._bounds[0] is not bounds:
            self._bounds = (bounds, tuple((bounds[1:] - bounds[:-1]).tolist()))
        return self._bounds[1]


def _runs(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yields (first, count) for each run of neighbours of equal length."""
    first = 0
    for number in range(1, len(lengths) + 1):
        if number == len(lengths) or lengths[number] != lengths[first]:
            yield first, number - first
            first = number


def _sequences(tokens_1HKE: Tensor, count: int) -> Tensor:
    """Cuts packed sequences of equal length apart: [count, heads, tokens of one, values per head]."""
    _, heads, tokens, values = tokens_1HKE.shape
    return tokens_1HKE[0].view(heads, count, tokens // count, values).transpose(0, 1)
