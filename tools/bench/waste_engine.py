"""Bar 10 of waste.py, the other side: bytes that an engine writes to take over weights.

The engine is a real vLLM, in this process. The buffer holds what one or several tensor-parallel trainer ranks would
have gathered into it. An engine on a CPU repacks each linear layer for its kernels; here that is left out, so that
it copies what one on a GPU does.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
from digits.checkpoint import make_processor
from torch import Tensor

from bench.random_model import make_config
from bench.waste_bars import Bar, Case
from bench.written_bytes import WrittenBytes
from megatron_vppo.models.families import family_of, weight_map
from megatron_vppo.models.hf_config import HfConfig
from megatron_vppo.rollout.transfer.bundle import Bundle, Shape
from megatron_vppo.rollout.transfer.shared_buffer import SharedBuffer
from megatron_vppo.weights.entries import Entry, stream_entries

TRAINER_RANKS = (1, 2, 4)
WRITTEN = 2
"""vLLM fills a layer of its own and copies it into the one that is in use; it loads biases in place, but twice."""
CPU_BLOCK_SIZE = 32


def engine() -> list[Bar]:
    """Counts bar 10 for the engine."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # a dispatch mode sees this process alone
    os.environ["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"
    processor = make_processor()
    config = make_config(processor.tokenizer)
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    with tempfile.TemporaryDirectory(prefix="vppo-waste-") as name:
        config.save_pretrained(name)
        processor.save_pretrained(name)
        llm = _start(name)
        cases = [Case(f"{ranks} tensor-parallel trainer ranks", _written(llm, config, ranks), WRITTEN)
                 for ranks in TRAINER_RANKS]  # fmt: skip
    return [Bar(10, "Bytes that an engine writes to take over weights, over those of the model", tuple(cases))]


def _start(folder: str) -> Any:
    from vllm import LLM
    from vllm.model_executor.layers import utils

    from megatron_vppo.rollout.transfer import weight_receiver

    utils.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: None
    weight_receiver.register()
    llm = LLM(
        folder,
        dtype="bfloat16",
        max_model_len=64,
        max_num_seqs=1,
        enforce_eager=True,
        load_format=weight_receiver.EMPTY_LOAD_FORMAT,
        kv_cache_memory_bytes=1 << 26,
        block_size=CPU_BLOCK_SIZE,
        limit_mm_per_prompt={"image": 1, "video": 0},
        skip_mm_profiling=True,
        weight_transfer_config={"backend": weight_receiver.BACKENDS["shm"]},
    )
    llm.init_weight_transfer_engine({"init_info": {}})
    return llm


def _written(llm: Any, config: HfConfig, ranks: int) -> float:
    """Sends all weights in one buffer. Returns the bytes that are written, over those of the model.

    The scales of attention layers are left out. They are no weights: vLLM sets them to one, 16 bytes a layer.
    """
    pieces = [Gathered(entry, ranks) for entry in stream_entries(weight_map(config, family=family_of(config)))]
    buffer = SharedBuffer()
    bundle = Bundle(buffer)
    buffer.grow(sum(2 * piece.num_values + 4096 for piece in pieces))
    for piece in pieces:
        bundle.pack(piece)
    llm.start_weight_update()
    with WrittenBytes() as written:
        llm.update_weights({"update_info": bundle.update_info()})
        llm.finish_weight_update(f"from {ranks}")
    buffer.close()
    model_bytes = sum(2 * torch.Size(shape).numel() for piece in pieces for shape in piece.shapes)
    return (written.bytes - written.filled_bytes) / model_bytes


class Gathered:
    """An entry of the weight map as `ranks` trainer ranks would have gathered it; see bundle.Packable."""

    dtype = torch.bfloat16

    def __init__(self, entry: Entry, ranks: int) -> None:
        self.names: tuple[str, ...] = entry.hf_names
        self.shapes: tuple[Shape, ...] = entry.kind.hf_shapes()
        self._kind = entry.kind
        self._ranks = 1 if entry.kind.partition_dim is None else ranks

    @property
    def num_values(self) -> int:
        return self._ranks * torch.Size(self._kind.local_shape(self._ranks)).numel()

    def gather(self, room: Tensor) -> list[Tensor]:
        shards = room.fill_(0.01).view(self._ranks, *self._kind.local_shape(self._ranks))
        if self._ranks > 1:
            return list(self._kind.views(shards))
        parts = room.split([torch.Size(shape).numel() for shape in self.shapes])  # one rank copies its tensors in order
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]
