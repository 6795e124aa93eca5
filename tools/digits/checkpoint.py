"""A Qwen-VL of 2.5 M parameters with its tokenizer, image processor and chat template, made from nothing."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""The special tokens, with the names and roles that they have in the released Qwen2.5-VL tokenizers."""
UNKNOWN = "<|unknown|>"
WORDS = ("system", "user", "assistant", r"\boxed")
"""The words that every turn or response holds: one token each. Everything else is one token per character."""
CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \n"
FAMILIES = ("qwen2.5-vl", "qwen3-vl")
MERGE = 2
INITIALIZER_RANGE = 0.06
"""About 1 / sqrt(width). With the 0.02 of wide models, one this narrow starts to learn much later."""
MIN_PIXELS, MAX_PIXELS = 28 * 28, 112 * 112

Processor = Qwen2_5_VLProcessor | Qwen3VLProcessor

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}{{ raise_exception('this chat template knows parts of type image and text') }}{% endif %}"
    "{% endfor %}{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The turns of Qwen2.5-VL without its default system turn: a short prompt is a fast one."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Makes a tokenizer of one token per printable ASCII character and per word of WORDS.

    Text of those characters comes back exactly.
    """
    vocabulary = {token: i for i, token in enumerate((*SPECIAL_TOKENS, UNKNOWN, *WORDS, *CHARACTERS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    words = "|".join(word.replace("\\", r"\\") for word in WORDS)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{words}|[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=UNKNOWN,
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t not in ("<|im_end|>", "<|endoftext|>")],
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def make_processor(family: str = "qwen2.5-vl") -> Processor:
    """Makes tokenizer, image processor with the family's patch size, and chat template."""
    pixels = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
    patch = _VISION[family]["patch_size"]
    processor, video = {
        "qwen2.5-vl": (Qwen2_5_VLProcessor, Qwen2VLVideoProcessor),
        "qwen3-vl": (Qwen3VLProcessor, Qwen3VLVideoProcessor),
    }[family]
    return processor(
        image_processor=Qwen2VLImageProcessor(size=pixels, patch_size=patch, merge_size=MERGE),
        video_processor=video(size=pixels, patch_size=patch, merge_size=MERGE),
        tokenizer=make_tokenizer(),
        chat_template=CHAT_TEMPLATE,
    )


_TEXT: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "initializer_range": INITIALIZER_RANGE,
}
_ROPE: dict[str, dict[str, Any]] = {
    "qwen2.5-vl": {"mrope_section": [4, 6, 6]},
    "qwen3-vl": {"mrope_section": [6, 5, 5], "mrope_interleaved": True},
}
_VISION: dict[str, dict[str, Any]] = {
    # A window of 56 pixels is one digit. The first layer sees the digits apart; the second one, with full attention,
    # sees both.
    "qwen2.5-vl": {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]},
    # Images of 112 x 56 pixels become 128 x 64, which is as many patches. The features of the first vision layer are
    # added in the first language layer.
    "qwen3-vl": {"patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
}


def make_config(tokenizer: PreTrainedTokenizerFast, family: str = "qwen2.5-vl") -> Qwen2_5_VLConfig | Qwen3VLConfig:
    """Makes the configuration of a small model that has every mechanism of the large one.

    Heads are 32 wide, the narrowest that vLLM's CPU attention takes.
    """
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config_class, own_text = {
        "qwen2.5-vl": (Qwen2_5_VLConfig, {}),
        "qwen3-vl": (Qwen3VLConfig, {"head_dim": 32}),
    }[family]
    return config_class(
        text_config={
            **_TEXT,
            **own_text,
            "vocab_size": len(tokenizer),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **_ROPE[family]},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            **_VISION[family],
            "depth": 2,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "out_hidden_size": 192,
            "initializer_range": INITIALIZER_RANGE,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )


def make_model(config: Qwen2_5_VLConfig | Qwen3VLConfig, *, seed: int) -> PreTrainedModel:
    """Makes a model of random float32 weights."""
    torch.manual_seed(seed)
    return AutoModelForImageTextToText.from_config(config).float()


def save_checkpoint(model: PreTrainedModel, processor: Processor, folder: Path) -> None:
    """Writes an ordinary Hugging Face folder: weights, both configs, tokenizer, processor, chat template."""
    text = model.config.text_config
    model.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=[text.eos_token_id], pad_token_id=text.pad_token_id
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
