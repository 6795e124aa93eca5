"""A whole model folder, with processor, tokenizer and weights: the digits model before its cold start."""

from __future__ import annotations

from pathlib import Path

from digits.checkpoint import make_config, make_model, make_processor, save_checkpoint


def save_whole_folder(folder: Path, *, positions: int = 1024) -> None:
    processor = make_processor()
    config = make_config(processor.tokenizer)
    config.text_config.max_position_embeddings = positions
    save_checkpoint(make_model(config, seed=3), processor, folder)
