"""The identity of a model's folder: what tells it from another one without reading all of its weights."""

from __future__ import annotations

import os
from hashlib import blake2b
from pathlib import Path

_TEXTS = ("*.json", "*.jinja", "*.txt")
_SAMPLES = 16
_SAMPLE_BYTES = 1 << 16


def model_fingerprint(folder: Path) -> str:
    """Computes a hex digest of the folder's descriptions and of samples of its weights.

    Descriptions (configuration, tokenizer, chat template) are read whole. Of each file of weights its name, its size
    and 16 pieces of 64 KiB, evenly spaced, count: training changes every tensor. Where the folder lies and when its
    files were written does not count.
    """
    digest = blake2b(digest_size=8)
    for path in sorted({path for pattern in _TEXTS for path in folder.glob(pattern) if path.is_file()}):
        digest.update(path.name.encode() + blake2b(path.read_bytes()).digest())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for number in range(_SAMPLES):
                file.seek((size - min(size, _SAMPLE_BYTES)) * number // (_SAMPLES - 1), os.SEEK_SET)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
