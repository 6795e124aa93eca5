"""Writes a Qwen2.5-VL of 60 M or 270 M random parameters, and rows for it: prompts of 256 tokens, 224 of them an image.

    python tools/bench/random_model.py [--size 270m] --out build/bench/random_60m

The model is an ordinary Hugging Face folder, OUT/model; the rows are OUT/data/train.parquet. They are for measuring
time: nothing can be learned from them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

from digits.checkpoint import MERGE, SPECIAL_TOKENS, make_model, make_processor, save_checkpoint
from digits.folder import build_once
from digits.scans import draw_image, draw_scans, load_scans
from PIL import Image
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig

VOCABULARY = 4096
"""The rows of the embedding: more than the tokenizer has tokens, as in the released models."""
EOS = VOCABULARY - 1
IMAGE_SIZE = (448, 392)
"""The pixels across and down: 16 x 14 image tokens of 28 pixels."""
PROMPT_TOKENS = 256
QUESTION = "<image>What is the exact sum?"
"""The question. It has one token per character, which with the chat template and the image makes PROMPT_TOKENS."""


@dataclass(frozen=True)
class Size:
    """The sizes of a language model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int


SIZES = {
    "60m": Size(hidden=512, intermediate=1536, layers=16, heads=8, kv_heads=2),
    "270m": Size(hidden=2048, intermediate=8192, layers=4, heads=16, kv_heads=4),
}
"""A model with many layers, and one with few layers as wide as those of a 3B."""


def make_config(tokenizer: PreTrainedTokenizerFast, *, size: Size = SIZES["60m"]) -> Qwen2_5_VLConfig:
    """Makes a configuration of 59 M parameters (48 M in the language layers, 7 M in the vision tower, 4 M in the
    vocabulary), or of 268 M.

    The EOS token is an ordinary one, which random weights sample once in VOCABULARY tokens: most responses run to their
    limit.
    """
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": size.hidden,
            "intermediate_size": size.intermediate,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": _sections(size)},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": EOS,
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 6,
            "hidden_size": 256,
            "intermediate_size": 704,
            "num_heads": 4,
            "patch_size": 14,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [2, 5],
            "out_hidden_size": size.hidden,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )


def _sections(size: Size) -> list[int]:
    """Divides the rotary pairs of a head among time, height and width, as in the released models."""
    pairs = size.hidden // size.heads // 2
    return [pairs // 4, 3 * pairs // 8, 3 * pairs // 8]


def write_rows(path: Path, *, rows: int, seed: int) -> None:
    """Writes a parquet file in the released data sets' schema: pairs of scanned digits, stretched to IMAGE_SIZE."""
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    scans = load_scans()
    pairs = draw_scans(range(len(scans.digits)), each=2, count=rows, seed=seed)
    columns = {
        "problem": [QUESTION] * rows,
        "answer": [str(scans.digits[list(pair)].sum()) for pair in pairs],
        "images": [[draw_image(scans, pair, columns=2).resize(IMAGE_SIZE, Image.Resampling.BICUBIC)] for pair in pairs],
    }
    features = Features({"problem": Value("string"), "answer": Value("string"), "images": List(ImageFeature())})
    Dataset.from_dict(columns, features=features).to_parquet(str(path))


def build(out: Path, *, size: str, rows: int, seed: int) -> dict[str, Any]:
    """Writes model and rows into the existing folder `out`. The same arguments write the same weights and rows."""
    processor = make_processor()
    processor.image_processor.size = {"shortest_edge": 28 * 28, "longest_edge": IMAGE_SIZE[0] * IMAGE_SIZE[1]}
    model = make_model(make_config(processor.tokenizer, size=SIZES[size]), seed=seed)
    save_checkpoint(model, processor, out / "model")
    (out / "data").mkdir()
    write_rows(out / "data" / "train.parquet", rows=rows, seed=seed)
    return {"params": sum(p.numel() for p in model.parameters()), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--size", choices=SIZES, default="60m")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    arguments = {"size": options.size, "rows": options.rows, "seed": options.seed}
    content = {**arguments, "eos": EOS}
    result, reused = build_once(options.out, content, lambda folder: build(folder, **arguments))
    print(json.dumps({**result, "reused": reused}))


if __name__ == "__main__":
    main()
