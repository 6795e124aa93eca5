"""Small Hugging Face folders of both families to convert, and what is in them, read by other means."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models.tiny import save_tiny_model, tiny_config, tiny_qwen3_config

CONFIGS = {
    "Qwen2.5 tied": tiny_config(tied=True, vocab=301),
    "Qwen2.5 untied": tiny_config(tied=False, vocab=301),
    "Qwen3 tied": tiny_qwen3_config(tied=True, vocab=301, taps=(1,)),
    "Qwen3 untied": tiny_qwen3_config(tied=False, vocab=301, taps=(1,)),
}
"""An odd vocabulary, which two tensor-parallel ranks have to pad."""
SIDE_FILES = {
    "chat_template.jinja": "{{ messages }}",
    "tokenizer.json": "{}",
    "sub/more.json": "[1]",
}


class MarksIfLoaded:
    """A pickle of it writes a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.marker,)


def make_folder(folder: Path, name: str) -> Path:
    """Saves a model of random weights, with the other files that a conversion has to keep."""
    save_tiny_model(folder, CONFIGS[name])
    for file, text in SIDE_FILES.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(text)
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """By the library's own reader; where there is an index, as it says."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return load_file(folder / "model.safetensors")
    where: dict[str, str] = json.loads(index.read_text())["weight_map"]
    files = {file: load_file(folder / file) for file in set(where.values())}
    assert sum(len(held) for held in files.values()) == len(where), "a tensor that the index does not name"
    return {name: files[file][name] for name, file in where.items()}


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and torch.equal(left[name].view(torch.uint8), right[name].view(torch.uint8))
        for name in left
    )


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Changes the tensors of a folder with one file."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def shard(folder: Path, *, parts: int) -> None:
    """Makes several files and an index of the one file of a folder."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {}
    for number in range(parts):
        held = {name: tensors[name] for name in sorted(tensors)[number::parts]}
        file = f"model-{number + 1:05d}-of-{parts:05d}.safetensors"
        save_file(held, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(held, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


@dataclass(frozen=True)
class Flip:
    """One bit of one value."""

    name: str

    def __call__(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        flipped = tensors[self.name].clone()
        flipped.view(torch.uint8).view(-1)[-4] ^= 1
        return {**tensors, self.name: flipped}


def left_behind(target: Path) -> list[str]:
    """Everything of a conversion that is still there: its target, or an unfinished one."""
    return sorted(path.name for path in _beside(target))


def _beside(target: Path) -> Iterator[Path]:
    return (path for path in target.parent.iterdir() if path.name in (target.name, f".{target.name}.tmp"))
