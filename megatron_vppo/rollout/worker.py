"""What we add to vLLM's worker: digests of the weights it really computes with, and which of them survive sleep.

vLLM's own `compute_weight_checksums` hashes `named_parameters()`. On CPU that says little: most linear layers hand
their weight to a kernel that keeps a repacked copy, and leave an empty parameter behind. Such weights are read back
through the kernel, by multiplying with the identity (exact: every sum has one non-zero term), and hashed by vLLM's
function.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.online.fp8 import OnlineLinearBase
from vllm.model_executor.model_loader.weight_checksum import compute_tensor_digests

from megatron_vppo.rollout.records import LiveWeight
from megatron_vppo.rollout.transfer import weight_receiver

# vLLM imports this module in every worker, so the backend is known there even where the package is on the path but not
# installed, and its entry point therefore not seen.
weight_receiver.register()

IDENTITY_ROWS = 512
"""Input channels read back at a time."""


class WorkerExtension:
    """Mixed into vLLM's worker by `worker_extension_cls`; called by `LLM.collective_rpc`."""

    _vppo_scratch: tuple[tuple[Tensor, Tensor], ...] = ()
    """Tensors and what they held."""

    def vppo_live_weights(self) -> list[LiveWeight]:
        return [weight for weight, _ in _live_weights(self.model_runner.get_model())]  # type: ignore[attr-defined]

    def vppo_preserve_over_sleep(self, parameters: list[str]) -> None:
        """Keep these over sleep of level 2. vLLM reads the setting whenever it falls asleep; the names are known only
        once the model is loaded.
        """
        self.model_config.sleep_preserve_parameter_names = parameters  # type: ignore[attr-defined]

    def vppo_save_scratch(self) -> list[str]:
        """Before sleep of level 2; returns the names of what is saved.

        vLLM (0.32) itself saves buffers, but not tensors that a model holds as plain attributes: Qwen3-VL's deepstack
        scratch, which has to be zero wherever no picture wrote to it. Woken memory may hold anything.
        """
        scratch = {
            name: tensor
            for name, tensor in unregistered_tensors(self.model_runner.get_model())  # type: ignore[attr-defined]
            if tensor.device.type == self.device.type  # type: ignore[attr-defined]
        }
        self._vppo_scratch = tuple((tensor, tensor.to("cpu", copy=True)) for tensor in scratch.values())
        return list(scratch)

    def vppo_restore_scratch(self) -> None:
        """After the weights' memory is awake."""
        for tensor, saved in self._vppo_scratch:
            tensor.copy_(saved)
        self._vppo_scratch = ()

    @torch.no_grad()
    def vppo_live_digests(self) -> dict[str, str]:
        """sha256 of every live weight that is not quantised, by its key, in the model's dtype."""
        model = self.model_runner.get_model()  # type: ignore[attr-defined]
        dtype = self.model_config.dtype  # type: ignore[attr-defined]
        checksums = {
            name.rsplit(":", 1)[1]: digest
            for name, digest in self.compute_weight_checksums().items()  # type: ignore[attr-defined]
        }
        digests = {}
        for weight, module in _live_weights(model):
            if weight.scales:
                continue
            if weight.repacked:
                digests[weight.key] = _digest(_read_back(module, dtype))
            elif (parameter := model.get_parameter(weight.parameter)).dtype == dtype:
                digests[weight.key] = checksums[weight.parameter]
            else:  # some CPU kernels take their bias in float32
                digests[weight.key] = _digest(parameter.to(dtype))
        return digests


def _live_weights(model: nn.Module) -> Iterator[tuple[LiveWeight, nn.Module]]:
    """Every parameter of the checkpoint once, and every kernel that may hold a copy of its own."""
    first_names: dict[int, str] = {}
    for module_name, module in model.named_modules():
        kv_replicas = getattr(module, "num_kv_head_replicas", 1)
        scales = _scales(module)
        for leaf, parameter in module.named_parameters(recurse=False):
            if leaf in scales:
                continue
            name = f"{module_name}.{leaf}"
            is_first = first_names.setdefault(id(parameter), name) == name
            name = first_names[id(parameter)]
            if is_first and parameter.numel() > 0:
                made = tuple(f"{module_name}.{scale}" for scale in scales) if leaf == "weight" else ()
                yield LiveWeight(name, parameter=name, repacked=False, kv_replicas=kv_replicas, scales=made), module
            if leaf == "weight" and "cpu_linear" in vars(module):
                key = f"{module_name}.{leaf} in its kernel"
                yield LiveWeight(key=key, parameter=name, repacked=True, kv_replicas=kv_replicas), module


def unregistered_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors in attributes of the model's modules, or in lists and tuples there, that are neither parameters nor
    buffers nor views of one; without KV caches.
    """
    owned = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    for module_name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute == "kv_cache":
                continue
            for number, tensor in enumerate(value if isinstance(value, list | tuple) else [value]):
                if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in owned:
                    yield f"{module_name}.{attribute}[{number}]", tensor


def _scales(module: nn.Module) -> tuple[str, ...]:
    """Parameters that vLLM made when it quantised this layer's weight; none of a layer that it did not quantise."""
    if not isinstance(getattr(module, "quant_method", None), OnlineLinearBase):
        return ()
    return tuple(leaf for leaf, _ in module.named_parameters(recurse=False) if leaf not in ("weight", "bias"))


def _read_back(layer: Any, dtype: torch.dtype) -> Tensor:
    """[out, in] weight of a linear layer or output head whose kernel is `cpu_linear`; -0.0 comes back as 0.0."""
    num_inputs = _num_inputs(layer)
    columns = []
    for start in range(0, num_inputs, IDENTITY_ROWS):
        rows = min(IDENTITY_ROWS, num_inputs - start)
        identity = torch.zeros(rows, num_inputs, dtype=dtype)
        identity[torch.arange(rows), torch.arange(start, start + rows)] = 1
        columns.append(layer.cpu_linear(identity, layer.weight, None).T)
    return torch.cat(columns, dim=1) + 0.0


def _num_inputs(layer: Any) -> int:
    if layer.weight.numel() > 0:
        return layer.weight.shape[1]
    return layer.input_size_per_partition if hasattr(layer, "input_size_per_partition") else layer.input_size


def _digest(tensor: Tensor) -> str:
    holder = nn.Module()
    holder.register_parameter("weight", nn.Parameter(tensor, requires_grad=False))
    return compute_tensor_digests(holder)["weight"]
