"""Options of how a model is laid out and run. Except for `fp8`, none changes what it computes, up to rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_vppo.config.choices import Fp8Recipe, ModelPart, Recompute, VisionSplit

Backend = Literal["te", "torch"]


@dataclass(frozen=True)
class Fp8Options:
    """FP8 for the inputs and weights of the language model's linear layers, inside its transformer layers."""

    recipe: Fp8Recipe
    bf16_layers_at_ends: int = 0
    """The number of layers at the beginning of the model, and at its end, that stay in the dtype of their weights."""


@dataclass(frozen=True)
class ModelOptions:
    pipeline_layers: tuple[int, ...] | None = None
    """Language layers of each pipeline stage, virtual ones included, in the order of the model; None: an even split."""
    virtual_stages: int = 1
    """Stages that each pipeline rank holds; stage s lies on rank s % (pipeline size)."""
    sequence_parallel: bool = False
    """Between the language model's layers each tensor-parallel rank holds its share of the tokens."""
    recompute: Recompute = "none"
    """The parts of layers that run again in the backward pass instead of keeping their activations: 'selective', the
    attention; 'full', whole layers of vision tower and language model."""
    vision_split: VisionSplit = "tensor"
    """'tensor': the tower is split over the tensor-parallel ranks; 'images': each of them holds all of it and runs it
    on its own images. In both cases context-parallel ranks run it on different images."""
    frozen: frozenset[ModelPart] = frozenset()
    """The parts that get no gradient."""
    backend: Backend = "torch"
    """The modules that layers are made of: 'te', TransformerEngine's; 'torch', Megatron's and torch's own."""
    fp8: Fp8Options | None = None
    """Makes the model able to run in FP8; `language_precision` in precision.py switches it on and off."""


PLAIN = ModelOptions()
"""One stage per pipeline rank, everything kept and everything trained."""
