"""Changes with which a run fits: each one is tried out, and fits."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from megatron_vppo.launching import dry_run as module
from megatron_vppo.launching.dry_run import DryRun, RunCluster, dry_run
from megatron_vppo.launching.files import FileFinding, SeenModel
from megatron_vppo.launching.remedies import remedies
from tests.launching.runs import four_layers, run_config

GIB = 2**30
LONG = {"max_prompt_length": 3000, "max_response_length": 1000, "rollout_batch_size": 8}
ROWS = {"micro_batch_size_per_device_for_update": 12, "micro_batch_size_per_device_for_experience": 1}


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model, except for its MLP: what that keeps of 48,000 tokens are gigabytes."""
    model = SeenModel(four_layers(intermediate_size=4096), FileFinding(True, "here"))
    monkeypatch.setattr(module, "see_model", lambda path: model)


def tried(gib: float, **sections: Any) -> DryRun:
    return dry_run(run_config(**sections), RunCluster(1, 1, int(gib * GIB)))


def changed(sections: dict[str, Any], change: str) -> dict[str, Any]:
    """The sections with the settings of a change, written as on the command line."""
    for setting in change.split():
        name, _, value = setting.partition("=")
        section, _, key = name.partition(".")
        sections = {**sections, section: {**sections.get(section, {}), key: yaml.safe_load(value)}}
    return sections


def test_a_smaller_engine() -> None:
    """3 GiB of reserve are more than a tenth of 10: an engine may have seven tenths, less a little state."""
    sections: dict[str, Any] = {"rollout": {"gpu_memory_utilization": 0.9}}
    found = tried(10, **sections)
    assert not found.fits and [p.phase for p in found.phases if p.total > 10 * GIB] == ["sample"]
    (change,) = remedies(found)
    assert change == "rollout.gpu_memory_utilization=0.69"
    assert tried(10, **changed(sections, change)).fits
    assert not tried(10, **changed(sections, "rollout.gpu_memory_utilization=0.7")).fits


def test_a_smaller_micro_batch_or_more_recomputation() -> None:
    """An update of twelve rows of 4,000 tokens does not fit next to the reserve; what is proposed does."""
    sections: dict[str, Any] = {"data": LONG, "actor": ROWS, "rollout": {"n": 3, "gpu_memory_utilization": 0.5}}
    found = tried(8, **sections)
    assert [p.phase for p in found.phases if p.total > 8 * GIB] == ["update"]
    recompute, layout = remedies(found)
    assert recompute == "parallel.recompute=full"
    assert tried(8, **changed(sections, recompute)).fits
    assert "parallel.tensor_model_parallel_size=1" in layout and tried(8, **changed(sections, layout)).fits
    sections["parallel"] = {"recompute": "full"}
    sections["data"] = {**LONG, "max_prompt_length": 30000}
    rows, gpus = remedies(tried(8, **sections))
    assert re.match(r"\d+ such GPUs instead of 1, with the layout that `vppo plan` finds", gpus)
    assert rows == "actor.micro_batch_size_per_device_for_update=1 actor.micro_batch_size_per_device_for_experience=1"
    assert tried(8, **changed(sections, rows)).fits


def test_nothing_helps() -> None:
    """The reserves alone take 3 + 1 GiB."""
    found = tried(3.5, rollout={"gpu_memory_utilization": 0.5})
    assert not found.fits and list(remedies(found)) == []


def test_a_limit_of_tokens_is_lifted_for_micro_batches_of_one_row() -> None:
    """Eight groups of 3000 + 8 x 999 tokens in one micro-batch; a row is 3999."""
    actor = {"global_batch_size": 8, "max_tokens_per_micro_batch": 90000}
    rollout = {"n": 8, "gpu_memory_utilization": 0.45}
    sections: dict[str, Any] = {
        "data": LONG, "actor": actor, "parallel": {"recompute": "full"}, "rollout": rollout,
    }  # fmt: skip
    found = tried(7, **sections)
    assert "update" in [p.phase for p in found.phases if p.total > 7 * GIB]
    one_row = next(remedies(found))
    assert "micro_batch_size_per_device_for_update=1 " in one_row and "max_tokens_per_micro_batch=null" in one_row
    assert tried(7, **changed(sections, one_row)).fits
