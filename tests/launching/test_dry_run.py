"""Engines on hosts, disk, warnings and the header; the whole is in tests/cli/test_dry_run.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_vppo.launching import dry_run as module
from megatron_vppo.launching.dry_run import (
    DryRun,
    RunCluster,
    assumed_options,
    disk_space,
    dry_run,
    header_lines,
    place_engines,
)
from megatron_vppo.launching.files import FileFinding, SeenModel
from tests.launching.runs import four_layers, run_config

GIB = 2**30
GPUS = {"gpu_memory_utilization": 0.6}


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model of these runs; which files there are is the subject of test_files.py."""
    monkeypatch.setattr(module, "see_model", lambda path: SeenModel(four_layers(), FileFinding(True, "here")))


def tried(cluster: RunCluster, **sections: Any) -> DryRun:
    sections["rollout"] = {**GPUS, **sections.get("rollout", {})}
    return dry_run(run_config(**sections), cluster)


def cluster(nodes: int, gpus: int, gib: float = 16) -> RunCluster:
    return RunCluster(nodes, gpus, int(gib * GIB))


def test_engines_by_hand() -> None:
    config = run_config(rollout={"tensor_parallel_size": 2, "num_engines": 3})
    places = place_engines(config, cluster(2, 4))
    assert [(p.host, p.leader, p.gpus) for p in places] == [(0, 0, "0,1"), (0, 2, "2,3"), (1, 4, "0,1")]
    all_gpus = place_engines(run_config(rollout={"tensor_parallel_size": 4}), cluster(2, 4))
    assert [(p.host, p.leader, p.gpus) for p in all_gpus] == [(0, 0, "0,1,2,3"), (1, 4, "0,1,2,3")]


def test_no_engine_reaches_over_hosts() -> None:
    places = place_engines(run_config(rollout={"tensor_parallel_size": 2}), cluster(2, 3))
    assert [(p.host, p.leader, p.gpus) for p in places] == [(0, 0, "0,1"), (1, 3, "0,1")]
    with pytest.raises(ValueError, match=r"num_engines=3 .*tensor_parallel_size=2: there is room for 2"):
        place_engines(run_config(rollout={"tensor_parallel_size": 2, "num_engines": 3}), cluster(2, 3))


@pytest.mark.parametrize(
    ("dtype", "save_freq", "save_hf", "expected"),
    [
        ("bfloat16", 5, True, (2 * 100 + 12 * 60, 4, 200)),
        ("float32", -1, False, (4 * 100 + 8 * 60, 3, 0)),
    ],
)
def test_disk_by_hand(
    dtype: str, save_freq: int, save_hf: bool, expected: tuple[int, int, int], tmp_path: Path
) -> None:
    trainer = {"save_freq": save_freq, "save_hf": save_hf, "save_limit": 3, "runs_dir": str(tmp_path / "not" / "yet")}
    disk = disk_space(run_config(model={"dtype": dtype}, trainer=trainer), parameters=100, trained=60)
    assert (disk.checkpoint, disk.at_once, disk.export) == expected
    assert disk.needed == expected[0] * expected[1] + expected[2]
    assert disk.folder == tmp_path and disk.free > 0


def test_the_header() -> None:
    assert header_lines(4, 8) == (
        "#SBATCH --nodes=4",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --exclusive",
        "#SBATCH --mem=0",
    )


def test_a_run_that_is_as_it_should_be_has_no_warning() -> None:
    found = tried(cluster(1, 4))
    assert (found.fits, found.warnings, found.joined, found.data_ranks) == (True, (), 4, 4)
    assert [phase.phase for phase in found.phases] == ["sync", "sample", "score", "update"]


@pytest.mark.filterwarnings("ignore:When using async grad allreduce:UserWarning")
def test_warnings() -> None:
    idle = tried(cluster(2, 3)).warnings
    assert len(idle) == 1 and idle[0].startswith("2 of 6 data-parallel ranks are idle in every update, 4-5: ")
    assert "actor.global_batch_size is 4 prompts" in idle[0] and "raise it to 6 or a multiple" in idle[0]

    (uneven,) = tried(cluster(1, 3)).warnings
    assert "data-parallel ranks compute 67% of an update: 4 prompts" in uneven and "a multiple of 3 would" in uneven

    bubble, crossing, unused = tried(
        cluster(4, 1),
        parallel={"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2},
        actor={"micro_batch_size_per_device_for_update": 12},
        rollout={"num_engines": 2},
    ).warnings
    assert "pipeline stages wait 50% of an update: a rank has 1 micro-batches" in bubble
    assert "tensor-parallel groups of 2 reach over hosts of 1 GPUs" in crossing
    assert unused == "2 of 4 GPUs have no engine and wait while the others sample"


def test_layers_that_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_RANKS", 1)
    not_plain, not_joined = tried(cluster(1, 4), model={"backend": "te"}).warnings
    assert "TransformerEngine's keep other things" in not_plain
    assert not_joined.startswith("the groups of 4 ranks were not compared")


def test_options_are_those_of_the_settings() -> None:
    options = assumed_options(
        run_config(
            fp8={"recipe": "blockwise"},
            model={"freeze": ["projector"]},
            parallel={"tensor_model_parallel_size": 2, "recompute": "full", "vision_split": "images"},
        )
    )
    assert (options.backend, options.fp8 is not None, options.frozen) == ("te", True, {"projector"})
    assert (options.sequence_parallel, options.recompute, options.vision_split) == (True, "full", "images")
    assert assumed_options(run_config()).backend == "torch"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"parallel": {"tensor_model_parallel_size": 3}}, "= 3 ranks per model copy does not divide 4 ranks"),
        ({"parallel": {"data_parallel_size": 2}}, "but there are 4 ranks"),
        ({"parallel": {"tensor_model_parallel_size": 4}}, "2 key-value heads cannot be split"),
        (
            {"model": {"dtype": "float32", "backend": "te"}},
            "model.backend=te goes with model.dtype=bfloat16, not float32",
        ),
        ({"model": {"dtype": "float32"}, "fp8": {"recipe": "mxfp8"}}, "fp8.recipe=mxfp8 goes with"),
        ({"rollout": {"num_engines": 5}}, "does not fit 4 trainer ranks"),
        ({"rollout": {"gpu_memory_utilization": 1e-6}}, "gpu_memory_utilization 1e-06 gives an engine"),
        ({"data": {"max_prompt_length": 200000}}, "max_prompt_length 200000"),
    ],
)
def test_settings_that_cannot_work(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tried(cluster(1, 4), **sections)
