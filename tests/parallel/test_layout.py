"""A world of one rank, also within a process that a launcher has given a place in a larger one."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from megatron_vppo.parallel.layout import single_rank


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
