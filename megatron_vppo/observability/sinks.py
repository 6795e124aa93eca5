"""The destinations of a step's numbers: metrics.jsonl and TensorBoard always, W&B and SwanLab on request.

A sink is opened with the step that the run resumes from. Later steps will be computed again, so it drops them.
"""

from __future__ import annotations

import importlib
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_vppo.observability.json_lines import dump_line, parse_lines
from megatron_vppo.system.whole import naming_file, whole_file

METRICS_FILE = "metrics.jsonl"


class Sink(Protocol):
    def write(self, step: int, time: float, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonLinesSink:
    """metrics.jsonl: {"step": n, "time": unix seconds, name: value, ...}, one line per step, in step order."""

    def __init__(self, run_dir: Path, *, resume_step: int | None) -> None:
        path = run_dir / METRICS_FILE
        if path.exists():
            _cut_after(path, -1 if resume_step is None else resume_step)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  (stays open as long as the run)

    def write(self, step: int, time: float, metrics: Mapping[str, float]) -> None:
        # One write call for the whole line, then to disk: after a crash only the last line can be incomplete.
        with naming_file(self._file.name):
            self._file.write(dump_line({"step": step, "time": round(time, 3), **metrics}))
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with naming_file(self._file.name):
            self._file.close()


class TensorBoardSink:
    """TensorBoard scalars under the same names, in <run>/tensorboard."""

    def __init__(self, run_dir: Path, *, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes two seconds; only the writing rank pays them

        purge_step = 0 if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(log_dir=str(run_dir / "tensorboard"), purge_step=purge_step)

    def write(self, step: int, time: float, metrics: Mapping[str, float]) -> None:
        with naming_file(self._writer.log_dir):
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, global_step=step, walltime=time)
            self._writer.flush()

    def close(self) -> None:
        with naming_file(self._writer.log_dir):
            self._writer.close()


class WandbSink:
    """Weights & Biases. Its own variables decide on offline mode and sign-in (WANDB_MODE, WANDB_API_KEY)."""

    def __init__(
        self, run_dir: Path, *, resume_step: int | None, project: str, experiment: str, config: Mapping[str, Any]
    ) -> None:
        wandb = _import_logger("wandb")
        self._run = wandb.init(
            project=project,
            name=experiment,
            config=dict(config),
            dir=str(run_dir),
            id=_stable_id(run_dir / "wandb_run_id", fresh=resume_step is None),
            resume="allow",
        )

    def write(self, step: int, time: float, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class SwanlabSink:
    """SwanLab. Its own variables decide on offline mode and sign-in (SWANLAB_MODE, SWANLAB_API_KEY)."""

    def __init__(
        self, run_dir: Path, *, resume_step: int | None, project: str, experiment: str, config: Mapping[str, Any]
    ) -> None:
        swanlab = _import_logger("swanlab")
        self._run = swanlab.init(
            project=project,
            experiment_name=experiment,
            config=dict(config),
            logdir=str(run_dir / "swanlog"),
            id=_stable_id(run_dir / "swanlab_run_id", fresh=resume_step is None),
            resume="allow",
        )

    def write(self, step: int, time: float, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


SERVICES: dict[str, type[WandbSink] | type[SwanlabSink]] = {"wandb": WandbSink, "swanlab": SwanlabSink}


def _cut_after(path: Path, last_step: int) -> None:
    """Keeps the complete lines of steps up to last_step. The file is replaced as a whole, or not at all."""
    with open(path, encoding="utf-8-sig", errors="replace") as lines, whole_file(path) as kept:
        for record in parse_lines(lines):
            if isinstance(record.get("step"), int) and record["step"] <= last_step:
                kept.write(dump_line(record).encode())


def _import_logger(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise RuntimeError(
            f"trainer.loggers asks for '{package}', which cannot be imported ({error}): "
            f"pip install 'megatron_vppo[loggers]', or leave '{package}' out of trainer.loggers"
        ) from error


def _stable_id(path: Path, *, fresh: bool) -> str:
    """Returns the service's id of this run. A resumed run continues under the id that it began with."""
    if fresh or not path.exists():
        path.write_text(uuid.uuid4().hex[:21])
    return path.read_text().strip()
