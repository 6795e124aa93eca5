"""The variables by which torch keeps NCCL's last collectives; what NCCL makes of them needs GPUs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_vppo.system.flight_recorder import record_collectives

NAMES = (
    "TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE",
    "TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "TORCH_NCCL_DUMP_ON_TIMEOUT",
)  # fmt: skip


@pytest.mark.parametrize(
    ("of_the_user", "expected"),
    [
        ({}, ["2000", None, "/logs/nccl_trace_rank_", None, "1"]),
        (
            {"TORCH_FR_BUFFER_SIZE": "5", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"},
            ["5", None, "/logs/nccl_trace_rank_", None, "0"],
        ),
        (
            {"TORCH_NCCL_TRACE_BUFFER_SIZE": "7", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/tmp/mine"},
            [None, "7", None, "/tmp/mine", "1"],
        ),
    ],
)  # fmt: skip
def test_what_the_user_has_set_stays(
    of_the_user: dict[str, str], expected: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that what is set below is taken back
        monkeypatch.delenv(name)
    for name, value in of_the_user.items():
        monkeypatch.setenv(name, value)
    record_collectives(Path("/logs"))
    assert [os.environ.get(name) for name in NAMES] == expected
