"""The parts that a model family provides. Everything else is shared by all families.

The shared part is Qwen's, not any model's. A family of another maker would also have to change:

- `models/families.py`: the checks of a configuration's activations and rope types;
- `models/megatron_config.py` and `models/language/`: RMSNorm, SwiGLU, grouped queries without biases after the
  projections, rotary positions with three coordinates (`PackedBatch.positions_3K`);
- `data/geometry.py` and `data/images.py`: how an image is resized, and the order of patches and of the values in one;
- `rollout/transfer/vllm_layout.py`: the names and fused tensors of vLLM's implementation;
- `planning/sizes.py`: the sizes that activations are counted from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from megatron_vppo.models.hf_config import HfConfig
from megatron_vppo.models.vision.tower import Grid, VisionTower
from megatron_vppo.weights.entries import Entry

PositionFn = Callable[[Sequence[int], Sequence[Grid]], Tensor]
"""(token ids of one sequence, grids of its images) -> int64 [3, tokens] rotary positions."""


@dataclass(frozen=True)
class Family:
    """One model architecture, under the name that its configurations have."""

    model_type: str
    """`model_type` of its config.json."""
    architecture: str
    """The class of transformers and of vLLM, as `architectures` of its config.json names it."""
    check_own: Callable[[HfConfig], None]
    """Raises ValueError for settings that only this family's configuration has, and that no released model uses."""
    deepstack_layers: Callable[[HfConfig], int]
    """The number of first language layers that add vision features. They have to lie on the first pipeline stage, with
    the tower."""
    qkv_bias: bool
    """True if the language model's query, key and value projections have biases."""
    qk_norm: bool
    """True if the language model normalises queries and keys."""
    mrope_section: tuple[int, int, int]
    """The rotary frequencies of frame, row and column, where a configuration has none: transformers' default."""
    mrope_interleaved: bool
    """True if the three take turns among the frequencies. vLLM reads it from the configuration, transformers does not.
    """
    positions: Callable[[HfConfig], PositionFn]
    """Makes the function that gives tokens their rotary positions."""
    rotary: Callable[[Any], nn.Module]
    """Makes, from a text configuration, the module from positions to the language model's rotary angles."""
    vision_activation: str
    """The tower's activation, as its configuration names it."""
    vision_options: Mapping[str, Any]
    """Fields of Megatron's configuration of the tower, other than sizes and layout."""
    vision_tower: Callable[..., VisionTower]
    """(TransformerConfig, vision configuration, parts=..., groups=...) -> the tower."""
    vision_entries: Callable[[Any], list[Entry]]
    """Makes the weight map of the tower, from a vision configuration."""
    language_prefix: str
    """The beginning of the checkpoint's names, as in `{prefix}embed_tokens.weight`."""
    to_released_name: Callable[[str], str]
    """Gives a tensor's name in released checkpoints, from its name in the memory of transformers."""
