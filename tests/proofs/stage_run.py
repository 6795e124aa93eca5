"""One rank of the comparison with transformers: load, run the schedule, return log-probs and gradients."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from torch import Tensor
from transformers import AutoConfig

from megatron_vppo.models.build import build_model
from megatron_vppo.models.language.mrope import mrope_positions
from megatron_vppo.models.layers.packed import PackedBatch
from megatron_vppo.models.layers.packing import Packing
from megatron_vppo.models.options import ModelOptions
from megatron_vppo.models.qwen_vl import QwenVLModel
from megatron_vppo.models.vision.tower_run import TowerRun
from megatron_vppo.parallel.layout import Layout
from megatron_vppo.weights.entries import stage_entries
from megatron_vppo.weights.load_hf import load_hf_weights
from tests.models.tiny import GRIDS, IMAGE, MERGE, Row, make_pixels, make_rows

PACKED = ((3,), (1, 0, 2), (5, 4), (1,))
"""Rows of each micro-batch: text alone first, text between images, an image in two rows of one micro-batch."""
ONE_BY_ONE = tuple((row,) for row in range(6))


@dataclass(frozen=True)
class StageResult:
    hidden: dict[int, Tensor]
    """By row; last stage only, like log-probs."""
    logps: dict[int, Tensor]
    gradients: dict[str, Tensor]
    """By entry template and layer, of this rank's parameters."""
    problems: list[str]


def pack(rows: list[Row], pixels: dict[str, Tensor]) -> tuple[PackedBatch, Tensor | None]:
    names = list(dict.fromkeys(name for row in rows for name in row.images))
    features, offset = {}, 0
    for name in names:
        count = pixels[name].shape[0] // MERGE**2
        features[name] = torch.arange(offset, offset + count)
        offset += count
    ids = torch.tensor([token for row in rows for token in row.token_ids])
    positions = [
        mrope_positions(row.token_ids, [GRIDS[n] for n in row.images], image_token_id=IMAGE, merge_size=MERGE)
        for row in rows
    ]
    filled = [features[name] for row in rows for name in row.images]
    batch = PackedBatch(
        token_ids_K=ids,
        positions_3K=torch.cat(positions, dim=1),
        packing=Packing(tuple(len(row.token_ids) for row in rows)),
        image_token_index_I=(ids == IMAGE).nonzero()[:, 0],
        image_feature_index_I=torch.cat(filled) if filled else torch.zeros(0, dtype=torch.int64),
        runs=(TowerRun(tuple(GRIDS[name] for name in names)),) if names else (),
    )
    return batch, torch.cat([pixels[name] for name in names]) if names else None


def load(folder: Path, layout: Layout, *, dtype: torch.dtype = torch.float32, **options: Any) -> QwenVLModel:
    config = AutoConfig.from_pretrained(folder)
    model = build_model(
        config,
        groups=layout.groups,
        vision_groups=layout.vision_groups,
        dtype=dtype,
        device=layout.device,
        options=ModelOptions(**options),
    )
    load_hf_weights(model, folder)
    return model


def run(
    model: QwenVLModel, micro_batches: tuple[tuple[int, ...], ...], *, vocab: int, repeats: dict[int, int]
) -> StageResult:
    """One forward and backward pass of all micro-batches; `repeats` counts how often each row occurs among them."""
    rows, pixels = make_rows(), make_pixels()
    hidden: dict[int, Tensor] = {}
    logps: dict[int, Tensor] = {}

    def loss(members: tuple[int, ...], output_T1h: Tensor) -> tuple[Tensor, dict]:
        total = output_T1h.new_zeros(())
        start = 0
        for member in members:
            row = rows[member]
            out = output_T1h[start : start + len(row.token_ids), 0]
            start += len(row.token_ids)
            logp = _logps(model, out, row, vocab=vocab)
            hidden[member], logps[member] = out.detach(), logp.detach()
            total = total + (row.weights * logp).sum() / repeats[member]
        return total * len(micro_batches), {}  # the schedule divides by their number

    def step(batches: Iterator[tuple[tuple[int, ...], tuple[PackedBatch, Tensor | None]]], stage: QwenVLModel) -> Any:
        members, (batch, pixels_PD) = next(batches)
        return stage(stage.plan(batch), pixels_PD), functools.partial(loss, members)

    data = [(members, pack([rows[m] for m in members], pixels)) for members in micro_batches]
    model.zero_grad(set_to_none=True)
    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(data),
        model=[model],
        num_microbatches=len(data),
        seq_length=1,
        micro_batch_size=1,
        forward_only=False,
    )
    _sum_tied(model)
    _sum_qk_norms(model)
    return StageResult(hidden, logps, _gradients(model), _problems(model, vocab))


