"""The check of all rows at the start of a run for scaling.py: a data set of the real number of rows, cheap images."""

from __future__ import annotations

import io
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from digits.checkpoint import make_processor
from PIL import Image

from megatron_vppo.config.schema import RunConfig
from megatron_vppo.models.model_files import ModelFiles
from megatron_vppo.setup.inputs import open_inputs, read_prompts

IMAGE_SIDE = 448
DISTINCT_IMAGES = 16
PROBLEM = "<image>" + "What is the length of the side that is marked x? " * 4


def row_check_seconds(rows: int) -> dict[str, dict[str, float]]:
    """Times two starts of a run: one that checks and tokenises every row, and one that finds that in the cache.

    cpu_s is that of rank 0, workers_cpu_s that of all of its `data.num_workers` processes together.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.parquet"
        _write_rows(file, rows)
        config = RunConfig.model_validate(
            {"data": {"train_files": str(file)}, "model": {"path": "none"}, "trainer": {"runs_dir": f"{folder}/runs"}}
        )
        return {
            name: _timed(lambda: _start(config, rows), rows)
            for name in ("check of all rows, first start", "check of all rows, later starts")
        }


def _start(config: RunConfig, rows: int) -> None:
    no_config: Any = None
    model = ModelFiles(hf_config=no_config, processor=make_processor(), eos_ids=(0,))
    prompts = read_prompts(config, open_inputs(config, model), "train")
    assert len(prompts) == rows, "all of them can be used"


def _timed(start: Callable[[], None], rows: int) -> dict[str, float]:
    cpu, workers, wall = time.process_time(), _cpu_of_children(), time.perf_counter()
    start()
    wall = time.perf_counter() - wall
    return {
        "cpu_s": round(time.process_time() - cpu, 3),
        "workers_cpu_s": round(_cpu_of_children() - workers, 3),
        "wall_s": round(wall, 3),
        "rows_per_s": round(rows / wall),
    }


def _cpu_of_children() -> float:
    """Returns the CPU seconds of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _write_rows(file: Path, rows: int) -> None:
    images = [{"bytes": _jpeg(seed), "path": None} for seed in range(DISTINCT_IMAGES)]
    columns = {
        "problem": [PROBLEM] * rows,
        "answer": [str(row) for row in range(rows)],
        "images": [[images[row % DISTINCT_IMAGES]] for row in range(rows)],
    }
    pq.write_table(pa.table(columns), file, row_group_size=1000)


def _jpeg(seed: int) -> bytes:
    """Makes a JPEG as large as those of real data, but smooth, and so a small file."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()
