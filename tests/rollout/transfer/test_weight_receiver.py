"""The receiving end, as far as it needs no engine: views of a buffer, and what has to outlive it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from megatron_vppo.rollout.transfer import weight_receiver
from megatron_vppo.rollout.transfer.bundle import Bundle, Packable, WholeTensor
from megatron_vppo.rollout.transfer.shared_buffer import SharedBuffer


def test_values_that_lie_apart() -> None:
    memory = torch.zeros(256, dtype=torch.uint8)
    memory[64:112].view(torch.float32).copy_(torch.arange(12.0))
    view = weight_receiver.strided_view(memory, dtype=torch.float32, offset=68, sizes=(2, 3), strides=(5, 2))
    assert view.tolist() == [[1.0, 3.0, 5.0], [6.0, 8.0, 10.0]]
    assert view.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
    end = weight_receiver.strided_view(memory, dtype=torch.uint8, offset=255, sizes=(1,), strides=(1,))
    assert end.tolist() == [0]


# --- Buffers of a small model -----------------------------------------------------------------------------------------


class SmallModel(torch.nn.Module):
    """Two layers that load tensors as vLLM's models do, through the loaders of their parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(8, 6)
        self.second = torch.nn.Linear(6, 40)
        record_metadata_for_reloading(self)

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in tensors:
            parameter = self.get_parameter(name)
            getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)


class Written(TorchDispatchMode):
    """Counts the bytes that operations write into memory that is not new, or copy into new memory.

    A copy of a tensor onto itself writes none (`test_a_copy_onto_itself_writes_nothing` of tests/tools).
    """

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        onto_itself = name == "copy_" and out.device.type == "cpu" and out.data_ptr() == args[1].data_ptr()
        if not onto_itself and name in ("copy_", "clone", "cat", "_to_copy", "stack", "index", "fill_", "contiguous"):
            self.num_bytes += out.nbytes if out.device.type == "cpu" else 0
        return out


class Columns:
    """A matrix whose columns two ranks hold, as they are gathered: see Packable."""

    def __init__(self, name: str, matrix: Tensor) -> None:
        self.names: tuple[str, ...] = (name,)
        self.shapes: tuple[tuple[int, ...], ...] = (tuple(matrix.shape),)
        self.dtype, self.num_values = matrix.dtype, matrix.numel()
        self._shards = torch.stack(matrix.chunk(2, dim=1))

    def gather(self, room: Tensor) -> list[Tensor]:
        return [room.view(self._shards.shape).copy_(self._shards).movedim(0, 1)]


def session(model: SmallModel) -> Any:
    config: Any = SimpleNamespace(parallel_config=None, model_config=SimpleNamespace(dtype=torch.float32))
    engine = weight_receiver.ShmTransferEngine(None, config, torch.device("cpu"), model)
    engine.start_weight_update()
    return engine


def send(engine: Any, buffer: SharedBuffer, pieces: Iterable[Any]) -> None:
    bundle = Bundle(buffer)
    for piece in pieces:
        bundle.pack(piece)
    engine.receive_weights(weight_receiver.ShmUpdateInfo(**bundle.update_info()))


@pytest.fixture
def buffer() -> Iterator[SharedBuffer]:
    made = SharedBuffer()
    made.grow(4096)
    yield made
    made.close()


def _piece(name: str, tensor: Tensor, *, apart: bool) -> Packable:
    return Columns(name, tensor) if apart and tensor.ndim == 2 else WholeTensor(name, tensor)


@pytest.mark.parametrize("apart", [False, True])
@torch.no_grad()
def test_every_byte_is_written_twice(apart: bool, buffer: SharedBuffer) -> None:
    """vLLM fills a layer of its own and copies it into the one that is in use; it loads biases in place, but twice."""
    model = SmallModel()
    sent = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
    engine = session(model)
    pieces = [_piece(name, tensor, apart=apart) for name, tensor in sent.items()]
    with Written() as written:
        send(engine, buffer, pieces)
        engine.finish_weight_update()
    assert all(torch.equal(parameter, sent[name]) for name, parameter in model.named_parameters())
    whole = sum(tensor.nbytes for tensor in sent.values())
    assert written.num_bytes - whole == 2 * whole, "besides what was packed"


@pytest.mark.parametrize("apart", [False, True])
@torch.no_grad()
def test_what_waits_for_the_rest_of_its_layer_outlives_the_buffer(apart: bool, buffer: SharedBuffer) -> None:
    model = SmallModel()
    sent = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
    engine = session(model)
    names = ["second.bias", "first.weight", "second.weight", "first.bias"]
    for pair in (names[:2], names[2:]):
        send(engine, buffer, [_piece(name, sent[name], apart=apart) for name in pair])
        buffer.room(0, buffer.capacity, torch.uint8).fill_(255)
    engine.finish_weight_update()
    assert all(torch.equal(parameter, sent[name]) for name, parameter in model.named_parameters())
    engine.shutdown()
