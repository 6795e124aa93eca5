"""Makes the digits model: a Qwen-VL of 2.5 M parameters that is right about some of the held-out images.

    python tools/digits/make_model.py --data build/digits/data --out build/digits/model [--family qwen3-vl]

The result is an ordinary Hugging Face folder, which transformers and vLLM load.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# Waiting threads sleep: on a busy machine, spinning costs five times the work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
from transformers import AutoModelForImageTextToText

from digits.checkpoint import FAMILIES, make_config, make_model, make_processor, save_checkpoint
from digits.cold_start import load_rows, train
from digits.folder import STAMP, build_once
from digits.pairs import PAIRS
from digits.task import Task


def write_model(
    out: Path,
    *,
    task: Task,
    data: Path,
    start: Path | None = None,
    family: str,
    band: tuple[float, float],
    stop_at: float,
    max_steps: int,
    batch: int,
    misread_share: float,
    lr: float,
    threads: int,
    seed: int,
) -> dict[str, Any]:
    """Trains from random weights, or from those of `start`, and saves into the existing folder `out`."""
    begin = time.perf_counter()
    torch.set_num_threads(threads)  # a seed gives the same weights again for the same number of threads
    processor = make_processor(family)
    if start is None:
        model = make_model(make_config(processor.tokenizer, family), seed=seed)
    else:
        model = AutoModelForImageTextToText.from_pretrained(start, dtype=torch.float32)
    params = sum(p.numel() for p in model.parameters())
    print(f"a {family} of {params:,} parameters; supervised steps until {stop_at:.0%} of held-out responses are right")
    reached = train(
        model,
        processor,
        task,
        load_rows(data, "train", processor),
        load_rows(data, "val", processor),
        band=band,
        stop_at=stop_at,
        max_steps=max_steps,
        batch=batch,
        misread_share=misread_share,
        lr=lr,
        seed=seed,
        report=lambda line: print(line, flush=True),
    )
    save_checkpoint(model, processor, out)
    return {
        "accuracy": round(reached.sampled, 4),
        "accuracy_greedy": round(reached.greedy, 4),
        "steps": reached.steps,
        "params": params,
        "seconds": round(time.perf_counter() - begin, 1),
        "cpu_seconds": round(time.process_time(), 1),
    }


def main(
    task: Task = PAIRS,
    *,
    from_model: bool = False,
    batch: int = 64,
    misread_share: float = 0.35,
    lr: float = 2e-3,
    description: str | None = __doc__,
) -> None:
    """Reads the command line and builds the start model of a task.

    Args:
        from_model: training begins with a model that this program made of another task, which `--start` names.
        batch, misread_share, lr: the defaults of these options.
        description: the text of `--help`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that make_data.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    if from_model:
        parser.add_argument("--start", type=Path, required=True, help="folder of the model to begin with")
    else:
        parser.add_argument("--family", choices=FAMILIES, default=FAMILIES[0])
    parser.add_argument(
        "--band", type=float, nargs=2, default=(0.30, 0.45), metavar=("LOW", "HIGH"), help="allowed held-out accuracy"
    )
    parser.add_argument("--stop-at", type=float, default=0.38, help="held-out accuracy to stop at")
    parser.add_argument("--max-steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument(
        "--misread-share", type=float, default=misread_share, help="share of demonstrations with a wrong digit"
    )
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    folders = {"data": options.data} | ({"start": options.start} if from_model else {})
    stamps: dict[str, Any] = {}
    for name, folder in folders.items():
        if not (folder / STAMP).is_file():
            program = {"data": "make_data.py", "start": "make_model.py"}[name]
            parser.error(f"{folder} was not written by {program}; run that first")
        stamps[name] = json.loads((folder / STAMP).read_text())["arguments"]
    training = {k: v for k, v in vars(options).items() if k not in ("out", *folders)}
    settings = {k: v for k, v in training.items() if k != "threads"}  # it changes only how sums are rounded
    if from_model:
        training |= {"start": options.start, "family": stamps["start"]["family"]}
    result, reused = build_once(
        options.out,
        {**settings, **stamps},
        lambda folder: write_model(folder, task=task, data=options.data, **training),
    )
    print(json.dumps({**result, "reused": reused}))


if __name__ == "__main__":
    main()
