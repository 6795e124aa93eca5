"""The numbers of a run, one line per step. docs/metrics.md has the meaning and the unit of each name."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, SupportsFloat

from megatron_vppo.observability.json_lines import number, parse_lines
from megatron_vppo.observability.progress import Progress
from megatron_vppo.observability.sinks import METRICS_FILE, SERVICES, JsonLinesSink, Sink, TensorBoardSink

Reduction = Literal["mean", "sum", "min", "max"]


class RunLog:
    """Collects the numbers of a step and writes them when the step ends.

        log = RunLog(run_dir, is_writer=rank == 0, resume_step=loaded_step)
        with log.step(n):
            with log.span("update_actor"):          # adds its seconds to timing_s/update_actor
                log.add_all(policy.update(batch))

    A name that is added several times within a step is reduced to one number: `.../max` and `..._max` keep the largest,
    `.../min` and `..._min` the smallest, `timing_s/...` the sum, all others the mean, unless `add(reduce=...)` says
    otherwise. Values added between two steps belong to the next step. A step that fails writes nothing.

    `RunLog` itself adds timing_s/step, perf/time_per_step, perf/max_memory_allocated_gb, and perf/throughput if
    perf/total_num_tokens was added.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        is_writer: bool = True,
        resume_step: int | None = None,
        loggers: Sequence[str] = (),
        project: str = "",
        experiment: str = "",
        config: Mapping[str, Any] | None = None,
        num_devices: int = 1,
        progress: Progress | None = None,
    ) -> None:
        """
        Args:
            is_writer: True on exactly one rank. On the others the log accepts everything and keeps nothing.
            resume_step: the step whose checkpoint was loaded; lines of later steps are deleted. None: a new run; all
                lines of an earlier run in this folder are deleted.
            loggers: any of 'wandb' and 'swanlab'. Their packages are imported only if they are named.
            project: the name of the project at these services.
            experiment: the name of the run at these services.
            config: the resolved settings, for these services.
            num_devices: trainer devices, the denominator of perf/throughput.
            progress: the terminal display, which is told about steps and spans.

        Raises:
            ValueError: an unknown logger.
            RuntimeError: a logger whose package is missing.
        """
        unknown = [name for name in loggers if name not in SERVICES]
        if unknown:
            raise ValueError(f"trainer.loggers names '{unknown[0]}', which is not one of {', '.join(sorted(SERVICES))}")
        self._writes = is_writer
        self._num_devices = num_devices
        self._progress = progress if is_writer else None
        self._last_step = -1 if resume_step is None else resume_step
        self._values: dict[str, tuple[Reduction, list[float]]] = {}
        self._began = time.perf_counter()
        self._sinks: list[Sink] = []
        if is_writer:
            folder = Path(run_dir)
            folder.mkdir(parents=True, exist_ok=True)
            # Services first, so that a missing package is reported before an earlier run loses its lines.
            for name in loggers:
                self._sinks.append(
                    SERVICES[name](
                        folder, resume_step=resume_step, project=project, experiment=experiment, config=config or {}
                    )
                )
            self._sinks.append(JsonLinesSink(folder, resume_step=resume_step))
            self._sinks.append(TensorBoardSink(folder, resume_step=resume_step))

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Collects the numbers of one training step, and writes them if the block ends without an exception.

        Step 0 is for what runs before training.

        Raises:
            ValueError: the step does not come after the last one; raised on every rank.
        """
        if step <= self._last_step:
            raise ValueError(f"step {step} after step {self._last_step}: metrics.jsonl has each step once, in order")
        self._began = time.perf_counter()
        if self._progress:
            self._progress.begin_step(step)
        try:
            yield
        except BaseException:
            self._values.clear()
            if self._progress:
                self._progress.abandon_step()
            raise
        self._last_step = step
        if self._writes:
            self._write(step, seconds=time.perf_counter() - self._began)

    def pending(self) -> dict[str, Any]:
        """Returns the numbers of the unfinished step as JSON values, and its seconds so far; {} where nothing is kept.

        `restore` takes them, in the same process or in a later one.
        """
        if not self._writes:
            return {}
        values = {name: [reduction, list(values)] for name, (reduction, values) in self._values.items()}
        return {"values": values, "seconds": time.perf_counter() - self._began}

    def restore(self, pending: Mapping[str, Any]) -> None:
        """Puts the numbers of an unfinished step in front of those of the present one."""
        if not self._writes or not pending:
            return
        for name, (reduction, values) in pending["values"].items():
            for value in values:
                self.add(name, value, reduce=reduction)
        self._began -= pending["seconds"]

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Adds the seconds of the block to timing_s/<name>.

        Spans of a step should not overlap, because they are shown as parts of timing_s/step.
        """
        if not self._writes:
            yield
            return
        began = time.perf_counter()
        if self._progress:
            self._progress.begin_phase(name)
        try:
            yield
        finally:
            if self._progress:
                self._progress.end_phase()
            self.add(f"timing_s/{name}", time.perf_counter() - began)

    def add(self, name: str, value: SupportsFloat, *, reduce: Reduction | None = None) -> None:
        """Adds a number: a Python number, or a tensor of one element, which only the writing rank reads."""
        if self._writes:
            reduction, values = self._values.setdefault(name, (reduce or _reduction_of(name), []))
            if reduce not in (None, reduction):
                raise ValueError(f"{name} was added with reduce='{reduction}' and now with reduce='{reduce}'")
            values.append(float(value))

    def add_all(self, metrics: Mapping[str, SupportsFloat]) -> None:
        for name, value in metrics.items():
            self.add(name, value)

    def close(self) -> None:
        """Ends the display and closes files and services. Finished steps are on disk before that."""
        if self._progress:
            self._progress.close()
        for sink in self._sinks:
            sink.close()
        self._sinks = []

    def _write(self, step: int, *, seconds: float) -> None:
        metrics = {name: _reduce(reduction, values) for name, (reduction, values) in self._values.items()}
        self._values.clear()
        metrics["timing_s/step"] = seconds
        metrics["perf/time_per_step"] = seconds
        metrics["perf/max_memory_allocated_gb"] = peak_memory_gb()
        if "perf/total_num_tokens" in metrics:
            metrics["perf/throughput"] = metrics["perf/total_num_tokens"] / seconds / self._num_devices
        now = time.time()
        for sink in self._sinks:
            sink.write(step, now, metrics)
        if self._progress:
            self._progress.end_step(step, metrics)


