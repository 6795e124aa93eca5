"""Random Qwen-VL models of a few thousand parameters, rows to run them on, and what transformers says of them.

Rows cover: several images in a row, also two of nearly the same size (60 and 64 patches), which attention pads to the
larger one; one image shown in two rows; images whose merged grid is no multiple of the window (odd sides, a single
block); text alone; and a row of one token more than an image.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

IMAGE, VIDEO, START, END = 290, 291, 292, 293
MERGE = 2
PATCH_VALUES = 3 * 2 * 14 * 14
GRIDS = {"a": (1, 10, 6), "b": (1, 8, 8), "c": (1, 2, 2), "d": (1, 6, 14)}
ROWS: tuple[tuple[str | int, ...], ...] = ((7, "a", 12), (9,), (3, "b", 4, "a", 6), (23,), (0, "c", 2), (2, "d", 31))
"""Per row: a number of text tokens, or the name of an image."""


MEDIA_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
TEXT_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
VISION_SIZES = {"depth": 3, "hidden_size": 48, "intermediate_size": 68, "num_heads": 4, "out_hidden_size": 64}
"""The MLP's width is padded with one tensor-parallel rank (to 72) and with two (34 each, to 40)."""


def tiny_config(*, tied: bool, vocab: int, **text: object) -> Qwen2_5_VLConfig:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    return Qwen2_5_VLConfig(
        text_config={**TEXT_SIZES, "vocab_size": vocab, "rope_parameters": rope, **text},
        vision_config={
            **VISION_SIZES,
            "fullatt_block_indexes": [1],
            "window_size": 56,
        },
        tie_word_embeddings=tied,
        **MEDIA_TOKENS,
    )


def tiny_qwen3_config(*, tied: bool, vocab: int, taps: tuple[int, ...], **text: object) -> Qwen3VLConfig:
    """Heads wider than width / heads, as in the released models."""
    rope = {"rope_type": "default", "mrope_section": [6, 3, 3], "mrope_interleaved": True, "rope_theta": 1e4}
    return Qwen3VLConfig(
        text_config={**TEXT_SIZES, "vocab_size": vocab, "head_dim": 24, "rope_parameters": rope, **text},
        vision_config={
            **VISION_SIZES,
            "patch_size": 14,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": list(taps),
        },
        tie_word_embeddings=tied,
        **MEDIA_TOKENS,
    )


MODEL_CLASSES = {"qwen2_5_vl": Qwen2_5_VLForConditionalGeneration, "qwen3_vl": Qwen3VLForConditionalGeneration}


def save_tiny_model(folder: Path, config: Qwen2_5_VLConfig | Qwen3VLConfig, *, spread: float = 0.12) -> PreTrainedModel:
    """Every parameter random, norms and biases too, so that each one matters; matrices by `spread`."""
    torch.manual_seed(5)
    model = MODEL_CLASSES[config.model_type](config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_vector = "norm" in name or "ln_q" in name or name.endswith("bias")
            parameter.add_(torch.randn_like(parameter), alpha=0.2 if is_vector else spread)
    model.save_pretrained(folder)
    return model


@dataclass(frozen=True)
class Row:
    token_ids: list[int]
    images: tuple[str, ...]
    weights: Tensor
    """The factor of each token's log-prob in the test's loss; [tokens - 1]."""


def make_pixels() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    return {n: torch.randn(t * h * w, PATCH_VALUES, generator=generator) for n, (t, h, w) in GRIDS.items()}


def make_rows() -> list[Row]:
    generator = torch.Generator().manual_seed(12)
    rows = []
    for parts in ROWS:
        ids: list[int] = []
        for part in parts:
            if isinstance(part, int):
                ids += torch.randint(2, 280, (part,), generator=generator).tolist()
            else:
                t, h, w = GRIDS[part]
                ids += [START, *[IMAGE] * (t * h * w // MERGE**2), END]
        images = tuple(part for part in parts if isinstance(part, str))
        rows.append(Row(ids, images, torch.randn(len(ids) - 1, generator=generator)))
    return rows


@dataclass(frozen=True)
class Expected:
    """From transformers, row by row, without packing."""

    hidden: list[Tensor]
    logps: list[Tensor]
    gradients: dict[str, Tensor]
    """By the name that the saved checkpoint uses; of sum over rows of weights . logps."""


def transformers_says(folder: Path) -> Expected:
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    pixels = make_pixels()
    hidden, logps = [], []
    for row in make_rows():
        ids = torch.tensor([row.token_ids])
        images = {}
        if row.images:
            images = {
                "pixel_values": torch.cat([pixels[name] for name in row.images]),
                "image_grid_thw": torch.tensor([GRIDS[name] for name in row.images]),
                "mm_token_type_ids": (ids == IMAGE).int(),
            }
        out = model.model(input_ids=ids, **images).last_hidden_state[0]
        logp = model.lm_head(out[:-1]).log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        (row.weights * logp).sum().backward()
        hidden.append(out.detach())
        logps.append(logp.detach())
    in_memory = {"qwen2_5_vl": {"model.visual.": "visual.", "model.language_model.": "model."}, "qwen3_vl": {}}
    released = in_memory[model.config.model_type]
    gradients = {}
    for name, parameter in model.named_parameters():
        for prefix, short in released.items():
            name = short + name[len(prefix) :] if name.startswith(prefix) else name
        assert parameter.grad is not None, name
        gradients[name] = parameter.grad
    return Expected(hidden, logps, gradients)
