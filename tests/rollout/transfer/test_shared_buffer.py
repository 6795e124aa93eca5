"""Host memory between two processes: what is written is read, also after it grew, and nothing is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from megatron_vppo.rollout.transfer.shared_buffer import ALIGNMENT, SharedBuffer, SharedBufferReader, aligned
from megatron_vppo.system.processes import child_environment


def test_offsets_are_multiples_of_a_cache_line() -> None:
    assert [aligned(n) for n in (0, 1, ALIGNMENT, ALIGNMENT + 1)] == [0, ALIGNMENT, ALIGNMENT, 2 * ALIGNMENT]


def test_another_process_reads_what_was_written() -> None:
    buffer = SharedBuffer()
    buffer.grow(256)
    weights = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    buffer.room(ALIGNMENT, 6, torch.bfloat16).view(3, 2).copy_(weights.T)
    info = buffer.publish()
    program = (
        "import sys, torch; from megatron_vppo.rollout.transfer.shared_buffer import SharedBufferReader as R; "
        "memory = R().read(sys.argv[1], int(sys.argv[2])); "
        f"print(memory[{ALIGNMENT}:{ALIGNMENT + 12}].view(torch.bfloat16).tolist())"
    )
    arguments = [sys.executable, "-c", program, info["path"], str(info["capacity"])]
    read = subprocess.run(arguments, env=child_environment(), capture_output=True, text=True, check=True)
    assert read.stdout.strip() == str(weights.T.flatten().tolist())
    buffer.close()


def test_free_memory_is_a_part_of_the_host_s() -> None:
    buffer = SharedBuffer()
    assert 2**20 < buffer.free_bytes < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    buffer.close()


def test_a_reader_follows_a_buffer_that_grew() -> None:
    buffer, reader = SharedBuffer(), SharedBufferReader()
    assert buffer.capacity == 0
    buffer.grow(64)
    assert reader.read(**buffer.publish()).numel() == 64
    buffer.grow(4096)
    buffer.grow(64)
    assert buffer.capacity == 4096
    buffer.room(0, 4096, torch.uint8).fill_(7)
    memory = reader.read(**buffer.publish())
    assert memory.numel() == 4096 and bool((memory == 7).all())
    path = Path(buffer.publish()["path"])
    assert path.exists()
    buffer.close()
    assert not path.exists(), "no name is left, and the memory goes with its last reader"
    buffer.close()
