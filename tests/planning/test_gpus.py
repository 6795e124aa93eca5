"""Ceilings by name and from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vppo.planning.gpus import GPUS, GpuCeilings, gpu_named, link_refusal

MEASURED = {"name": "mine", "product_tflops": 0.5, "memory_gb_per_s": 20, "to_host_gb_per_s": 4, "node_gb_per_s": None}


def written(folder: Path, **changes: Any) -> str:
    path = folder / "ceilings.json"
    path.write_text(json.dumps({**MEASURED, **changes}))
    return str(path)


def test_a_data_sheet_by_hand() -> None:
    """H800: 0.75 of 989.4 TFLOP/s; 0.87 of 3.35 TB/s; 0.8 of 200 GB/s one way; 0.9 of 50 GB/s."""
    gpu = gpu_named("H800")
    assert gpu.product_flops == pytest.approx(742.05e12) and gpu.peak_flops == 989.4e12
    assert (gpu.memory, gpu.node, gpu.network, gpu.to_host) == pytest.approx((2.9145e12, 160e9, 45e9, 25.6e9))
    assert not gpu.is_measured
    assert GPUS["h100"].node == pytest.approx(360e9)
    assert GPUS["a100"].product_flops < GPUS["h100"].product_flops


def test_measured_ceilings(tmp_path: Path) -> None:
    gpu = gpu_named(written(tmp_path))
    assert gpu == GpuCeilings("mine", 0.5e12, 0.5e12, 20e9, None, None, 4e9, is_measured=True)
    assert gpu_named(written(tmp_path, node_gb_per_s=3, network_gb_per_s=1)).network == 1e9


def test_a_link_that_was_not_measured(tmp_path: Path) -> None:
    gpu = gpu_named(written(tmp_path))
    assert link_refusal(gpu, gpus=1, hosts=1) is None
    assert link_refusal(gpu, gpus=2, hosts=1) == "node_gb_per_s is null, but 2 GPUs talk to each other"
    within = gpu_named(written(tmp_path, node_gb_per_s=3))
    assert link_refusal(within, gpus=8, hosts=1) is None
    assert link_refusal(within, gpus=16, hosts=2) == "network_gb_per_s is null, but there are 2 hosts"


def test_a_name_that_is_none() -> None:
    with pytest.raises(ValueError, match=r"--gpu b200: no file of measured .*not one of h100, h800, h200, a100$"):
        gpu_named("b200")


@pytest.mark.parametrize("value", [0, -1, "fast", True, float("inf"), None])
def test_a_ceiling_that_is_none(value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"memory_gb_per_s is .*, not a number above 0"):
        gpu_named(written(tmp_path, memory_gb_per_s=value))


@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ("[1]", "not a JSON object")])
def test_a_file_that_is_none(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        gpu_named(str(path))
