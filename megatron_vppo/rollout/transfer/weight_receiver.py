"""Our weight-transfer backends of vLLM: each worker reads memory of the trainer, the host's ('shm') or a GPU's
('vppo_ipc').

Registered through the `vllm.general_plugins` entry point, which vLLM loads in every one of its processes. The session
is vLLM's own (start_weight_update, update_weights for each buffer, finish_weight_update); names are those of the
Hugging Face checkpoint, and vLLM's model maps, fuses and shards them. The backends differ in how a buffer is found and
mapped, and in nothing else.

The trainer's half is `weight_sender.WeightSender`. It drives the four methods of vLLM's `VLLMWeightSyncClient`
protocol but is no `TrainerWeightTransferEngine`: importing that class takes 7 s and imports all of vLLM into the
trainer, and it replays a re-iterable source, where ours is a stream that exists once.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
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

from megatron_vppo.rollout.records import WeightTransfer
from megatron_vppo.rollout.transfer.device_buffer import DeviceBufferReader, Handle
from megatron_vppo.rollout.transfer.shared_buffer import SharedBufferReader

BACKENDS: dict[WeightTransfer, str] = {"shm": "shm", "ipc": "vppo_ipc"}
"""Ours, by the setting; vLLM has an 'ipc' of its own."""
EMPTY_LOAD_FORMAT = "vppo_empty"


@functools.cache
def register() -> None:
    """Make the backend and the load format known to vLLM in this process; a second call does nothing."""
    WeightTransferEngineFactory.register_engine(BACKENDS["shm"], ShmTransferEngine)
    WeightTransferEngineFactory.register_engine(BACKENDS["ipc"], IpcTransferEngine)
    register_model_loader(EMPTY_LOAD_FORMAT)(EmptyModelLoader)


@dataclass
class NoInitInfo(WeightTransferInitInfo):
    """Nothing: each update says where its memory is."""


@dataclass
class PackedUpdateInfo(WeightTransferUpdateInfo):
    """One buffer of whole tensors. The four lists run in parallel."""

    names: list[str]
    dtypes: list[str]
    """Names in torch, such as 'bfloat16'."""
    shapes: list[list[int]]
    offsets: list[int]
    """Bytes from the start of the buffer."""


@dataclass
class ShmUpdateInfo(PackedUpdateInfo):
    path: str
    capacity: int
    """Bytes of the whole buffer."""


@dataclass
class IpcUpdateInfo(PackedUpdateInfo):
    handles: list[Handle]
    """One for each of the engine's workers, by rank."""


UpdateInfo = TypeVar("UpdateInfo", bound=PackedUpdateInfo)


class PackedTransferEngine(WeightTransferEngine[NoInitInfo, UpdateInfo]):
    """A worker's end."""

    init_info_cls = NoInitInfo
    reader: SharedBufferReader | DeviceBufferReader

    @abstractmethod
    def memory(self, info: UpdateInfo) -> torch.Tensor:
        """uint8 view of the buffer."""

    def init_transfer_engine(self, init_info: NoInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Load one buffer. vLLM waits for the device before it answers; then the trainer may overwrite the buffer."""
        try:
            self.model.load_weights(self._tensors(update_info))
        except BaseException:
            # vLLM ends the session here; without this the half-filled layers would stay and break the next session.
            finalize_layerwise_reload(self.model, self.model_config)
            self.reader.close()
            raise

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        refresh_tied_heads(self.model)

    def shutdown(self) -> None:
        self.reader.close()

    def _tensors(self, info: UpdateInfo) -> list[tuple[str, torch.Tensor]]:
        memory = self.memory(info)
        tensors = []
        for name, dtype_name, shape, offset in zip(info.names, info.dtypes, info.shapes, info.offsets, strict=True):
            dtype: torch.dtype = getattr(torch, dtype_name)
            num_bytes = torch.Size(shape).numel() * dtype.itemsize
            view = memory[offset : offset + num_bytes].view(dtype).view(shape)
            # A copy of our own: vLLM holds on to tensors until their layer is complete, maybe in a later buffer.
            tensors.append((name, view.to(self.device, copy=True)))
        return tensors


class ShmTransferEngine(PackedTransferEngine[ShmUpdateInfo]):
    update_info_cls = ShmUpdateInfo

    def __init__(
        self, config: WeightTransferConfig, vllm_config: VllmConfig, device: torch.device, model: torch.nn.Module
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self.reader: SharedBufferReader = SharedBufferReader()

    def memory(self, info: ShmUpdateInfo) -> torch.Tensor:
        return self.reader.read(info.path, info.capacity)


class IpcTransferEngine(PackedTransferEngine[IpcUpdateInfo]):
    update_info_cls = IpcUpdateInfo

    def __init__(
        self, config: WeightTransferConfig, vllm_config: VllmConfig, device: torch.device, model: torch.nn.Module
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self.reader: DeviceBufferReader = DeviceBufferReader(device)

    def memory(self, info: IpcUpdateInfo) -> torch.Tensor:
        return self.reader.read(info.handles[self.parallel_config.rank])

    def finish_weight_update(self) -> None:
        """The trainer's buffers are let go as well: it frees them between two updates."""
        super().finish_weight_update()
        self.reader.close()


def refresh_tied_heads(model: torch.nn.Module) -> None:
    """Let output heads that share the embedding's weight repack it.

    vLLM's CPU kernels compute with a repacked copy, made when a layer's weights were loaded. A tied head is loaded
    through the embedding, so after an update its own copy would still be the old one.
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
    """Zero parameters, for an engine that gets its weights before its first request. Buffers stay as they were built.

    Not vLLM's 'dummy' format: that also randomises buffers which no checkpoint holds and no transfer restores, such
    as the pixel normalisation of the vision tower (`FusedMMInputNorm`).
    """

    def download_model(self, model_config: ModelConfig) -> None:
        pass

    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        for parameter in model.parameters():
            parameter.data.zero_()
