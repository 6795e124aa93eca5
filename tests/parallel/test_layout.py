"""A world of one rank, also within a process that a launcher has given a place in a larger one."""

from __future__ import annotations

import dataclasses

import pytest
import torch.distributed as dist

from megatron_vppo.parallel.layout import destroy_layout, init_layout, single_rank


@pytest.mark.parametrize("backend", ["gloo", None])
def test_a_world_of_one_whatever_the_launcher_says(backend: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    for _ in range(2):
        with single_rank(backend=backend) as layout:
            assert (layout.rank, layout.world_size, layout.groups.tp.size()) == (0, 1, 1)
        assert not dist.is_initialized()


def test_it_is_given_back_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="inside"), single_rank():
        raise RuntimeError("inside")
    assert not dist.is_initialized()


def test_sizes_and_stages_by_hand() -> None:
    with single_rank() as layout:
        many = dataclasses.replace(layout, tensor=2, context=3, pipeline=5, data=7)
    assert many.world_size == 210
    stages = [dataclasses.replace(many, pipeline_rank=rank) for rank in range(5)]
    assert [stage.is_first_stage for stage in stages] == [True, False, False, False, False]
    assert [stage.is_last_stage for stage in stages] == [False, False, False, False, True]


def test_a_run_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """A world of one, in which nothing is split."""
    monkeypatch.delenv("RANK", raising=False)
    try:
        layout = init_layout(tensor=1, pipeline=1, vision_split="images", timeout_seconds=60)
        assert (layout.world_size, layout.data, layout.vision_split) == (1, 1, "tensor")
        with pytest.raises(ValueError, match=r"tensor 2 x context 1 x pipeline 1 x data any does not fit 1 ranks"):
            init_layout(tensor=2, pipeline=1, timeout_seconds=60)
    finally:
        destroy_layout()
