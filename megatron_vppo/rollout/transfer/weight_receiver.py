"""Two weight-transfer backends for vLLM, by which each worker reads memory of the trainer: of the host, or of a GPU.

They are registered through the entry point `vllm.general_plugins`, which vLLM loads in every one of its processes. The
session is vLLM's own: start_weight_update, update_weights for each buffer, finish_weight_update. Names are those of the
Hugging Face checkpoint, and vLLM's model maps, fuses and shards them. The backends differ only in the way a buffer is
found and mapped.

The trainer's half is `weight_sender.WeightSender`. It calls the four methods of vLLM's `VLLMWeightSyncClient`, but is
no `TrainerWeightTransferEngine`. Importing that class takes 7 s and brings all of vLLM into the trainer. It also
iterates over the weights more than once, and ours are a stream that exists once.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from megatron_vppo.rollout.records import WeightTransfer
from megatron_vppo.rollout.transfer.device_buffer import DeviceBufferReader, Handle
from megatron_vppo.rollout.transfer.scattered import Scattered, in_order
from megatron_vppo.rollout.transfer.shared_buffer import SharedBufferReader

BACKENDS: dict[WeightTransfer, str] = {"shm": "shm", "ipc": "vppo_ipc"}
"""The names of our backends by setting; vLLM has an 'ipc' of its own."""
EMPTY_LOAD_FORMAT = "vppo_empty"


@functools.cache
def register() -> None:
    """Makes the backends and the load format known to vLLM in this process; a second call does nothing."""
    WeightTransferEngineFactory.register_engine(BACKENDS["shm"], ShmTransferEngine)
    WeightTransferEngineFactory.register_engine(BACKENDS["ipc"], IpcTransferEngine)
    register_model_loader(EMPTY_LOAD_FORMAT)(EmptyModelLoader)


@dataclass
class NoInitInfo(WeightTransferInitInfo):
    """The empty start of a session: each update says where its memory is."""


@dataclass
class PackedUpdateInfo(WeightTransferUpdateInfo):
    """A buffer of whole tensors, described by lists of equal length."""

    names: list[str]
    dtypes: list[str]
    """Torch's names, such as 'bfloat16'."""
    shapes: list[list[int]]
    offsets: list[int]
    """Bytes from the start of the buffer."""
    sizes: list[list[int]]
    """The shape in which the values lie, in their order; it may have more dimensions than the tensor."""
    strides: list[list[int]]
    """Values from one index of each dimension of `sizes` to the next."""


@dataclass
class ShmUpdateInfo(PackedUpdateInfo):
    """A buffer in host memory."""

    path: str
    capacity: int
    """Bytes of the whole buffer."""


@dataclass
class IpcUpdateInfo(PackedUpdateInfo):
    """A buffer in GPU memory."""

    handles: list[Handle]
    """One for each worker of the engine, by rank."""


UpdateInfo = TypeVar("UpdateInfo", bound=PackedUpdateInfo)


class PackedTransferEngine(WeightTransferEngine[NoInitInfo, UpdateInfo]):
    """The part of a backend that runs in a worker and loads the tensors of a buffer."""

    init_info_cls = NoInitInfo
    reader: SharedBufferReader | DeviceBufferReader

    @abstractmethod
    def memory(self, info: UpdateInfo) -> torch.Tensor:
        """Returns a uint8 view of the buffer."""

    def init_transfer_engine(self, init_info: NoInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Loads one buffer. vLLM waits for the device before it answers; then the trainer may overwrite the buffer."""
        memory = self.memory(update_info)
        try:
            self.model.load_weights(self._tensors(update_info, memory))
            keep_waiting_tensors(self.model, memory)
        except BaseException:
            # vLLM ends the session here. Half-filled layers must not stay: they would break the next session.
            finalize_layerwise_reload(self.model, self.model_config)
            self.reader.close()
            raise

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        refresh_tied_heads(self.model)

    def shutdown(self) -> None:
        self.reader.close()

    def _tensors(self, info: UpdateInfo, memory: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the tensors where they lie; vLLM's loaders copy from there, each worker its share."""
        for number, name in enumerate(info.names):
            view = strided_view(
                memory,
                dtype=getattr(torch, info.dtypes[number]),
                offset=info.offsets[number],
                sizes=info.sizes[number],
                strides=info.strides[number],
            )
            yield name, in_order(view, info.shapes[number])


class ShmTransferEngine(PackedTransferEngine[ShmUpdateInfo]):
    """The backend 'shm'."""

    update_info_cls = ShmUpdateInfo

    def __init__(
        self, config: WeightTransferConfig, vllm_config: VllmConfig, device: torch.device, model: torch.nn.Module
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self.reader: SharedBufferReader = SharedBufferReader()

    def memory(self, info: ShmUpdateInfo) -> torch.Tensor:
        return self.reader.read(info.path, info.capacity)


class IpcTransferEngine(PackedTransferEngine[IpcUpdateInfo]):
    """The backend 'vppo_ipc'."""

    update_info_cls = IpcUpdateInfo

    def __init__(
        self, config: WeightTransferConfig, vllm_config: VllmConfig, device: torch.device, model: torch.nn.Module
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self.reader: DeviceBufferReader = DeviceBufferReader(device)

    def memory(self, info: IpcUpdateInfo) -> torch.Tensor:
        return self.reader.read(info.handles[self.parallel_config.rank])

    def finish_weight_update(self) -> None:
        """Ends the session and closes the trainer's buffers, since it frees them between two transfers."""
        super().finish_weight_update()
        self.reader.close()


def strided_view(
    memory: torch.Tensor, *, dtype: torch.dtype, offset: int, sizes: Sequence[int], strides: Sequence[int]
) -> torch.Tensor:
    """Returns a view of uint8 `memory` in which values lie `strides` apart, the first at byte `offset`."""
    values = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    return memory[offset : offset + values * dtype.itemsize].view(dtype).as_strided(tuple(sizes), tuple(strides))


def keep_waiting_tensors(model: torch.nn.Module, memory: torch.Tensor) -> None:
    """Copies what vLLM has not loaded yet, because a layer is incomplete, out of a buffer that will be overwritten."""
    buffer = memory.untyped_storage().data_ptr()
    for layer in model.modules():
        for _, bound in get_layerwise_info(layer).loaded_weights:
            for name, value in bound.arguments.items():
                lying = value.lying if isinstance(value, Scattered) else value
                if isinstance(lying, torch.Tensor) and lying.untyped_storage().data_ptr() == buffer:
                    bound.arguments[name] = value.clone()


def refresh_tied_heads(model: torch.nn.Module) -> None:
    """Makes output heads that share the embedding's weight repack it.

    vLLM's CPU kernels compute with a repacked copy that is made when a layer's weights are loaded. A tied head is
    loaded through the embedding, so its own copy would still be the old one after a transfer.
    """
    owners: dict[int, Any] = {}
    module: Any
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is None:
            continue
        if owners.setdefault(id(weight), module) is not module and hasattr(module, "quant_method"):
            module.quant_method.process_weights_after_loading(module)


class EmptyModelLoader(BaseModelLoader):
    """A loader that sets all parameters to zero, for an engine that is sent its weights before its first request.

    Buffers stay as they were built. vLLM's own format 'dummy' would also randomise buffers that no checkpoint holds and
    no transfer restores, such as the pixel normalisation of the vision tower (`FusedMMInputNorm`).
    """

    def download_model(self, model_config: ModelConfig) -> None:
        pass

    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        for parameter in model.parameters():
            parameter.data.zero_()
