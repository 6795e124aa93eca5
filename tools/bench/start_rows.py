"""Seconds and memory of a run's start on a large data set, as JSON: `python tools/bench/start_rows.py --rows 40000`.

It writes a file of real JPEGs, no two of them alike, into a temporary folder, and does with it what rank 0 does: open
it, check and tokenise every row, start again, and read images in the order of training. The temporary folder needs
twice the size of the file, since parquet gets an uncompressed copy for random access.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from digits.checkpoint import make_processor
from PIL import Image

from bench.machine import commit, hardware, versions
from bench.resident import TreeSampler
from megatron_vppo.config.schema import RunConfig
from megatron_vppo.data.arrow_copy import SETTLED_SECONDS
from megatron_vppo.data.stream import PromptStream
from megatron_vppo.models.model_files import ModelFiles
from megatron_vppo.setup.inputs import RunInputs, open_inputs, read_prompts

ROOT = Path(__file__).resolve().parents[2]
SIDE = 448
IMAGES = 32
PROBLEM = "<image>What is the length of the side that is marked x? Row {}."
GROUP = 500
MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--kind", choices=["parquet", "json", "jsonl"], default="parquet")
    parser.add_argument("--workers", type=int, default=2, help="data.num_workers")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        result = measure(Path(folder), rows=options.rows, kind=options.kind, workers=options.workers)
    about = {"hardware": hardware(), "versions": versions(), **commit(ROOT)}
    print(json.dumps({**about, "command": sys.argv[1:], **result}, indent=1))


def measure(folder: Path, *, rows: int, kind: str, workers: int) -> dict[str, Any]:
    """Writes the file, starts twice and reads every image once."""
    file = folder / f"rows.{kind}"
    write_parquet(file, rows) if kind == "parquet" else write_json(file, rows)
    config = RunConfig.model_validate(
        {
            "data": {"train_files": str(file), "prompt_key": "messages", "num_workers": workers},
            "model": {"path": "none"},
            "trainer": {"runs_dir": str(folder / "runs")},
        }
    )
    no_config: Any = None
    model = ModelFiles(hf_config=no_config, processor=make_processor(), eos_ids=(0,))
    kept: list[Any] = []
    phases: dict[str, Callable[[], Any]] = {
        "first open": lambda: open_inputs(config, model),
        "later open": lambda: kept.append(open_inputs(config, model)),
        "first check": lambda: read_prompts(config, kept[0], "train"),
        "later check": lambda: kept.append(read_prompts(config, kept[0], "train")),
        "one epoch of images": lambda: _read_epoch(kept[0], PromptStream(kept[1], seed=1, shuffle=True), rows),
    }
    time.sleep(SETTLED_SECONDS + 0.1)  # the hash of a younger file is not kept
    before, found = _own_mib("RssAnon"), {}
    for name, phase in phases.items():
        found[name] = _measured(phase)
        print(f"{name}: {found[name]}", file=sys.stderr)
    copies = sum(path.stat().st_size for path in (folder / "cache").rglob("*") if path.is_file())
    checked = sum(path.stat().st_size for path in (folder / "runs").rglob("*.npz"))
    return {
        "rows": rows,
        "file_mib": round(file.stat().st_size / MIB, 1),
        "copy_mib": round(copies / MIB, 1),
        "kept_check_mib": round(checked / MIB, 1),
        "anonymous_mib_before": before,
        "phases": found,
    }


def _read_epoch(inputs: RunInputs, stream: PromptStream, rows: int) -> None:
    """Reads the images of every prompt in the order of training, as bytes."""
    dataset = inputs.datasets["train"]
    for prompt in _prompts(stream, rows):
        for ref in prompt.images:
            dataset.image_bytes(ref.row, ref.index)


def _prompts(stream: PromptStream, rows: int) -> Iterator[Any]:
    for _ in range(rows // GROUP):
        yield from stream.next(GROUP)


def _measured(phase: Callable[[], Any]) -> dict[str, float]:
    """Runs a phase. Anonymous memory is what is left of it in this process, and the peak of all processes together."""
    sampler, start = TreeSampler(os.getpid(), interval_seconds=0.05), time.perf_counter()
    phase()
    seconds, peak = time.perf_counter() - start, sampler.stop()
    return {
        "seconds": round(seconds, 2),
        "anonymous_mib_after": _own_mib("RssAnon"),
        "mapped_mib_after": _own_mib("RssFile"),
        "anonymous_mib_peak_of_all": round(peak.anonymous, 1),
        "processes": peak.processes,
    }


def _own_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024, 1)


# --- Rows -------------------------------------------------------------------------------------------------------------


def write_parquet(file: Path, rows: int) -> None:
    """Writes rows with their images in them, about 60 KB each; LLaMA-Factory's form."""
    images = [jpeg(seed) for seed in range(IMAGES)]
    schema = pa.schema(
        {
            "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
            "images": pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()})),
        }
    )
    with pq.ParquetWriter(file, schema, use_dictionary=False) as writer:
        for begin in range(0, rows, GROUP):
            some = [
                {**row(number), "images": [{"bytes": images[number % IMAGES] + number.to_bytes(8, "big")}]}
                for number in range(begin, min(begin + GROUP, rows))
            ]
            writer.write_table(pa.Table.from_pylist(some, schema))


def write_json(file: Path, rows: int) -> None:
    """Writes rows with paths of IMAGES images next to the file, as a list or as lines."""
    for number in range(IMAGES):
        (file.parent / f"{number}.jpg").write_bytes(jpeg(number))
    with file.open("w") as out:
        for number in range(rows):
            text = json.dumps({**row(number), "images": [f"{number % IMAGES}.jpg"]})
            is_list = file.suffix == ".json"
            out.write(("[" if number == 0 else ",\n") + text if is_list else text + "\n")
        out.write("]" if file.suffix == ".json" else "")


def row(number: int) -> dict[str, Any]:
    turns = [{"role": "user", "content": PROBLEM.format(number)}, {"role": "assistant", "content": str(number)}]
    return {"messages": turns}


def jpeg(seed: int) -> bytes:
    """Makes a JPEG of the size of those in ViRL39K."""
    source = np.random.default_rng(seed)
    coarse = source.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = np.clip(smooth + source.integers(-20, 21, smooth.shape), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
