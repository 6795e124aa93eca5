"""The optimizer's numbers of each parameter, wherever Megatron's optimizers keep them.

Three of Megatron's optimizers (0.16 to 0.19) occur. Each gives torch's or a fused Adam other tensors to step on:

    FP32Optimizer                       the model's own parameters, whole
    Float16OptimizerWithFloat16Params   fp32 copies of the parameters, whole
    DistributedOptimizer                this rank's range of each parameter: in bfloat16 an fp32 copy of it, in float32
                                        a view of the parameter. A rank has no range of some parameters

Nothing else reads where these optimizers keep them: the groups and `gbuf_ranges` below are not documented by Megatron.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor
from torch.nn import Parameter

from megatron_vppo.parallel.training import Trainable

MOMENTS = ("exp_avg", "exp_avg_sq")
MAIN = "fp32_param"
"""The name of the weights that the optimizer steps on, where they are not the model's own."""


@dataclass(frozen=True)
class HeldState:
    """A range of one parameter's values whose optimizer state this rank holds."""

    parameter: Parameter
    start: int
    """The place of the range's first value among the parameter's values, row by row."""
    flat: Mapping[str, Tensor]
    """fp32 [values of the range] by name: MOMENTS, and MAIN where there is one. Views of the optimizer's memory."""

    @property
    def stop(self) -> int:
        """The place after the range's last value."""
        return self.start + self.flat[MOMENTS[0]].numel()


def held_states(trainable: Trainable) -> list[HeldState]:
    """Returns this rank's part of the state, which `allocate_state` has made; the same order on every replica."""
    part = only_optimizer(trainable)
    held = []
    for parameter, main, start in _main_parameters(part):
        moments = part.optimizer.state[main]
        flat = {name: moments[name].view(-1) for name in MOMENTS}
        if main.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr():
            flat[MAIN] = main.detach().view(-1)
        held.append(HeldState(parameter, start, flat))
    return held


def allocate_state(trainable: Trainable) -> None:
    """Allocates what the first update would, so that a checkpoint can be written and read; existing state stays.

    Megatron would do so when it loads its own formats, and would leave out the step count of torch's Adam.
    """
    adam = only_optimizer(trainable).optimizer
    if adam is None:
        return
    for group in adam.param_groups:
        for main in group["params"]:
            if adam.state[main]:
                continue
            adam.state[main] = {name: torch.zeros_like(main) for name in MOMENTS}
            if is_torch_adam(adam):
                adam.state[main]["step"] = torch.zeros((), dtype=torch.float32)


def updates_of(trainable: Trainable) -> int:
    """Returns the number of updates that the moments come from; a collective over all ranks.

    It is the same for all parameters: each update steps all that are trained, those without a gradient too.
    """
    adam = only_optimizer(trainable).optimizer
    counts: list[set[int]] = [set()] * dist.get_world_size()
    dist.all_gather_object(counts, set() if adam is None else _step_counts(adam))
    found = set().union(*counts)
    assert len(found) <= 1, f"parameters have different numbers of updates: {sorted(found)}"
    return next(iter(found), 0)


def set_updates(trainable: Trainable, updates: int) -> None:
    """Sets the number of updates that the moments come from, by which Adam corrects their bias."""
    adam = only_optimizer(trainable).optimizer
    if adam is None:
        return
    if is_torch_adam(adam):
        for moments in adam.state.values():
            moments["step"].fill_(updates)
    elif updates:  # a fused Adam counts from its first update on
        for group in adam.param_groups:
            group["step"] = updates


def only_optimizer(trainable: Trainable) -> Any:
    """Returns the only optimizer: Megatron chains one optimizer per kind of parameter; a dense model has one.

    Its `optimizer`, the Adam, is None on a rank that trains nothing.
    """
    (optimizer,) = getattr(trainable.optimizer, "chained_optimizers", [trainable.optimizer])
    return optimizer


def is_torch_adam(adam: torch.optim.Optimizer | None) -> bool:
    """Returns True for torch's Adam, which counts the updates of each parameter; the fused ones count per group."""
    return isinstance(adam, torch.optim.Adam | torch.optim.AdamW)


def _step_counts(adam: torch.optim.Optimizer) -> set[int]:
    if is_torch_adam(adam):
        return {int(moments["step"]) for moments in adam.state.values()}
    return {int(group["step"]) for group in adam.param_groups if group["params"] and "step" in group}


def _main_parameters(part: Any) -> Iterator[tuple[Parameter, Tensor, int]]:
    """Yields each parameter with what Adam steps on in its place, and where in the parameter that begins."""
    if part.optimizer is None:
        return
    if isinstance(part, DistributedOptimizer):
        starts = {
            parameter: ranges["param"].start
            for by_dtype in part.gbuf_ranges
            for buckets in by_dtype.values()
            for bucket in buckets
            for parameter, ranges in bucket["param_map"].items()
        }
        for parameters, mains in (
            *zip(part.model_fp32_groups, part.shard_fp32_groups, strict=True),
            *zip(part.model_float16_groups, part.shard_fp32_from_float16_groups, strict=True),
        ):
            for parameter, main in zip(parameters, mains, strict=True):
                yield parameter, main, starts[parameter]
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        for parameters, mains in (
            *((group, group) for group in part.fp32_from_fp32_groups),
            *zip(part.float16_groups, part.fp32_from_float16_groups, strict=True),
        ):
            for parameter, main in zip(parameters, mains, strict=True):
                yield parameter, main, 0
    else:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter, parameter, 0
