"""Measures seconds per phase, tokens per second, FLOP rates and peak memory of `vppo train`, as one JSON object.

    python tools/bench/step_time.py --config demo|compute|FILE [--steps N] [key=value ...]

Runs the real command in a temporary folder and reads what it logs; its own output goes to stderr. 'demo' is
examples/digits_cpu/config.yaml, 'compute' is tools/bench/configs/compute.yaml; their models and data are built first if
they are missing. tools/bench/README.md explains the numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

from transformers import AutoConfig, AutoProcessor

from bench.flops import StepShape, phase_flops
from bench.machine import commit, hardware, matmul_gflops, versions
from bench.process_memory import MemorySampler, ProcessPeak, by_role
from bench.timing import measured_lines, median, phase_seconds, startup_seconds
from megatron_vppo.config.checks import ranks_per_copy
from megatron_vppo.config.load import load_config
from megatron_vppo.config.schema import RunConfig
from megatron_vppo.data.dataset import open_dataset
from megatron_vppo.data.geometry import ImageGeometry
from megatron_vppo.models.flops import model_cost
from megatron_vppo.observability.metrics import read_metrics
from megatron_vppo.rollout.os_processes import members
from megatron_vppo.setup.settings import vppo_settings

ROOT = Path(__file__).resolve().parents[2]
DEMO_DATA, DEMO_MODEL = "build/digits/data", "build/digits/model"
RANDOM = "build/bench/random_60m"
CONFIGS: dict[str, tuple[str, list[list[str]]]] = {
    "demo": (
        "examples/digits_cpu/config.yaml",
        [
            ["tools/digits/make_data.py", "--out", DEMO_DATA],
            ["tools/digits/make_model.py", "--data", DEMO_DATA, "--out", DEMO_MODEL],
        ],
    ),
    "compute": ("tools/bench/configs/compute.yaml", [["tools/bench/random_model.py", "--out", RANDOM]]),
}
"""The configuration file of each name, and the programs that build its model and data."""

WARMUP_STEPS = 1
ROWS_LOOKED_AT = 64
END_SECONDS = 20
"""The time that a run gets to end its ranks when it is interrupted."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="demo, compute, or a YAML file")
    parser.add_argument("--steps", type=int, default=3, help="measured steps, after one step of warm-up (default: 3)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as for vppo train")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps {options.steps}: at least one step has to be measured")
    print(json.dumps(measure(options.config, steps=options.steps, overrides=options.overrides), indent=1))


