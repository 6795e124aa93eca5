"""Sizes and process groups of a run: checked once, built once, passed as arguments to everything below.

Megatron still reads its own globals in places (the optimizer, distributed checkpoints). So the groups are those of
Megatron's `parallel_state`, which is filled here and nowhere else.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_vppo.config.choices import VisionSplit
from megatron_vppo.models.vision.image_parallel import VisionGroups
from megatron_vppo.parallel.cpu_support import enable_cpu


@dataclass(frozen=True)
class Layout:
    """The sizes of the run and this rank's place in it.

    rank = ((pipeline_rank * data + data_rank) * context + context_rank) * tensor + tensor_rank
    """

    tensor: int
    context: int
    pipeline: int
    data: int
    """The numbers of ranks along each axis; their product is the number of all ranks."""
    rank: int
    tensor_rank: int
    context_rank: int
    pipeline_rank: int
    data_rank: int
    device: torch.device
    groups: ProcessGroupCollection
    vision_groups: VisionGroups
    vision_split: VisionSplit
    """The split in force. It is 'tensor' if there is one tensor-parallel rank: nothing is split then."""

    @property
    def world_size(self) -> int:
        return self.tensor * self.context * self.pipeline * self.data

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline - 1


def init_layout(
    *,
    tensor: int,
    pipeline: int,
    context: int = 1,
    data: int | None = None,
    virtual_stages: int = 1,
    vision_split: VisionSplit = "tensor",
    device: int | None = None,
    timeout_seconds: float,
) -> Layout:
    """Joins the ranks (environment of torchrun or srun, or a world of one) and builds the process groups.

    Ranks talk over gloo on machines without CUDA and over NCCL with CUDA. A default group that exists already is used
    as it is.

    Args:
        data: the data-parallel size. None: the number of ranks divided by the other sizes.
        virtual_stages: pipeline stages that each rank holds.
        vision_split: see ModelOptions.
        device: the number of this rank's GPU among those that it sees. None: that of LOCAL_RANK, where there are any.
        timeout_seconds: the time that a collective waits for the slowest rank before the run fails.

    Raises:
        ValueError: the product of the sizes is not the number of ranks.
    """
    on_cpu = enable_cpu()
    if not on_cpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) if device is None else device)
    if not dist.is_initialized():
        _init_default_group(on_cpu=on_cpu, timeout=timedelta(seconds=timeout_seconds))
    world = dist.get_world_size()
    replica = tensor * context * pipeline
    if world % replica or data not in (None, world // replica):
        raise ValueError(
            f"tensor {tensor} x context {context} x pipeline {pipeline} x data {'any' if data is None else data} does "
            f"not fit {world} ranks; start {replica * (data or 1)} ranks (or a multiple, with data left open), or "
            "change the parallel sizes"
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual_stages if virtual_stages > 1 else None,
        context_parallel_size=context,
    )
    if not on_cpu:
        model_parallel_cuda_manual_seed(1234)  # only the trackers' names matter: the models have no dropout
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return Layout(
        tensor=tensor,
        context=context,
        pipeline=pipeline,
        data=world // replica,
        rank=dist.get_rank(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        context_rank=parallel_state.get_context_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        data_rank=parallel_state.get_data_parallel_rank(),
        device=torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device()),
        groups=groups,
        vision_groups=_vision_groups(groups, vision_split),
        vision_split="tensor" if tensor == 1 else vision_split,
    )


def _vision_groups(groups: ProcessGroupCollection, split: VisionSplit) -> VisionGroups:
    if groups.cp.size() == 1 and (split == "tensor" or groups.tp.size() == 1):
        return VisionGroups(tower=groups, images=groups.cp, gradients=groups.cp)
    # With 'tensor' the tower is split over the tensor-parallel ranks as the language model is, and the context-parallel
    # ranks share the images. With 'images' every rank holds a whole tower, and all ranks of a replica's stage share the
    # images. Either way each image is seen by one tower, whose context-parallel group is therefore a single rank.
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    tower = copy.copy(groups)
    tower.cp = alone
    if split == "images":
        tower.tp = alone
    return VisionGroups(tower=tower, images=groups.cp if split == "tensor" else groups.tp_cp, gradients=groups.cp)


def destroy_layout() -> None:
    """Destroys the process groups, the default one included; a new layout may follow."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def single_rank(*, backend: Literal["gloo", "nccl"] | None = None) -> Iterator[Layout]:
    """Gives this process a layout of its own, whatever a launcher has set; it is given back at the end of the block.

    Args:
        backend: the backend of the process groups; None: NCCL with CUDA, Gloo without.
    """
    chosen = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    _init_world_of_one(chosen, timeout=timedelta(seconds=60))
    try:
        yield init_layout(tensor=1, pipeline=1, timeout_seconds=60)
    finally:
        destroy_layout()


def _init_default_group(*, on_cpu: bool, timeout: timedelta) -> None:
    backend = "gloo" if on_cpu else "nccl"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        _init_world_of_one(backend, timeout=timeout)


def _init_world_of_one(backend: str, *, timeout: timedelta) -> None:
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
