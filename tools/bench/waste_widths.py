"""Bar 9 of waste.py: the widths of matrix products, for every released model and every tensor-parallel size.

An update runs on the meta device, at the sizes of one rank. Tensor cores read rows that begin at multiples of 16 bytes,
which are 8 values in bfloat16: so the distance between rows of every operand and result has to be a multiple of 8.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.our_way import OPTIM
from bench.waste_bars import Bar, Case
from bench.waste_policy import Images, make_settings
from bench.workload import with_layers
from megatron_vppo.algorithm.types import ImageRef, Prompt, Response
from megatron_vppo.config.schema import ParallelConfig
from megatron_vppo.launching.fake_world import META, fake_rank, meta_device
from megatron_vppo.launching.meta_step import run_step, update_views
from megatron_vppo.models.build import build_model
from megatron_vppo.models.hf_config import HfConfig
from megatron_vppo.models.megatron_config import check_tensor_parallel
from megatron_vppo.parallel.schedule import ScheduleRunner
from megatron_vppo.parallel.training import make_trainable
from megatron_vppo.planning.published import PUBLISHED, published_config

MULTIPLE = 8
"""Values."""
TENSOR_SIZES = (1, 2, 4, 8)
GRID = (1, 16, 16)
_PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "_scaled_mm"}


def widths() -> list[Bar]:
    """Counts bar 9."""
    odd = {
        f"{name}, TP{tensor}": odd_widths(published_config(name), tensor=tensor)
        for name in PUBLISHED
        for tensor in TENSOR_SIZES
        if _can_be_split(published_config(name), tensor)
    }
    cases = tuple(Case(name, len(found), 0) for name, found in odd.items())
    where = {name: found for name, found in odd.items() if found}
    return [Bar(9, f"Widths of matrix products that are no multiple of {MULTIPLE}", cases, where)]


def _can_be_split(config: HfConfig, tensor: int) -> bool:
    try:
        check_tensor_parallel(config, tensor=tensor, vision_split="tensor")
    except ValueError:
        return False
    return True


def odd_widths(config: HfConfig, *, tensor: int) -> list[int]:
    """Lists the distances between rows that are no multiple of 8, in an update of one response."""
    taps = len(getattr(config.vision_config, "deepstack_visual_indexes", ()))
    config = with_layers(config, max(1, taps))  # the layers are alike
    parallel = ParallelConfig(tensor_model_parallel_size=tensor)
    with fake_rank(parallel, rank=0, world_size=tensor) as layout, meta_device():
        shared = {"groups": layout.groups, "vision_groups": layout.vision_groups}
        stage = build_model(config, dtype=torch.bfloat16, device=META, **shared)
        runner = ScheduleRunner(
            [stage],
            hf_config=config,
            layout=layout,
            settings=make_settings("image"),
            pixels=Images(config.vision_config.patch_size, GRID),
        )
        trainable = make_trainable([stage], layout=layout, settings=OPTIM, dtype=torch.bfloat16)
        responses = [_response(config)]
        products = _Products()
        with products:
            run_step(trainable, layout, runner, responses, update_views(runner, responses, per=None))
    assert products.row_distances, "no product was seen"
    return sorted(distance for distance in products.row_distances if distance % MULTIPLE)


def _response(config: HfConfig) -> Response:
    image_tokens = math.prod(GRID) // config.vision_config.spatial_merge_size**2
    ids = (config.image_token_id,) * image_tokens + (7,) * 8
    prompt = Prompt("train", 0, "", "", ids, (), (ImageRef("train", 0, 0),), (GRID,))
    return Response(prompt, 0, 0, (8,) * 8, (0.0,) * 8, "stop", 0)


class _Products(TorchDispatchMode):
    """Collects the distances between the rows of all operands and results of matrix products, in values."""

    def __init__(self) -> None:
        super().__init__()
        self.row_distances: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in _PRODUCTS:
            matrices = [leaf for leaf in tree_leaves((args, results)) if isinstance(leaf, Tensor) and leaf.dim() > 1]
            self.row_distances |= {row_distance(matrix) for matrix in matrices}
        return results


def row_distance(matrix: Tensor) -> int:
    """Returns the values from the beginning of a row to that of the next, whichever of the last two dimensions is the
    row. A single row has none: 0."""
    (rows, columns), strides = matrix.shape[-2:], matrix.stride()[-2:]
    if min(rows, columns) < 2:
        return 0
    return max(strides)