def read_metrics(run_dir: str | Path) -> list[dict[str, float]]:
    """Reads the lines of a run's metrics.jsonl in step order, numbers only. Returns [] if there is no file.

    A line whose step is no whole number is left out. If a step appears twice, as in a file put together by hand, the
    later line counts.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.exists():
        return []
    by_step: dict[float, dict[str, float]] = {}
    with open(path, encoding="utf-8-sig", errors="replace") as lines:
        for record in parse_lines(lines):
            values = {name: value for name, raw in record.items() if (value := number(raw)) is not None}
            if values.get("step", math.nan).is_integer():
                by_step[values["step"]] = values
    return [by_step[step] for step in sorted(by_step)]


def peak_memory_gb() -> float:
    """Returns the largest memory so far, in GiB: torch's allocations on the GPU, or the resident set without one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_allocated()) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # macOS counts bytes, Linux KiB


def _reduction_of(name: str) -> Reduction:
    if name.startswith("timing_s/"):
        return "sum"
    if name.endswith(("/max", "_max")):
        return "max"
    if name.endswith(("/min", "_min")):
        return "min"
    return "mean"


def _reduce(reduction: Reduction, values: list[float]) -> float:
    if any(value != value for value in values):  # max() and min() would drop or keep a NaN by its position
        return float("nan")
    if reduction == "mean":
        return sum(values) / len(values)
    if reduction == "sum":
        return sum(values)
    return max(values) if reduction == "max" else min(values)
