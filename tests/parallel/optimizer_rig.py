"""Optimizer state as it is, whole and under Hugging Face names, found without the code that writes it.

Megatron's own accessors say where a rank's range of a parameter lies, the ranges are added up over the ranks, and the
export of weights joins what tensor parallelism cut.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vppo.parallel.policy import MegatronPolicy

QUANTITIES = ("param", "exp_avg", "exp_avg_sq")
"""Megatron's names; 'param' are the weights that Adam steps on."""


def whole_state(policy: MegatronPolicy) -> dict[str, dict[str, Tensor]]:
    """The three quantities in fp32, whole. A collective over all ranks, as the others here."""
    return {quantity: optimizer_values(policy, quantity) for quantity in QUANTITIES}


def update_counts(policy: MegatronPolicy) -> set[float]:
    """Torch's step counts of this rank; one tensor for each parameter."""
    (part,) = policy.trainable.optimizer.chained_optimizers
    steps = [] if part.optimizer is None else [values["step"] for values in part.optimizer.state.values()]
    assert len({id(step) for step in steps}) == len(steps), "a step would raise the same tensor several times"
    return {float(step) for step in steps}


def optimizer_values(policy: MegatronPolicy, quantity: str) -> dict[str, Tensor]:
    """One quantity of it, by Hugging Face name; that of a frozen part is zero."""
    # Other parameters take the places of the model's while the weights are exported. Its own are left alone: one whose
    # dtype had changed for a while would not get the same gradients afterwards.
    places = [
        (module, name, parameter)
        for stage in policy.trainable.stages
        for module in stage.modules()
        for name, parameter in module.named_parameters(recurse=False)
    ]
    values = [torch.nn.Parameter(_whole(policy, parameter, quantity)) for _, _, parameter in places]
    for (module, name, _), value in zip(places, values, strict=True):
        setattr(module, name, value)
    exported = {name: tensor.clone() for name, tensor in policy.hf_weights()}
    for module, name, parameter in places:
        setattr(module, name, parameter)
    return exported


def _whole(policy: MegatronPolicy, parameter: Any, quantity: str) -> Tensor:
    (part,) = policy.trainable.optimizer.chained_optimizers
    whole = torch.zeros(parameter.shape, dtype=torch.float32)
    if not parameter.requires_grad:
        return whole
    if policy.trainable.settings.use_distributed_optimizer:
        if parameter in part.model_param_gbuf_map:
            own = part._get_model_param_range_map(parameter)["param"]
            whole.view(-1)[own.start : own.end] = part._get_main_param_and_optimizer_states(parameter)[quantity]
        dist.all_reduce(whole, group=policy.layout.groups.dp_cp)
        return whole
    main = getattr(parameter, "main_param", parameter)
    return whole.copy_(main.detach() if quantity == "param" else part.optimizer.state[main][quantity])
