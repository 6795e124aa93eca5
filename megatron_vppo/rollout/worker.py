"""Our extension of vLLM's worker: digests of the weights that it really computes with, and weights that survive sleep.

vLLM's own `compute_weight_checksums` hashes `named_parameters()`. On CPU that is not enough: most linear layers hand
their weight to a kernel, which keeps a repacked copy, and leave an empty parameter behind. Such a weight is read back
by multiplying the identity with it, which is exact because every sum has one term that is not zero. vLLM's function
then hashes it.
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

# vLLM imports this module in every worker. So the backend is known there also if this package is on the path without
# being installed, and vLLM does not see its entry point.
weight_receiver.register()

IDENTITY_ROWS = 512
"""The number of input channels that are read back at a time."""


class WorkerExtension:
    """A mixin of vLLM's worker (`worker_extension_cls`); its methods are called by `LLM.collective_rpc`."""

    _vppo_scratch: tuple[tuple[Tensor, Tensor], ...] = ()
    """Pairs of a tensor and a copy of its values."""

    def vppo_live_weights(self) -> list[LiveWeight]:
        return [weight for weight, _ in _live_weights(self.model_runner.get_model())]  # type: ignore[attr-defined]

    def vppo_preserve_over_sleep(self, parameters: list[str]) -> None:
        """Keeps these parameters over sleep of level 2.

        vLLM reads the setting whenever it falls asleep, so it can be set now, when the names are known.
        """
        self.model_config.sleep_preserve_parameter_names = parameters  # type: ignore[attr-defined]

    def vppo_save_scratch(self) -> list[str]:
        """Saves tensors that vLLM would lose in sleep of level 2, and returns their names.

        vLLM 0.32 saves buffers, but not tensors that a model holds as plain attributes. Qwen3-VL's deepstack scratch is
        one: it has to be zero wherever no image wrote to it, and memory that was asleep may hold anything.
        """
        scratch = {
            name: tensor
            for name, tensor in unregistered_tensors(self.model_runner.get_model())  # type: ignore[attr-defined]
            if tensor.device.type == self.device.type  # type: ignore[attr-defined]
        }
        self._vppo_scratch = tuple((tensor, tensor.to("cpu", copy=True)) for tensor in scratch.values())
        return list(scratch)

    def vppo_restore_scratch(self) -> None:
        """Restores the saved tensors, once the memory of the weights is awake."""
        for tensor, saved in self._vppo_scratch:
            tensor.copy_(saved)
        self._vppo_scratch = ()

    @torch.no_grad()
    def vppo_live_digests(self) -> dict[str, str]:
        """Returns the sha256 of every live weight that is not quantised, by its key, in the model's dtype."""
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
    """Yields every parameter of the checkpoint once, and every kernel that may hold a copy of its own."""
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
    """Yields the tensors that modules hold as attributes, or in lists and tuples, outside their parameters and buffers.

    Views of parameters and buffers are left out, and so are KV caches.
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
    """Names the parameters that vLLM made when it quantised this layer's weight; none if it did not."""
    if not isinstance(getattr(module, "quant_method", None), OnlineLinearBase):
        return ()
    return tuple(leaf for leaf, _ in module.named_parameters(recurse=False) if leaf not in ("weight", "bias"))


def _read_back(layer: Any, dtype: torch.dtype) -> Tensor:
    """Returns the [out, in] weight of a layer whose kernel is `cpu_linear`; -0.0 comes back as 0.0."""
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
