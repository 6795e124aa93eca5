"""The largest micro-batch of an update, forward and backward on the meta device, and the bytes that it keeps.

What runs is the run's own code: packer, stages in Megatron's wrappers, vocabulary head. Only the schedule does not: a
pipeline stage gets hidden states of the right shape instead of those of the stage before it.

Shape suffix legend: K = all packed tokens of a micro-batch; C = tokens of this context-parallel rank; S = those of C
that a rank holds between layers; I = image tokens among K; N = response tokens that this rank predicts; P = patches; D
= values of one patch; h = hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vppo.algorithm.types import PerturbKey, Response
from megatron_vppo.config.choices import PerturbUnit
from megatron_vppo.launching.fake_world import META
from megatron_vppo.parallel.batching import ResponseBatch, ResponseTokens, View, views_of
from megatron_vppo.parallel.layout import Layout
from megatron_vppo.parallel.micro_batches import Reading, Rows, packed_tokens
from megatron_vppo.parallel.schedule import ScheduleRunner
from megatron_vppo.parallel.training import Trainable
from megatron_vppo.planning.activations import MicroBatch


@dataclass(frozen=True)
class StepBytes:
    """The bytes of one micro-batch on one rank, for each of its pipeline stages (several with virtual stages)."""

    kept: tuple[int, ...]
    """Kept from the forward to the backward pass. Parameters and their gradients are not counted."""
    output: tuple[int, ...]
    """The hidden states that leave the stage."""
    batch: MicroBatch
    """The tokens and patches of this rank; `tokens` are those of all context-parallel ranks."""


def update_views(runner: ScheduleRunner, responses: Sequence[Response], *, per: PerturbUnit | None) -> list[View]:
    """Returns the views of this rank's largest micro-batch of an update; see score_views."""
    micro_batches = runner.update_micro_batches(responses, both_views=per is not None)
    return _views_of_largest(runner, responses, micro_batches, per=per)


def score_views(
    runner: ScheduleRunner, responses: Sequence[Response], *, per: PerturbUnit | None, to_end: bool
) -> list[View]:
    """Returns the views of this rank's largest micro-batch of scoring: its rows, and the rows with perturbed images.

    Args:
        per: the rows that have a perturbed view in common; None: no perturbed view is read.
        to_end: see View.
    """
    micro_batches = runner.scoring_micro_batches(responses, both_views=per is not None, to_end=to_end)
    return _views_of_largest(runner, responses, micro_batches, per=per, to_end=to_end)


def _views_of_largest(
    runner: ScheduleRunner,
    responses: Sequence[Response],
    micro_batches: Sequence[Rows],
    *,
    per: PerturbUnit | None,
    to_end: bool = False,
) -> list[View]:
    rows = _largest(responses, micro_batches, runner.reading(both_views=per is not None))
    keys = [None if per is None else PerturbKey.of(response, 1, per=per) for response in responses]
    return views_of(rows, keys, to_end=to_end)


def _largest(responses: Sequence[Response], micro_batches: Sequence[Rows], reading: Reading) -> Rows:
    """Returns the micro-batch with the most tokens, and among equals that with the most images."""

    def size(rows: Rows) -> tuple[int, int]:
        groups = {responses[row].group_id for row in rows}
        return packed_tokens(responses, rows, reading=reading), len(groups)

    return max(micro_batches, key=size)


def sizes_of(batch: ResponseBatch, layout: Layout) -> MicroBatch:
    """Counts the tokens of a packed micro-batch, and the patches of the images that this rank runs the tower on."""
    packed = batch.packed
    patches = 0
    for run in packed.runs if layout.is_first_stage else ():
        assert run.images_of_ranks is not None, "the packer assigns images"
        own_images = run.images_of_ranks[layout.vision_groups.images.rank()]
        patches += sum(math.prod(run.grids_thw[image]) for image in own_images)
    return MicroBatch(
        tokens=packed.token_ids_K.numel(),
        response_tokens=batch.tokens.target_N.numel(),
        image_tokens=packed.image_token_index_I.numel(),
        patches=patches,
    )


def run_step(
    trainable: Trainable, layout: Layout, runner: ScheduleRunner, responses: Sequence[Response], views: Sequence[View]
) -> StepBytes:
    """Runs the micro-batch through this rank's stages; call it within `meta_device`."""
    batch = runner.packer.pack(responses, views, limit=runner.update_limit)
    planned, pixels_PD = runner.send(runner.plan(batch))
    kept, outputs = [], []
    for stage, ddp in zip(trainable.stages, trainable.ddps, strict=True):
        if not stage.pre_process:
            stage.set_input_tensor([_received_S1h(batch, layout, runner, dtype=stage.config.params_dtype)])
        not_counted = [*stage.parameters(), *stage.buffers()]
        with _saved_storages(not_counted) as storages:
            hidden = ddp(planned.stage, pixels_PD.to(META))
        kept.append(sum(storage.nbytes() for storage in storages.values()))
        outputs.append(hidden.untyped_storage().nbytes())
        if not hidden.requires_grad:
            continue
        if stage.post_process:
            _loss(planned.tokens, hidden, runner).backward()
        else:
            hidden.backward(torch.empty_like(hidden))
    return StepBytes(tuple(kept), tuple(outputs), sizes_of(batch, layout))


def _received_S1h(batch: ResponseBatch, layout: Layout, runner: ScheduleRunner, *, dtype: torch.dtype) -> Tensor:
    """Makes what the stage before would have sent."""
    config = runner.stages[0].config
    ranks = layout.context * (layout.tensor if config.sequence_parallel else 1)
    tokens = batch.packed.token_ids_K.numel() // ranks
    return torch.empty(tokens, 1, config.hidden_size, dtype=dtype, device=META, requires_grad=True)


def _loss(tokens: ResponseTokens, hidden_C1h: Tensor, runner: ScheduleRunner) -> Tensor:
    """Sums log-probs and entropies of the response tokens: what every loss of a run is made of."""
    logp_N, entropy_N = runner.vocab_head(trained=True).token_logps(
        tokens.predicting(hidden_C1h), tokens.target_N, with_entropy=True
    )
    assert entropy_N is not None
    return logp_N.sum() + entropy_N.sum()


@contextmanager
def _saved_storages(not_counted: Sequence[Tensor]) -> Iterator[dict[int, torch.UntypedStorage]]:
    """Collects the memory on meta that autograd saves within the block, each storage once."""
    own = {id(tensor.untyped_storage()) for tensor in not_counted}
    storages: dict[int, torch.UntypedStorage] = {}  # holds them, so that no id is used twice

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.device == META and id(storage) not in own:
            storages[id(storage)] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        yield storages
