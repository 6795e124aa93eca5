"""ceilings.py on this machine: its file is one that `vppo plan --gpu` takes."""

from __future__ import annotations

import json
from pathlib import Path

import bench.ceilings
import pytest
import torch
from bench.ceilings import copy_gb, main
from bench.device import Timing

from megatron_vppo.planning.gpus import gpu_named, link_refusal


@pytest.mark.distributed
def test_a_file_that_a_plan_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench.ceilings, "COPY_SECONDS", 0.1)
    monkeypatch.setattr(bench.ceilings, "COPY_BYTES", {"cpu": 1 << 22, "cuda": 1 << 22})
    path = tmp_path / "ceilings.json"
    main(["--out", str(path), "--ranks", "2", "--network-gb-per-s", "0.5"])
    written = json.loads(path.read_text())
    assert written == json.loads(capsys.readouterr().out)
    gpu = gpu_named(str(path))
    assert gpu.product_flops == written["product_tflops"] * 1e12 > 0
    assert gpu.memory == written["memory_gb_per_s"] * 1e9 > 0
    assert gpu.node == written["node_gb_per_s"] * 1e9 > 0 and gpu.network == 0.5e9
    assert written["node_ranks"] == 2 and link_refusal(gpu, gpus=16, hosts=2) is None


def test_bytes_of_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 MB in 2 ms are 4 GB/s; within a device they are read and written, which makes 8."""
    fastest = Timing(1.0, (0.004, 0.002, 0.003), None)
    monkeypatch.setattr(bench.ceilings, "time_together", lambda runs, **_: dict.fromkeys(runs, fastest))
    cpu, other = torch.device("cpu"), torch.device("meta")
    assert copy_gb(cpu, cpu, num_bytes=8_000_000) == pytest.approx(8.0)
    assert copy_gb(cpu, other, num_bytes=8_000_000) == pytest.approx(4.0)
