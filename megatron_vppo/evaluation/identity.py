"""The identity of a model's folder, told without reading all of its weights, and that of a template."""

from __future__ import annotations

import os
from hashlib import blake2b
from pathlib import Path

from megatron_vppo.data.prompts import read_template

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


def template_digest(format_prompt: str | None) -> str | None:
    """Computes a hex digest of the text of a template; None if there is none.

    Raises ValueError if the file is missing or not Jinja.
    """
    return None if format_prompt is None else blake2b(read_template(format_prompt).encode(), digest_size=8).hexdigest()