def _logps(model: QwenVLModel, hidden: Tensor, row: Row, *, vocab: int) -> Tensor:
    group = model.groups.tp
    local = copy_to_tensor_model_parallel_region(hidden[:-1], group=group) @ model.head_weight_Vh().T
    logits = gather_from_tensor_model_parallel_region(local, group=group)[:, :vocab]
    return logits.log_softmax(-1).gather(1, torch.tensor(row.token_ids[1:])[:, None])[:, 0]


def _sum_tied(model: QwenVLModel) -> None:
    apart = len(model.stage_layers) > 1 and model.share_embeddings_and_output_weights
    if apart and (model.pre_process or model.post_process):
        weight = model.shared_embedding_or_output_weight()
        assert weight is not None
        dist.all_reduce(weight.grad, group=model.groups.embd)


def _sum_qk_norms(model: QwenVLModel) -> None:
    """Each rank's heads pass through the same norm; Megatron's `finalize_model_grads` sums what they give it."""
    for name, parameter in model.named_parameters():
        if "q_layernorm" in name or "k_layernorm" in name:
            dist.all_reduce(parameter.grad, group=model.groups.tp)


def _gradients(model: QwenVLModel) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    entries = stage_entries(model.weight_map, stage_layers=model.stage_layers, stage=model.stage)
    found = {}
    for entry in entries:
        gradient = parameters.pop(entry.local_name(model.stage_layers)).grad
        assert gradient is not None, entry
        found[f"{entry.template} {entry.layer}"] = gradient
    assert not parameters
    return found


def _problems(model: QwenVLModel, vocab: int) -> list[str]:
    """Checks what Megatron's optimizer relies on: marks of split parameters, equal tied weights, zero padding rows."""
    problems = []
    parameters = dict(model.named_parameters())
    for entry in stage_entries(model.weight_map, stage_layers=model.stage_layers, stage=model.stage):
        parameter = parameters[entry.local_name(model.stage_layers)]
        if getattr(parameter, "tensor_model_parallel", False) != (entry.kind.partition_dim is not None):
            problems.append(f"{entry.template}: wrongly marked as split or whole")
        if zeros := entry.kind.padding(model.tensor_group(entry).size()):
            assert entry.kind.partition_dim is not None and parameter.grad is not None
            for tensor in (parameter, parameter.grad):
                for block in tensor.chunk(entry.kind.partition_stride, dim=entry.kind.partition_dim):
                    if bool(block.narrow(entry.kind.partition_dim, -zeros, zeros).any()):
                        problems.append(f"{entry.template}: padding is not zero, or has a gradient")
        if "word_embeddings" in entry.template or "output_layer" in entry.template:
            start = model.groups.tp.rank() * parameter.shape[0]
            padding = parameter[max(vocab - start, 0) :], parameter.grad[max(vocab - start, 0) :]  # type: ignore[index]
            if any(bool(p.any()) for p in padding):
                problems.append(f"{entry.template}: padding rows are not zero, or have a gradient")
    if model.share_embeddings_and_output_weights and len(model.stage_layers) > 1:
        weight = model.shared_embedding_or_output_weight()
        assert weight is not None
        both = [torch.empty_like(weight) for _ in range(2)]
        dist.all_gather(both, weight.detach(), group=model.groups.embd)
        if not torch.equal(*both):
            problems.append("embedding and tied output weight differ")
        if getattr(weight, "shared", False) != model.post_process:
            problems.append("the tied output weight counts in gradient norms, or the embedding does not")
    return problems
