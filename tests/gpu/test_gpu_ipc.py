"""A buffer on the GPU, written by one process and read by another, round after round."""

from __future__ import annotations

import hashlib
from multiprocessing.connection import Connection

import pytest
import torch
import torch.multiprocessing as mp

from megatron_vppo.rollout.transfer.device_buffer import DeviceBuffer, DeviceBufferReader

pytestmark = pytest.mark.gpu
MIB = 2**20
CAPACITY = 32 * MIB
SLACK = 4 * MIB
"""Bytes that the driver's own bookkeeping may take between two readings of free memory."""


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.cpu().numpy().tobytes()).hexdigest()


def _read(connection: Connection) -> None:
    """Answers each (handle, bytes) with the digest of what lies there; None: lets go of everything."""
    reader = DeviceBufferReader(torch.device("cuda", 0))
    torch.zeros(CAPACITY, dtype=torch.uint8, device="cuda").clone()  # the context and its kernels are there from now on
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    connection.send("ready")
    while (request := connection.recv()) != "end":
        if request is None:
            copy = None
            reader.close()
            torch.cuda.empty_cache()
            connection.send("closed")
            continue
        handle, num_bytes = request
        copy = reader.read(handle)[:num_bytes].clone()
        torch.cuda.synchronize()
        connection.send(_digest(copy))


def test_two_buffers_in_turn_and_their_memory_afterwards() -> None:
    device = torch.device("cuda", 0)
    ours, theirs = mp.Pipe()
    process = mp.get_context("spawn").Process(target=_read, args=(theirs,))
    process.start()
    try:
        assert ours.recv() == "ready"
        torch.zeros(1, device=device)
        torch.cuda.empty_cache()
        free_before = torch.cuda.mem_get_info(device)[0]
        for transfer in range(2):  # a second one begins with new memory and new handles
            buffers = [DeviceBuffer(device=device, num_readers=1) for _ in range(2)]
            for turn in range(6):
                buffer, num_bytes = buffers[turn % 2], CAPACITY // 2 + 64 * turn
                buffer.grow(CAPACITY)
                generator = torch.Generator().manual_seed(10 * transfer + turn)
                data = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)
                buffer.room(0, num_bytes, torch.uint8).copy_(data, non_blocking=True)
                (handle,) = buffer.publish()["handles"]
                ours.send((handle, num_bytes))
                assert ours.recv() == _digest(data)
            ours.send(None)
            assert ours.recv() == "closed"
            for buffer in buffers:
                buffer.free()
            torch.cuda.empty_cache()
            assert torch.cuda.mem_get_info(device)[0] >= free_before - SLACK
        ours.send("end")
        process.join(timeout=60)
        assert process.exitcode == 0
    finally:
        process.kill()