def measure(name: str, *, steps: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Builds model and data, runs, and puts the report together."""
    path, builders = CONFIGS.get(name, (name, []))
    for builder in builders:
        subprocess.run([sys.executable, *builder], cwd=ROOT, stdout=sys.stderr, check=True)
    with tempfile.TemporaryDirectory(prefix="vppo-bench-", ignore_cleanup_errors=True) as runs_dir:
        settings = [*overrides, *run_settings(runs_dir, steps=steps)]
        config = load_config(_from_root(path), settings)
        threads = trainer_threads(config)
        ceilings, loads = [matmul_gflops(threads=threads)], [os.getloadavg()[0]]
        started = time.time()
        peaks = run_training(path, settings)
        ended = time.time()
        loads.append(os.getloadavg()[0])
        ceilings.append(matmul_gflops(threads=threads))
        lines = read_metrics(Path(runs_dir) / config.trainer.project_name / config.trainer.experiment_name)
    measured = measured_lines(lines, warmup=WARMUP_STEPS, steps=steps)
    shape = step_shape(config, median(measured, "rollout/sampled_groups"), median(measured, "rollout/trained_groups"),
                       median(measured, "prompt_length/mean"), median(measured, "response_length/mean"))  # fmt: skip
    seconds = phase_seconds(measured)
    machine = hardware()
    flops = phase_flops(shape, model_cost(AutoConfig.from_pretrained(_from_root(config.model.path))))
    return {
        "config": path,
        "overrides": list(overrides),
        "measured_steps": steps,
        "startup_s": round(startup_seconds(lines, started=started), 2),
        "total_s": round(ended - started, 2),
        "seconds": _rounded(seconds),
        "tokens_per_s": {phase: round(n / seconds[phase]["median"], 1) for phase, n in shape.phase_tokens().items()},
        "floor": None if machine["gpus"] else floor(flops, seconds, ceilings=ceilings, threads=threads),
        "shape": asdict(shape),
        "weight_sync_mib": round(median(measured, "weight_sync/bytes") / 2**20, 1),
        "memory": by_role(peaks),
        "hardware": machine,
        "load_average": {"before": round(loads[0], 2), "after": round(loads[1], 2)},
        "versions": versions(),
        "git": commit(ROOT),
        "settings": config.model_dump(mode="json"),
    }


def run_settings(runs_dir: str, *, steps: int) -> list[str]:
    """Settings for a new run without validation and export. Its last step writes a checkpoint, which is not counted."""
    return [
        f"trainer.runs_dir={runs_dir}",
        f"trainer.total_steps={WARMUP_STEPS + steps}",
        "trainer.val_before_train=false",
        "data.val_files=null",
        "trainer.save_freq=-1",
        "trainer.save_hf=false",
        "trainer.resume=false",
    ]


def run_training(path: str, settings: Sequence[str]) -> list[ProcessPeak]:
    """Runs `vppo train` in a process group of its own, with its output on stderr. Returns each process's peak memory.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-m", "megatron_vppo.cli.main", "train", "--config", path, *settings]
    with subprocess.Popen(command, cwd=ROOT, stdout=sys.stderr, start_new_session=True) as process:
        memory = MemorySampler(process.pid)
        try:
            status = process.wait()
        finally:
            _end_group(process)
            peaks = memory.stop()
    if status:
        raise RuntimeError(f"vppo train ended with status {status}; its last lines are above")
    return peaks


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends what is left of the run by SIGTERM, then SIGKILL. Engines notice that their trainer is gone and end too."""
    for ending in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + END_SECONDS
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, ending)
        while members(process.pid):
            if time.monotonic() > deadline:
                break
            process.poll()
            time.sleep(0.1)
        else:
            return


def trainer_threads(config: RunConfig) -> int:
    """Returns the threads of all trainer ranks together, on a machine without GPUs."""
    parallel = config.parallel
    return ranks_per_copy(config) * (parallel.data_parallel_size or 1) * parallel.threads_per_rank


def step_shape(
    config: RunConfig, sampled_groups: float, trained_groups: float, prompt_tokens: float, response_tokens: float
) -> StepShape:
    """Returns the shape of a step. Lengths are means over all sampled responses, so that dropped groups count, too."""
    per = config.algorithm.perturb.per
    return StepShape(
        sampled_groups=sampled_groups,
        trained_groups=trained_groups,
        responses_per_group=config.rollout.n,
        prompt_tokens=prompt_tokens,
        response_tokens=response_tokens,
        patches_per_prompt=patches_per_prompt(config),
        views=2 if vppo_settings(config).needs_dependency else 1,
        perturbations=1 if per == "image" else config.rollout.n if per == "row" else min(per, config.rollout.n),
        epochs=config.actor.ppo_epochs,
        shared_prefix=config.parallel.shared_prefix and config.parallel.context_parallel_size == 1,
        updated_views=2 if vppo_settings(config).updates_both_views else 1,
    )


def patches_per_prompt(config: RunConfig) -> float:
    """Returns the patches of a prompt's images after the resize, on average over the first training rows."""
    data = config.data
    rows = open_dataset(
        str(_from_root(data.train_files)),
        problem_key=data.prompt_key,
        answer_key=data.answer_key,
        image_key=data.image_key,
        image_dir=data.image_dir,
        image_place=data.image_place,
        max_rows=ROWS_LOOKED_AT,
    )
    geometry = ImageGeometry.from_processor(
        AutoProcessor.from_pretrained(_from_root(config.model.path)).image_processor,
        min_pixels=data.min_pixels,
        max_pixels=data.max_pixels,
        mode=config.algorithm.resize,
    )
    patches = 0
    for row in range(len(rows)):
        for index in range(len(rows.image_cells(row))):
            _, down, across = geometry.grid(*rows.image_size(row, index))
            patches += down * across
    return patches / len(rows)


def floor(
    flops: dict[str, float], seconds: dict[str, dict[str, float]], *, ceilings: Sequence[float], threads: int
) -> dict[str, Any]:
    """Returns the seconds of the arithmetic alone, if all of it ran at the speed of the matrix product."""
    ceiling = max(ceilings)
    phases = {}
    for phase, count in flops.items():
        took = seconds[phase]["median"]
        phases[phase] = {
            "gflop": round(count / 1e9, 2),
            "gflops": round(count / 1e9 / took, 2),
            "floor_s": round(count / 1e9 / ceiling, 3),
            "of_ceiling": round(count / 1e9 / took / ceiling, 4),
        }
    return {"matmul_gflops": [round(c, 1) for c in ceilings], "matmul_threads": threads, "phases": phases}


def _from_root(path: str) -> str:
    """Resolves a path of a configuration from the repository root, where `vppo train` runs. Leaves hub ids alone."""
    return str(ROOT / path) if (ROOT / path.partition("@")[0]).exists() else path


def _rounded(table: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {name: {key: round(value, 4) for key, value in row.items()} for name, row in table.items()}


if __name__ == "__main__":
    main()
