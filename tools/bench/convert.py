"""Seconds and peak memory of `vppo convert`, compared with a plain copy of the same bytes, as one JSON object.

    python tools/bench/convert.py --shape small|7b [--folder FOLDER] [--processes N]

Builds a checkpoint of random weights in FOLDER, converts it to Megatron and back, and compares the result with the
original. The checkpoint is copied before, between and after the two conversions. FOLDER needs room for three times the
checkpoint (7b: 50 GB). tools/bench/README.md explains the numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import Qwen2_5_VLConfig

from bench.machine import commit, hardware, stolen_seconds, versions
from bench.resident import TreeSampler
from megatron_vppo.conversion.hf_writer import lay_out
from megatron_vppo.models.families import family_of, weight_map
from megatron_vppo.weights.entries import stream_entries
from megatron_vppo.weights.hf_folder import raw_bytes

ROOT = Path(__file__).resolve().parents[2]
ROPE = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    # As published: https://huggingface.co/Qwen/Qwen2.5-VL-7B-Instruct/blob/main/config.json
    "7b": {
        "text_config": {
            "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
            "intermediate_size": 18944, "vocab_size": 152064, "rope_parameters": ROPE,
        },
        "vision_config": {
            "depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "out_hidden_size": 3584,
        },
    },
    "small": {
        "text_config": {
            "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 2048, "vocab_size": 32000, "rope_parameters": ROPE,
        },
        "vision_config": {
            "depth": 4, "hidden_size": 256, "num_heads": 4, "intermediate_size": 512, "out_hidden_size": 512,
        },
    },
}  # fmt: skip
SHARD_BYTES = 4 * 10**9
BLOCK_VALUES = 32 << 20
"""The number of random values that are drawn once. Every tensor is written from them, each from another place on."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True, choices=SHAPES)
    parser.add_argument("--folder", type=Path, default=ROOT / "build/bench/convert", help="emptied before and after")
    parser.add_argument("--processes", type=int, default=1, help="processes of each conversion (default: 1)")
    options = parser.parse_args(arguments)
    print(json.dumps(measure(options.shape, folder=options.folder, processes=options.processes), indent=1))


def measure(shape: str, *, folder: Path, processes: int) -> dict[str, Any]:
    """Builds, converts and compares a checkpoint, with a copy before and after each conversion; then cleans up."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    source, converted, back = (folder / name for name in ("source", "converted", "back"))
    try:
        num_bytes = build(shape, source)
        several = ["--processes", str(processes)]
        copies = [copy(source, folder / "copy")]
        to_megatron = run(["hf-to-megatron", source, converted, *several], cold=source)
        copies.append(copy(source, folder / "copy"))
        to_hf = run(["megatron-to-hf", converted, back, "--shard-size", "4GB", *several], cold=converted)
        shutil.rmtree(converted)
        copies.append(copy(source, folder / "copy"))
        verify = run(["verify", source, back], cold=source)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "shape": shape,
        "gigabytes": round(num_bytes / 1e9, 3),
        "processes": processes,
        "copies": copies,
        "hf_to_megatron": {**to_megatron, "of_copy": _of_copies(to_megatron, copies[:2])},
        "megatron_to_hf": {**to_hf, "of_copy": _of_copies(to_hf, copies[1:])},
        "verify": verify,
        "hardware": hardware(),
        "versions": versions(),
        "git": commit(ROOT),
    }


def _of_copies(conversion: dict[str, Any], copies: Sequence[dict[str, Any]]) -> float:
    return round(conversion["seconds"] * len(copies) / sum(made["seconds"] for made in copies), 2)


def build(shape: str, folder: Path) -> int:
    """Writes a Hugging Face folder of random bfloat16 weights without a tokenizer. Returns the bytes of the weights."""
    folder.mkdir()
    config = Qwen2_5_VLConfig(**SHAPES[shape], tie_word_embeddings=False, dtype="bfloat16")
    config.save_pretrained(folder)
    entries = stream_entries(weight_map(config, family=family_of(config)))
    tensors = [
        (name, sizes, torch.bfloat16)
        for entry in entries
        for name, sizes in zip(entry.hf_names, entry.kind.hf_shapes(), strict=True)
    ]
    block = raw_bytes((0.02 * torch.randn(BLOCK_VALUES, generator=torch.Generator().manual_seed(0))).bfloat16())
    places = lay_out(folder, tensors, shard_bytes=SHARD_BYTES)
    for number, place in enumerate(places.values()):
        with place.path.open("r+b", buffering=0) as file:
            file.seek(place.start)
            left, at = place.nbytes, 2 * (number * 7919 % BLOCK_VALUES)
            while left:
                left -= file.write(block[at : at + left])
                at = 0
    flush(folder)
    return sum(place.nbytes for place in places.values())


@contextmanager
def timed(found: dict[str, Any]) -> Iterator[None]:
    """Measures wall-clock seconds, and the share of all cores' time that other virtual machines got meanwhile."""
    stolen, began = stolen_seconds(), time.perf_counter()
    yield
    seconds = time.perf_counter() - began
    found["seconds"] = round(seconds, 1)
    found["stolen"] = round((stolen_seconds() - stolen) / seconds / (os.cpu_count() or 1), 2)


def copy(source: Path, target: Path) -> dict[str, Any]:
    """Times shutil.copytree from a cold page cache until the copy is on the disk, and removes the copy."""
    forget(source)
    found: dict[str, Any] = {}
    with timed(found):
        shutil.copytree(source, target)
        flush(target)
    shutil.rmtree(target)
    return found


def run(arguments: Sequence[object], *, cold: Path) -> dict[str, Any]:
    """Times `vppo convert` from a cold page cache until it ends. The command itself flushes what it writes to the disk.

    Raises:
        RuntimeError: it failed.
    """
    forget(cold)
    command = [sys.executable, "-m", "megatron_vppo.cli.main", "convert", *map(str, arguments)]
    found: dict[str, Any] = {}
    with timed(found), subprocess.Popen(command, cwd=ROOT, stdout=sys.stderr) as process:
        memory = TreeSampler(process.pid)
        status = process.wait()
        peak = memory.stop()
    if status:
        raise RuntimeError(f"{' '.join(command)} ended with status {status}")
    return {**found, "peak_mib": {k: round(v, 1) for k, v in asdict(peak).items()}}


def forget(folder: Path) -> None:
    """Takes the files out of the page cache."""
    for path in files(folder):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def flush(folder: Path) -> None:
    for path in files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


if __name__ == "__main__":
    main()
