"""The bytes that trainer ranks write to send their weights: each byte of the model once, straight into the buffer.

Counted are the outputs of all operations that copy, and of collectives. A layer of the small models is wide enough for
matrices to outweigh everything else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig

from megatron_vppo.models.build import build_model
from megatron_vppo.models.families import family_of, weight_map
from megatron_vppo.models.options import ModelOptions
from megatron_vppo.models.qwen_vl import QwenVLModel
from megatron_vppo.parallel.layout import init_layout
from megatron_vppo.planning.published import PUBLISHED, published_config
from megatron_vppo.rollout.transfer.bundle import Bundle, buffer_capacity, drain
from megatron_vppo.rollout.transfer.shared_buffer import SharedBuffer, aligned
from megatron_vppo.rollout.transfer.weight_sender import BUFFER_BYTES
from megatron_vppo.weights.entries import stream_entries
from megatron_vppo.weights.load_hf import load_hf_weights
from megatron_vppo.weights.stream import hf_weights
from tests.gloo import run_gloo
from tests.models.tiny import save_tiny_model, tiny_config, tiny_qwen3_config
from tests.proofs.test_released_models import tensor_parallel_is_possible

CONFIGS: dict[str, Any] = {
    "Qwen2.5-VL": tiny_config(tied=False, vocab=301),
    "Qwen3-VL": tiny_qwen3_config(tied=True, vocab=299, taps=(1,)),
}


class Written(TorchDispatchMode):
    """Counts the bytes that operations write. The rank whose tensor a broadcast sends names it too, and writes none."""

    def __init__(self, model: QwenVLModel) -> None:
        super().__init__()
        self.num_bytes = 0
        self._sent = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        into: Any = None
        if name in ("clone", "cat", "_to_copy", "index", "stack", "contiguous", "zeros", "copy_"):
            into = out
        elif "gather" in name or "broadcast" in name:
            into = args[0]
        written = [leaf for leaf in tree_leaves(into) if isinstance(leaf, Tensor)]
        self.num_bytes += sum(t.nbytes for t in written if t.untyped_storage().data_ptr() not in self._sent)
        if "gather" in name:  # a shard that lies in its place already
            inside = {t.untyped_storage().data_ptr() for t in written}
            shards = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor)]
            self.num_bytes -= sum(t.nbytes for t in shards if t.untyped_storage().data_ptr() in inside)
        return out


def _stage(folder: Path, tensor: int, pipeline: int) -> QwenVLModel:
    layout = init_layout(tensor=tensor, pipeline=pipeline, timeout_seconds=120)
    stage = build_model(
        AutoConfig.from_pretrained(folder),
        groups=layout.groups,
        vision_groups=layout.vision_groups,
        dtype=torch.float32,
        device=layout.device,
        options=ModelOptions(pipeline_layers=(1, 2) if pipeline == 2 else None),
    )
    load_hf_weights(stage, folder)
    return stage


def _rank(
    rank: int, world: int, folders: dict[str, Path], tensor: int, pipeline: int
) -> list[tuple[int, int, int, bool]]:
    """(bytes written, of all tensors, of all shards, whether the buffer holds the plain stream's tensors) per model."""
    found = []
    for folder in folders.values():
        stage = _stage(folder, tensor, pipeline)
        whole = [(name, values.clone()) for name, values in hf_weights([stage])]
        stream, buffer = hf_weights([stage]), SharedBuffer()
        buffer.grow(sum(map(aligned, stream.piece_bytes)))
        bundle, packed = Bundle(buffer), []
        with Written(stage) as written:
            for piece in stream.pieces():
                packed.append((piece, bundle.pack(piece)))
        same = [
            name == expected and torch.equal(view.reshape(shape), values)
            for (piece, views), (expected, values) in zip(_flat(packed), whole, strict=True)
            for name, shape, view in [(piece, *views)]
        ]
        if world == 1:
            assert all(view.is_contiguous() for _, views in packed for view in views), "the engine copies none"
        tensors = sum(values.nbytes for _, values in whole)
        found.append((written.num_bytes, tensors, sum(stream.piece_bytes), len(same) == len(whole) and all(same)))
        buffer.close()
        parallel_state.destroy_model_parallel()
    return found


def _flat(packed: list[Any]) -> list[Any]:
    return [
        (name, (shape, view))
        for piece, views in packed
        for name, shape, view in zip(piece.names, piece.shapes, views, strict=True)
    ]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("tensor", "pipeline"),
    [(1, 1), (2, 1), *(pytest.param(*layout, marks=pytest.mark.extended) for layout in ((1, 2), (2, 2)))],
)
def test_each_byte_is_written_once(tensor: int, pipeline: int, tmp_path: Path) -> None:
    for name, config in CONFIGS.items():
        save_tiny_model(tmp_path / name, config)
    folders = {name: tmp_path / name for name in CONFIGS}
    for of_rank in run_gloo(_rank, tensor * pipeline, folders, tensor, pipeline):
        for written, tensors, shards, same in of_rank:
            assert same
            assert tensors <= written <= shards < 1.05 * tensors, "shards have padding"


@pytest.mark.parametrize("name", PUBLISHED)
def test_round_trips_of_the_released_models(name: str) -> None:
    """In bfloat16, through buffers of 2 GiB. They are a little larger where that saves one."""
    config = published_config(name)
    entries = stream_entries(weight_map(config, family=family_of(config)))
    for tensor in (size for size in range(1, 65) if tensor_parallel_is_possible(config, size)):
        sizes = [aligned(2 * tensor * torch.Size(e.kind.local_shape(tensor)).numel()) for e in entries]
        capacity = buffer_capacity(sizes, limit=BUFFER_BYTES, affordable=1 << 60)
        trips, used = 1, 0
        for size in sizes:
            trips, used = (trips + 1, size) if used and used + size > capacity else (trips, used + size)
        assert trips <= sum(sizes) / (2 * 2**30) + 1
        assert capacity <= 2.7 * 2**30


def _left_behind(rank: int, world: int, folder: Path) -> bool:
    """One rank stops in the middle of a piece and drains the rest; the other reads all of it."""
    stage = _stage(folder, 2, 1)
    stream = hf_weights([stage])
    if rank == 0:
        for piece in stream.pieces():
            if piece.names[0].endswith("qkv.weight"):
                break  # before it has gathered this one, which is split over the ranks
        drain(stream)
    else:
        for _ in stream:
            pass
    return next(stream, None) is None


@pytest.mark.distributed
def test_a_rank_that_fails_leaves_no_other_in_a_collective(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, CONFIGS["Qwen3-VL"])
    assert run_gloo(_left_behind, 2, tmp_path, timeout_seconds=60) == [True, True]
