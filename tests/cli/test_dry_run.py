"""`vppo train --dry-run` as a user sees it, on the runs that the released models are made for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml

from megatron_vppo.cli.main import main

pytestmark = pytest.mark.filterwarnings("ignore:When using async grad allreduce:UserWarning")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dry run hides GPUs from its process, which is that of the tests here."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def run_file(folder: Path, model: str, **sections: dict[str, Any]) -> Path:
    """Settings as in the paper, and a layout."""
    settings: dict[str, dict[str, Any]] = {
        "data": {"train_files": "chamber111/VPPO_ViRL39K_train", "rollout_batch_size": 384},
        "model": {"path": model},
        "actor": {"global_batch_size": 128, "offload": ["params", "grads", "optimizer"]},
        "rollout": {"n": 8, "gpu_memory_utilization": 0.9},
        "trainer": {"runs_dir": str(folder / "runs")},
    }
    for name, values in sections.items():
        settings[name] = {**settings.get(name, {}), **values}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def layout(tensor: int, pipeline: int = 1) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "sequence_parallel": True,
        "recompute": "full",
    }


def printed(capsys: pytest.CaptureFixture[str], path: Path, *arguments: str, status: int = 0) -> str:
    assert main(["train", "--config", str(path), "--dry-run", *arguments]) == status
    out = capsys.readouterr().out
    assert not dist.is_initialized()
    assert all(len(line) <= 100 for line in out.splitlines() if str(path.parent) not in line)
    return out


def rows_of(out: str, start: str) -> list[list[str]]:
    return [line.split() for line in out.splitlines() if re.match(start, line)]


RELEASED = [
    # model, layout, GPUs of an engine, nodes; pipeline ranks' GiB of weights, gradients, optimizer
    ("Qwen/Qwen2.5-VL-7B-Instruct", layout(2), 1, 1, [(7.72, 15.45, 11.59)]),
    ("Qwen/Qwen2.5-VL-32B-Instruct", layout(4, 2), 4, 4, [(7.95, 15.90, 11.93), (7.63, 15.26, 11.44)]),
    ("Qwen/Qwen3-VL-8B-Instruct", layout(2), 1, 1, [(8.17, 16.34, 12.25)]),
    (
        "Qwen/Qwen2.5-VL-72B-Instruct",
        layout(8, 4),
        8,
        8,
        [(4.54, 9.09, 13.63), (4.09, 8.18, 12.26), (4.09, 8.18, 12.26), (4.38, 8.76, 13.13)],
    ),
]


@pytest.mark.parametrize(
    ("model", "parallel", "engine", "nodes", "state"),
    [RELEASED[0], *(pytest.param(*released, marks=pytest.mark.extended) for released in RELEASED[1:])],
)
def test_released_models_fit_their_clusters(
    model: str,
    parallel: dict[str, Any],
    engine: int,
    nodes: int,
    state: list[tuple[float, ...]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    path = run_file(tmp_path, model, parallel=parallel, rollout={"tensor_parallel_size": engine})
    out = printed(capsys, path, "--nodes", str(nodes))
    ranks, tensor, pipeline = 8 * nodes, parallel["tensor_model_parallel_size"], len(state)
    data = ranks // tensor // pipeline
    assert f"ranks: TP {tensor} x CP 1 x PP {pipeline} x DP {data} = {ranks}; the groups of all {ranks} agree" in out
    assert f"{model} is not on this" in out and "384 prompts x 8 responses = 3072 rows, 3 optimizer steps" in out
    assert f"up to {1024 // data} rows on a data-parallel rank = {256 // data} micro-batches" in " ".join(out.split())
    stages = rows_of(out, r"  \d+ +ranks ")
    assert [tuple(map(float, row[4:7])) for row in stages] == state
    # bfloat16 weights, fp32 gradients, and 12 bytes a value of the optimizer, over the data-parallel ranks
    for weights, gradients, optimizer in state:
        assert (gradients, optimizer) == pytest.approx((2 * weights, 6 * weights / data), abs=0.02)
    phases = {row[0]: row for row in rows_of(out, r"  (send|sample|score|update) ")}
    assert list(phases) == ["send", "sample", "score", "update"]
    for row in phases.values():
        numbers = [float(number) for number in row[-6:]]
        assert sum(numbers[:-1]) == pytest.approx(numbers[-1], abs=0.03) and numbers[-1] <= 80
    assert float(phases["sample"][-1]) == pytest.approx(0.9 * 80 + 3)
    hosts = rows_of(out, "  host ")
    assert len(hosts) == nodes and f"engine {8 // engine * nodes - 1} by rank {ranks - engine}" in " ".join(out.split())
    assert f"  #SBATCH --nodes={nodes}\n  #SBATCH --ntasks-per-node=8\n  #SBATCH --gpus-per-node=8\n" in out
    assert out.endswith("It fits. Nothing was started.\n")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("name", "nodes"),
    [
        ("qwen2_5_vl_7b_8gpus", 1),
        ("qwen3_vl_8b_8gpus", 1),
        ("qwen2_5_vl_32b_32gpus", 4),
        ("qwen2_5_vl_72b_64gpus", 8),
    ],
)
def test_ready_runs_fit_cards_that_are_sold_with_80_gb(
    name: str, nodes: int, capsys: pytest.CaptureFixture[str], repo_root: Path
) -> None:
    """They report 79.1 to 79.6 GiB."""
    ready = repo_root / "examples" / "slurm" / f"{name}.yaml"
    out = printed(capsys, ready, "--nodes", str(nodes), "--gpu-memory", "79.1")
    assert out.endswith("It fits. Nothing was started.\n")


def test_a_run_that_does_not_fit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The 7B without offload: 34.8 GiB of state leave 0.52 of 80 GiB to an engine."""
    path = run_file(tmp_path, "Qwen/Qwen2.5-VL-7B-Instruct", parallel=layout(2), actor={"offload": []})
    out = printed(capsys, path, status=1)
    assert re.search(r"  sample .* 109\.76  over\n", out)
    assert "It does not fit: sample needs 109.76 of 80 GiB on stage 1\n" in out
    assert "What would fit: rollout.gpu_memory_utilization=0.52\n" in out


