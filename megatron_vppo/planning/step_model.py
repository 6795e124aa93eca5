"""The records that the roofline model reads: a model, a layout, an engine, and the GPUs that they run on."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vppo.config.choices import Recompute
from megatron_vppo.models.flops import ModelCost
from megatron_vppo.planning.assumptions import LIKELY, Assumptions
from megatron_vppo.planning.gpus import GpuCeilings


@dataclass(frozen=True)
class SpeedModel:
    """The numbers of a model that its speed depends on."""

    cost: ModelCost
    parameters: int
    tensors: int
    """Tensors of the whole model, as they are sent to an engine."""
    layers: int
    hidden: int
    vocabulary: int
    kv_values: int
    """The keys and values of one token in one layer."""
    vision_layers: int

    @property
    def decoded_bytes(self) -> int:
        """Bytes of the bfloat16 weights that one decode step reads: two for each parameter, as a token costs FLOPs."""
        return self.cost.per_token + self.cost.per_head_position

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values of one token, in bfloat16 and all layers."""
        return 2 * self.layers * self.kv_values


@dataclass(frozen=True)
class TrainerLayout:
    """The ranks of the trainer. Tensor and context ranks are neighbours, pipeline stages are furthest apart."""

    tensor: int
    pipeline: int
    context: int
    data: int
    recompute: Recompute
    node_gpus: int

    @property
    def gpus(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def stage_ranks(self) -> int:
        """The ranks that share the work of a stage of one replica."""
        return self.tensor * self.context

    @property
    def hosts(self) -> int:
        return -(-self.gpus // self.node_gpus)


@dataclass(frozen=True)
class EngineLayout:
    tensor: int
    """GPUs of an engine."""
    kv_tokens: int
    """Tokens whose keys and values it holds at once."""
    max_sequences: int
    """Responses in flight: rollout.max_num_seqs."""
    eager: bool
    """True without CUDA graphs: rollout.enforce_eager."""


@dataclass(frozen=True)
class Machine:
    """The GPUs, and what is assumed of them and of their hosts."""

    gpu: GpuCeilings
    assumed: Assumptions = LIKELY

    @property
    def node_link(self) -> float:
        """Bytes/s of a collective within a host; endless for a device without neighbours."""
        return self.gpu.node or float("inf")

    @property
    def network_link(self) -> float:
        return self.gpu.network or float("inf")

    def link(self, ranks: int, *, node_gpus: int) -> float:
        """Returns the bytes/s of a collective of a group that spreads over `ranks` neighbouring GPUs."""
        return self.node_link if ranks <= node_gpus else self.network_link
