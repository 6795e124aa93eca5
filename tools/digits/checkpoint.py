"""A Qwen2.5-VL of 2.5 M parameters with its tokenizer, picture processor and chat template, made from nothing."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
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
"""Names and roles as in the released Qwen2.5-VL tokenizers."""
UNKNOWN = "<|unknown|>"
WORDS = ("system", "user", "assistant", r"\boxed")
"""Words that every turn or answer holds: one token each. Everything else is one token per character."""
CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \n"
PATCH, MERGE = 14, 2
INITIALIZER_RANGE = 0.06
"""About 1 / sqrt(width); the 0.02 of wide models makes one this narrow start learning much later."""
MIN_PIXELS, MAX_PIXELS = 28 * 28, 112 * 112

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
"""Qwen2.5-VL's turns, without its default system turn: a short prompt is a fast one."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character and per word of WORDS; text of those comes back exactly."""
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


def make_processor() -> Qwen2_5_VLProcessor:
    """Tokenizer, picture processor with Qwen2.5-VL's patches, and the chat template."""
    pixels = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=pixels, patch_size=PATCH, merge_size=MERGE),
        video_processor=Qwen2VLVideoProcessor(size=pixels, patch_size=PATCH, merge_size=MERGE),
        tokenizer=make_tokenizer(),
        chat_template=CHAT_TEMPLATE,
    )


def make_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    """Sizes of the small model; every mechanism of the large one is in it.

    Heads are 32 wide, the narrowest that vLLM's CPU attention takes. A window of 56 pixels is one digit, so the first
    vision layer sees the digits apart and the second, with full attention, both.
    """
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-6,
            "initializer_range": INITIALIZER_RANGE,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
            "out_hidden_size": 192,
            "initializer_range": INITIALIZER_RANGE,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )


def make_model(config: Qwen2_5_VLConfig, *, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """Random float32 weights."""
    torch.manual_seed(seed)
    return Qwen2_5_VLForConditionalGeneration(config).float()


def save_checkpoint(model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, folder: Path) -> None:
    """An ordinary Hugging Face folder: weights, config, generation config, tokenizer, processor, chat template."""
    text = model.config.text_config
    model.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=[text.eos_token_id], pad_token_id=text.pad_token_id
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