@pytest.mark.extended
def test_narrow_terminals(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    path = run_file(tmp_path, "Qwen/Qwen3-VL-2B-Instruct", data={"max_prompt_length": 1500, "max_response_length": 100})
    out = printed(capsys, path, "--gpus-per-node", "2", "--gpu-memory", "79.6", status=0)
    assert "1 node of 2 GPUs with 79.6 GiB, 2 ranks" in " ".join(out.split())
    long = [line for line in out.splitlines() if len(line) > 80 and str(tmp_path) not in line]
    assert long == []


def test_idle_ranks_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Six prompts, eight data-parallel ranks."""
    data = {"rollout_batch_size": 12, "max_prompt_length": 1500, "max_response_length": 100}
    path = run_file(tmp_path, "Qwen/Qwen3-VL-2B-Instruct", data=data, actor={"global_batch_size": 6})
    out = " ".join(printed(capsys, path).split())
    update = "8 rows on a data-parallel rank = 2 micro-batches, ranks compute 75% of the time"
    assert f"update: up to {update}; data-parallel ranks 6-7 without any" in out
    assert "2 of 8 data-parallel ranks are idle in every update, 6-7: actor.global_batch_size is 6 prompts" in out


def test_settings_that_cannot_work(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = run_file(tmp_path, "Qwen/Qwen2.5-VL-7B-Instruct", parallel=layout(4, 3))
    assert main(["train", "--config", str(path), "--dry-run", "--nodes", "2"]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    assert "= 12 ranks per model copy does not divide 16 ranks; start 12 or 24 ranks" in output.err


def test_the_cluster_belongs_to_a_dry_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", "--config", "run.yaml", "--nodes", "4", "--gpu-memory", "80"]) == 2
    assert "vppo: --nodes, --gpu-memory: only --dry-run takes the cluster from the command line; add --dry-run" in (
        capsys.readouterr().err
    )


def test_one_process_stands_for_all_ranks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "--config", "run.yaml", "--dry-run"]) == 2
    assert "--dry-run is one process that stands for all ranks; start it without srun and torchrun" in (
        capsys.readouterr().err
    )
