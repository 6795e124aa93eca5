"""Segments in /dev/shm of an engine that was killed together with all of its helpers."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

from megatron_vppo.rollout.os_processes import unlink_segments_named_in


def test_segments_of_a_folder_and_no_others(tmp_path: Path) -> None:
    mine, other = f"vllm_dist_{uuid4().hex}", f"vllm_dist_{uuid4().hex}"
    (tmp_path / mine).write_text("what vLLM's workers meet by")
    segments = [Path(f"/dev/shm/{name}-world-[0-1]-cpushm") for name in (mine, other)]
    try:
        for segment in segments:
            segment.write_text("")
        unlink_segments_named_in(tmp_path)
        assert [segment.exists() for segment in segments] == [False, True]
    finally:
        for segment in segments:
            segment.unlink(missing_ok=True)
