"""The optimizer state of checkpoints of older versions, which hold it as it lies in Megatron's buffers.

They were written in Megatron's format `dp_reshardable`, or as its ordinary optimizers write. The first is a list of
buckets: it can only be read under the sizes it was written with (ADR 0005). Such checkpoints are read here, and no
longer written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megatron_vppo.parallel.optimizer_state import is_torch_adam, only_optimizer
from megatron_vppo.parallel.training import Trainable

_METADATA = {"distrib_optim_sharding_type": "dp_reshardable", "chained_optim_avoid_prefix": True}


def buffers_to_read(trainable: Trainable, models: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns the optimizer's state as Megatron's loader takes it.

    Args:
        models: the sharded states of this rank's stages, by Megatron's keys.

    Raises:
        ValueError: a parameter is padded (weights/padding.py), and was not where these buffers were written.
    """
    padded = [
        entry.template
        for stage in trainable.stages
        for entry in stage.weight_map
        if entry.kind.padding(stage.tensor_group(entry).size())
    ]
    if padded:
        raise ValueError(
            f"the checkpoint's optimizer state is that of an older version, which did not pad {padded[0]}; start from "
            "its weights with model.path (a folder that vppo convert makes) and another trainer.experiment_name"
        )
    state: dict[str, Any] = trainable.optimizer.sharded_state_dict(
        dict(models) if len(models) > 1 else models["model"], is_loading=True, metadata=dict(_METADATA)
    )
    return state


@torch.no_grad()
def set_buffers(trainable: Trainable, state: dict[str, Any]) -> None:
    """Sets the optimizer's state to what was loaded, as Megatron does, except for the step counts of torch's Adam.

    Megatron's distributed optimizer (0.16 to 0.19) looks for them among the sharded tensors, where they are not. It
    then gives all parameters one and the same tensor, which the next step would raise once per parameter.
    """
    part = only_optimizer(trainable)
    is_torch = is_torch_adam(part.optimizer)
    sharded = state.pop("param_state", None) if is_torch else None
    trainable.optimizer.load_state_dict(state)
    if not is_torch:
        return
    steps = {main: values.pop("step") for main, values in part.optimizer.state.items()}
    if sharded is not None:
        part.load_parameter_state_from_dp_reshardable(sharded)
    for main, step in steps.items():
        part.optimizer.state[main]["step"] = step.clone()
