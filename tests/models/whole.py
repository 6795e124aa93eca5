"""A whole model folder, with processor, tokenizer and weights: the digits model before its cold start."""

from __future__ import annotations

from pathlib import Path

from digits.checkpoint import make_config, make_model, make_processor, save_checkpoint


def save_whole_folder(folder: Path) -> None:
    processor = make_processor()
    save_checkpoint(make_model(make_config(processor.tokenizer), seed=3), processor, folder)
