"""Random Qwen-VL models small enough for two cores, saved as ordinary Hugging Face folders.

The tokenizer is Qwen's byte-level BPE without merges (one token per byte) plus the special tokens that the family
needs. Head dimensions are 32, the least that vLLM's CPU attention accepts.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
MEDIA_TOKENS = ("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_alphabet() -> list[str]:
    """The 256 printable characters by which byte-level BPE spells bytes, in byte order (GPT-2's convention)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = itertools.count(256)
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def build_tokenizer() -> Qwen2Tokenizer:
    tokens = [*byte_alphabet(), *SPECIAL_TOKENS, *MEDIA_TOKENS]
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[*SPECIAL_TOKENS, *MEDIA_TOKENS],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def media_tokens(tokenizer: Qwen2Tokenizer) -> dict[str, int]:
    names = {
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "eos_token_id": "<|im_end|>",
        "pad_token_id": "<|endoftext|>",
    }
    return {field: tokenizer.convert_tokens_to_ids(token) for field, token in names.items()}


def text_sizes(tokenizer: Qwen2Tokenizer, *, tied: bool, layers: int, **rope: object) -> dict[str, object]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **rope},
        "tie_word_embeddings": tied,
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
    }


VISION_SIZES = {
    "hidden_size": 64,
    "out_hidden_size": 128,
    "intermediate_size": 96,
    "num_heads": 2,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def build_config(tokenizer: Qwen2Tokenizer, *, tied: bool) -> Qwen2_5_VLConfig:
    text = text_sizes(tokenizer, tied=tied, layers=2, mrope_section=[4, 6, 6])
    vision = {**VISION_SIZES, "depth": 2, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=tied,
        **media_tokens(tokenizer),
    )


def build_qwen3_config(tokenizer: Qwen2Tokenizer, *, tied: bool) -> Qwen3VLConfig:
    text = text_sizes(tokenizer, tied=tied, layers=3, mrope_section=[12, 10, 10], mrope_interleaved=True)
    vision = {
        **VISION_SIZES,
        "depth": 4,
        "patch_size": 16,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 2],
    }
    return Qwen3VLConfig(
        text_config={**text, "head_dim": 64},
        vision_config=vision,
        tie_word_embeddings=tied,
        **media_tokens(tokenizer),
    )


def build_model(config: Qwen2_5_VLConfig | Qwen3VLConfig, *, seed: int) -> PreTrainedModel:
    """Random weights, larger than the usual initialisation so that the image visibly changes the next token."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.copy_(torch.randn_like(parameter) * (0.08 if "embed" in name else 0.11))
    return model


def save_model_folder(folder: Path, *, tied: bool, seed: int = 0) -> Path:
    tokenizer = build_tokenizer()
    image_processor = Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=112 * 112)
    processor = Qwen2_5_VLProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )
    build_model(build_config(tokenizer, tied=tied), seed=seed).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_qwen3_folder(folder: Path, *, tied: bool, seed: int = 0) -> Path:
    tokenizer = build_tokenizer()
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=64 * 64, max_pixels=128 * 128, patch_size=16),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )
    build_model(build_qwen3_config(tokenizer, tied=tied), seed=seed).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
