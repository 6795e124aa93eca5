"""metrics.jsonl and TensorBoard: what is on disk after steps, failures, kills and resumed runs."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_vppo.observability.metrics import RunLog, peak_memory_gb, read_metrics


def strict_lines(run_dir: Path) -> list[dict]:
    """Lines read as another program would: NaN and Infinity are not JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (run_dir / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def log_steps(run_dir: Path, steps: range, value: float, *, resume_step: int | None = None) -> None:
    log = RunLog(run_dir, resume_step=resume_step)
    for step in steps:
        with log.step(step):
            log.add("critic/score/mean", value)
    log.close()


def test_a_step_becomes_one_line_with_its_spans(tmp_path: Path) -> None:
    log = RunLog(tmp_path, num_devices=2)
    with log.step(1):
        with log.span("gen"):
            time.sleep(0.05)
        with log.span("gen"):
            time.sleep(0.05)
        with log.span("update_actor"):
            log.add_all({"actor/pg_loss": torch.tensor(0.5), "perf/total_num_tokens": 1000})
        assert (tmp_path / "metrics.jsonl").read_text() == ""  # the line comes when the step has ended
    (line,) = strict_lines(tmp_path)
    assert line["step"] == 1 and abs(line["time"] - time.time()) < 60
    assert line["actor/pg_loss"] == 0.5
    assert 0.1 <= line["timing_s/gen"] < line["timing_s/step"]
    assert 0 < line["timing_s/update_actor"] <= line["timing_s/step"] - line["timing_s/gen"]
    assert line["perf/time_per_step"] == line["timing_s/step"]
    assert line["perf/throughput"] == pytest.approx(1000 / line["timing_s/step"] / 2)
    log.close()


def test_values_of_several_mini_batches_are_reduced_by_their_names(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    with log.step(1):
        for value in (1.0, 5.0, 3.0):
            log.add_all({"actor/loss": value, "critic/score/max": value, "critic/score/min": value})
            log.add_all({"actor/global_sensitivity_score_min": value, "actor/global_sensitivity_score_max": value})
            log.add_all({"actor/dynamic_scaling_max": value, "training/rollout_logp_diff_max": value})
            log.add("timing_s/gen", value)
            log.add("rollout/kept_groups", value, reduce="sum")
        with pytest.raises(ValueError, match="reduce='sum' and now with reduce='max'"):
            log.add("rollout/kept_groups", 1.0, reduce="max")
    (line,) = strict_lines(tmp_path)
    assert line["actor/loss"] == 3.0
    assert (line["critic/score/max"], line["critic/score/min"]) == (5.0, 1.0)
    assert (line["actor/global_sensitivity_score_min"], line["actor/global_sensitivity_score_max"]) == (1.0, 5.0)
    assert (line["actor/dynamic_scaling_max"], line["training/rollout_logp_diff_max"]) == (5.0, 5.0)
    assert (line["timing_s/gen"], line["rollout/kept_groups"]) == (9.0, 9.0)
    log.close()


def test_non_finite_values_are_valid_json_and_read_back(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    with log.step(1):
        log.add_all({"a": math.nan, "b": math.inf, "c": -math.inf})
        log.add_all({"d/max": 2.0})
        log.add_all({"d/max": math.nan})  # max() alone would forget it
    log.close()
    (line,) = strict_lines(tmp_path)
    assert (line["a"], line["b"], line["c"], line["d/max"]) == ("NaN", "Infinity", "-Infinity", "NaN")
    (read,) = read_metrics(tmp_path)
    assert math.isnan(read["a"]) and read["b"] == math.inf and read["c"] == -math.inf and math.isnan(read["d/max"])


def test_a_resumed_run_replaces_the_steps_after_its_checkpoint(tmp_path: Path) -> None:
    log_steps(tmp_path, range(0, 6), 0.1)
    log_steps(tmp_path, range(4, 7), 0.9, resume_step=3)
    lines = strict_lines(tmp_path)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6]
    assert [line["critic/score/mean"] for line in lines] == [0.1] * 4 + [0.9] * 3


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    log_steps(tmp_path, range(0, 6), 0.1)
    time.sleep(1.1)  # event files are named by the second
    log_steps(tmp_path, range(4, 7), 0.9, resume_step=3)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("critic/score/mean")
    assert [event.step for event in scalars] == [0, 1, 2, 3, 4, 5, 6]
    assert [event.value for event in scalars] == pytest.approx([0.1] * 4 + [0.9] * 3)


def test_a_new_run_in_an_old_folder_starts_with_an_empty_file(tmp_path: Path) -> None:
    log_steps(tmp_path, range(0, 3), 0.1)
    log_steps(tmp_path, range(0, 2), 0.9)
    assert [(line["step"], line["critic/score/mean"]) for line in strict_lines(tmp_path)] == [(0, 0.9), (1, 0.9)]


def test_a_line_cut_by_a_crash_is_dropped_on_resume(tmp_path: Path) -> None:
    log_steps(tmp_path, range(1, 4), 0.1)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "time": 1.0, "critic/sc')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    log_steps(tmp_path, range(4, 5), 0.9, resume_step=3)
    assert [line["step"] for line in strict_lines(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("line", "read"),
    [
        ('{"step": NaN, "a": 1}', []),
        ('{"step": Infinity, "a": 1}', []),
        ('{"step": 1.5, "a": 1}', []),
        ("[" * 100_000, []),
        ('{"step": 2, "a": ' + "[" * 100_000, []),
        (f'{{"step": 2, "a": {10**400}, "b": {-(10**400)}}}', [{"step": 2.0, "a": math.inf, "b": -math.inf}]),
        (f'{{"step": 2, "a": {"1" * 5000}}}', []),
        ('{"step": 2, "a": [1], "b": null, "c": "1", "d": true}', [{"step": 2.0}]),
    ],
)
def test_a_strange_line_costs_only_what_it_held(line: str, read: list[dict[str, float]], tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{line}\n{{"step": 3}}\n')
    assert read_metrics(tmp_path) == [*read, {"step": 3.0}]
    log_steps(tmp_path, range(4, 5), 0.9, resume_step=3)
    assert [line["step"] for line in strict_lines(tmp_path)][-2:] == [3, 4]


def test_the_mark_of_an_editor_costs_no_line(tmp_path: Path) -> None:
    log_steps(tmp_path, range(0, 3), 0.1)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2]
    log_steps(tmp_path, range(3, 4), 0.9, resume_step=2)
    assert [line["step"] for line in strict_lines(tmp_path)] == [0, 1, 2, 3]


def test_finished_steps_survive_a_kill_in_mid_step(tmp_path: Path) -> None:
    program = f"""
import os, signal
from megatron_vppo.observability.metrics import RunLog
log = RunLog({str(tmp_path)!r})
for step in (1, 2, 3):
    with log.step(step):
        log.add("actor/loss", step)
        if step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert [(line["step"], line["actor/loss"]) for line in strict_lines(tmp_path)] == [(1, 1.0), (2, 2.0)]


def test_a_failed_step_leaves_no_line_and_no_values(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    with pytest.raises(RuntimeError, match="out of memory"), log.step(1):
        log.add("actor/loss", 7.0)
        raise RuntimeError("out of memory")
    with log.step(1):
        log.add("actor/entropy", 1.0)
    (line,) = strict_lines(tmp_path)
    assert "actor/loss" not in line and line["actor/entropy"] == 1.0
    log.close()


def test_values_added_between_steps_belong_to_the_next(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.add("weight_sync/checksums_ok", 1.0)
    with log.step(1):
        pass
    assert strict_lines(tmp_path)[0]["weight_sync/checksums_ok"] == 1.0
    log.close()


@pytest.mark.parametrize("is_writer", [True, False])
def test_steps_out_of_order_are_refused_on_every_rank(tmp_path: Path, is_writer: bool) -> None:
    log = RunLog(tmp_path, is_writer=is_writer, resume_step=3)
    with pytest.raises(ValueError, match="step 3 after step 3"), log.step(3):
        pass
    with log.step(4):
        pass
    with pytest.raises(ValueError, match="step 4 after step 4"), log.step(4):
        pass
    log.close()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run", is_writer=False)
    with log.step(1), log.span("gen"):
        log.add("actor/loss", 1.0)
    log.close()
    assert not (tmp_path / "run").exists()


def test_an_unknown_logger_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trainer\.loggers names 'wandbb', which is not one of swanlab, wandb"):
        RunLog(tmp_path, loggers=("wandbb",))


@pytest.mark.parametrize("package", ["wandb", "swanlab"])
def test_a_missing_logger_package_names_the_install_command_and_cuts_nothing(tmp_path: Path, package: str) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    log_steps(tmp_path, range(1, 3), 0.1)
    with pytest.raises(RuntimeError, match=re.escape("pip install 'megatron_vppo[loggers]'")):
        RunLog(tmp_path, loggers=(package,))
    assert [line["step"] for line in strict_lines(tmp_path)] == [1, 2]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_peak_memory_is_what_the_kernel_says() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        pytest.skip("CUDA memory is reported instead")
    status = Path("/proc/self/status").read_text()
    (kib,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    assert peak_memory_gb() == pytest.approx(int(kib) / 2**20, rel=0.05)
