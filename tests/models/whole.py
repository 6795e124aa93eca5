"""A whole model folder, with processor, tokenizer and weights: the digits model before its cold start."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from digits.checkpoint import make_config, make_model, make_processor, save_checkpoint
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoTokenizer


def save_whole_folder(folder: Path, *, positions: int = 1024) -> None:
    processor = make_processor()
    config = make_config(processor.tokenizer)
    config.text_config.max_position_embeddings = positions
    save_checkpoint(make_model(config, seed=3), processor, folder)


def add_think_tokens(folder: Path) -> None:
    """Gives a folder tokens for the think tags, and rows for them in the embedding: as Qwen3-VL Instruct has them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in ("<think>", "</think>")])
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = len(tokenizer)
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith(("embed_tokens.weight", "lm_head.weight"))]:
        rows = weights[name]
        more = len(tokenizer) - len(rows)
        weights[name] = torch.cat([rows, rows.new_zeros(more, rows.shape[1])]) if more > 0 else rows[: len(tokenizer)]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
