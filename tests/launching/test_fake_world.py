"""One rank of a world that does not exist, and that nothing of it is left behind."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import optimizer as megatron_optimizer

from megatron_vppo.config.schema import ParallelConfig
from megatron_vppo.launching.fake_world import META, fake_rank, meta_device
from megatron_vppo.models.layers import attention
from megatron_vppo.models.options import ModelOptions
from megatron_vppo.parallel.layout import single_rank
from megatron_vppo.parallel.training import make_trainable
from megatron_vppo.setup.policy import build_stages, optim_settings
from tests.launching.runs import four_layers, run_config

PARALLEL = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)


def test_a_rank_has_its_place_and_nothing_stays() -> None:
    with fake_rank(PARALLEL, rank=5, world_size=8) as layout:
        # rank = (pipeline * data + data rank) * tensor + tensor rank
        assert (layout.pipeline_rank, layout.data_rank, layout.tensor_rank) == (1, 0, 1)
        assert (layout.world_size, layout.data) == (8, 2)
        assert dist.get_backend(layout.groups.tp) == "fake"
        gloo = dist.new_group([4, 5], backend="gloo")
        assert dist.get_backend(gloo) == "fake", "gloo would wait for rank 4"
    assert not dist.is_initialized()


def test_patches_end_with_their_blocks() -> None:
    def patched() -> list[object]:
        return [
            torch.cuda.current_device,
            F.scaled_dot_product_attention,
            F.rms_norm,
            attention.causal_lower_right,
            dist.new_group,
        ]

    with fake_rank(PARALLEL, rank=0, world_size=4):
        pass  # Megatron on CPU is set up once, and for good
    before = patched()
    with pytest.raises(RuntimeError, match="inside"), fake_rank(PARALLEL, rank=0, world_size=4), meta_device():
        assert not {map(id, before)} & {map(id, patched())}
        assert torch.cuda.current_device() == META
        raise RuntimeError("inside")
    assert patched() == before and not dist.is_initialized()
    assert F.rms_norm(torch.ones(1, 2), (2,), torch.ones(2), 0.0).tolist() == [[1.0, 1.0]]


def test_adam_is_torchs_whatever_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """TransformerEngine's Adam asks for a GPU when it is made, and a login node has none."""

    def without_gpu(*args: object, **kwargs: object) -> None:
        raise AssertionError("No CUDA GPUs are available")

    monkeypatch.setattr(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", False)
    monkeypatch.setattr(megatron_optimizer, "Adam", without_gpu)
    config = run_config()
    with fake_rank(config.parallel, rank=0, world_size=2) as layout, meta_device():
        stages = build_stages(config, layout, four_layers(), ModelOptions(), device=META)
        settings = optim_settings(config, total_steps=1, on_gpu=True)
        trainable = make_trainable(stages, layout=layout, settings=settings, dtype=torch.bfloat16)
    assert isinstance(trainable.optimizer.chained_optimizers[0].optimizer, torch.optim.AdamW)
    assert not megatron_optimizer.USING_PYTORCH_OPTIMIZER


def test_a_process_with_groups_of_its_own_is_refused() -> None:
    with (
        single_rank(),
        pytest.raises(RuntimeError, match="without process groups"),
        fake_rank(PARALLEL, rank=0, world_size=4),
    ):
        pass


def test_indices_on_the_cpu_meet_data_on_meta() -> None:
    data, index = torch.empty(4, 3, device=META, requires_grad=True), torch.tensor([2, 0])
    with meta_device():
        assert data.index_copy(0, index, torch.empty(2, 3, device=META)).device == META
        assert data[index].shape == (2, 3)
        assert data[torch.tensor([True, False, True, True])].shape == (3, 3), "a mask is counted on the CPU"
        assert (torch.arange(3) * torch.ones(3)).device.type == "cpu"
        data.index_select(0, index).sum().backward()
    assert data.grad is not None and data.grad.shape == (4, 3)


def test_attention_and_norm_keep_what_fused_kernels_keep() -> None:
    """Queries of 2 x 4 heads x 8 tokens x 16 values, half as many heads of keys: no scores of 8 x 8."""
    query, key, value = (torch.empty(2, h, 8, 16, device=META, requires_grad=True) for h in (4, 2, 2))
    x, weight = (torch.empty(*shape, device=META, requires_grad=True) for shape in ((5, 16), (16,)))
    kept: list[tuple[int, ...]] = []

    def save(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with meta_device(), torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0, enable_gqa=True)
        assert kept == [(2, 4, 8, 16), (2, 2, 8, 16), (2, 2, 8, 16), (2, 4, 8, 16), (2, 4, 8)]
        assert output.transpose(1, 2).is_contiguous(), "as flash kernels lay it out: the next layer needs no copy"
        kept.clear()
        normed = F.rms_norm(x, (16,), weight, 1e-6)
        assert kept == [(5, 16), (16,), (5, 1)]
        (output.sum() + normed.sum()).backward()
    assert (query.grad.shape, key.grad.shape, x.grad.shape) == (query.shape, key.shape, x.shape)  # type: ignore[union-attr]
