"""What a model family is made of, beside what all of them share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_vppo.models.vision.tower import VisionTower
from megatron_vppo.weights.kinds import Entry


@dataclass(frozen=True)
class Family:
    model_type: str
    """Of its config.json."""
    check_own: Callable[[Any], None]
    """Raises ValueError for what this family's configuration alone can say and no released model does."""
    deepstack_layers: Callable[[Any], int]
    """Of a model configuration: how many of the first language layers add vision features. They have to lie on the
    first pipeline stage, with the tower."""
    qkv_bias: bool
    """In the language model."""
    qk_norm: bool
    interleaved_mrope: bool
    vision_activation: str
    """As its configuration names it."""
    vision_options: Mapping[str, Any]
    """What Megatron's configuration of the tower holds beside sizes and layout."""
    vision_tower: Callable[..., VisionTower]
    """(TransformerConfig, vision configuration, parts=..., groups=...)."""
    vision_entries: Callable[[Any], list[Entry]]
    """Of a vision configuration: the weight map of the tower."""
    language_prefix: str
    """Of the checkpoint's names, as in `{prefix}embed_tokens.weight`."""
    released_name: Callable[[str], str]
    """The released checkpoint's name of a tensor that transformers may name otherwise in memory."""
