"""How a model is laid out and run. Nothing here but `fp8` changes what it computes, up to rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_vppo.config.choices import Fp8Recipe, ModelPart, Recompute, VisionSplit

Backend = Literal["te", "torch"]


@dataclass(frozen=True)
class Fp8Options:
    """FP8 inputs and weights of the linear layers of the language model's transformer layers, and of nothing else."""

    recipe: Fp8Recipe
    bf16_layers_at_ends: int = 0
    """Of the whole model: so many first and so many last layers stay as they are."""


@dataclass(frozen=True)
class ModelOptions:
    pipeline_layers: tuple[int, ...] | None = None
    """Language layers of each pipeline stage, in the order of the model; None: an even split. With virtual stages there
    are as many entries as stages in all."""
    virtual_stages: int = 1
    """Stages that each pipeline rank holds; stage s lies on rank s % (pipeline size)."""
    sequence_parallel: bool = False
    """Between the language model's layers each tensor-parallel rank holds its share of the tokens."""
    recompute: Recompute = "none"
    """What runs again in the backward pass instead of being kept: attention alone, or whole layers of both towers."""
    vision_split: VisionSplit = "tensor"
    """'tensor': the tower is split over the tensor-parallel ranks; 'images': each of them holds all of it and runs it
    on pictures of its own. In both cases context-parallel ranks run it on different pictures."""
    frozen: frozenset[ModelPart] = frozenset()
    """Parts without gradient."""
    backend: Backend = "torch"
    """Whose modules layers are made of: TransformerEngine's, or Megatron's and torch's own."""
    fp8: Fp8Options | None = None
    """Makes the model able to run so; `precision.py` says when it does."""


PLAIN = ModelOptions()
"""One stage per pipeline rank, everything kept and everything trained."""
