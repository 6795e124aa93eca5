"""The error of a rank: where it happened, and whether it follows from that of another rank."""

from __future__ import annotations

import json
import socket
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_vppo.cli.rank_error import describe, parse_error, write_error

GLOO = RuntimeError("[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer")
LOG = Path("logs/trainer_rank_3.log")


def test_what_is_written_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    error = describe(ValueError("wrong\nat the core"), rank=3, log=LOG)
    assert (error.rank, error.status, error.lost_contact) == (3, 2, False)
    assert error.text() == "rank 3: wrong\nat the core\n(traceback: logs/trainer_rank_3.log)"
    assert write_error(error)
    content = json.loads((tmp_path / "error.json").read_text())
    assert parse_error(content) == error
    assert content["message"] == "wrong\nat the core" and content["timestamp"] == int(error.time)


def test_an_error_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = describe(ValueError("x"), rank=3, log=LOG)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    assert not write_error(error)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "no" / "folder"))
    assert not write_error(error)
    assert parse_error({"message": "of a rank that died without a word"}) is None


def test_a_collective_that_failed_is_a_lost_contact() -> None:
    with pytest.raises(dist.DistError) as of_the_store:
        dist.TCPStore("localhost", 1, timeout=timedelta(seconds=1))
    for error in (GLOO, of_the_store.value):
        assert describe(error, rank=3, log=LOG).lost_contact
    assert not describe(RuntimeError("the rollout engine ended"), rank=3, log=LOG).lost_contact
    try:
        try:
            raise GLOO
        except RuntimeError:
            raise KeyError("while an engine was closed") from None
    except KeyError as error:
        assert describe(error, rank=3, log=LOG).lost_contact
    text = describe(GLOO, rank=3, log=LOG).text()
    assert text == f"rank 3 lost contact with another rank: {GLOO} (traceback: {LOG})"


def test_errors_that_follow_from_each_other() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    assert not describe(first, rank=3, log=LOG).lost_contact
    second.__context__, second.__cause__ = GLOO, None
    assert describe(first, rank=3, log=LOG).lost_contact


def test_an_error_without_text_of_its_own() -> None:
    class Wordless(RuntimeError):
        def __str__(self) -> str:
            raise AttributeError("text")

    assert describe(RuntimeError(Wordless()), rank=3, log=LOG).message == "RuntimeError"


@pytest.mark.parametrize(
    "variables, named",
    [
        ({}, False),
        ({"GROUP_WORLD_SIZE": "1", "SLURM_NNODES": "2"}, False),
        ({"GROUP_WORLD_SIZE": "2"}, True),
        ({"SLURM_NNODES": "2"}, True),
    ],
)
def test_the_machine_is_named_where_there_are_several(
    variables: dict[str, str], named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GROUP_WORLD_SIZE", "SLURM_NNODES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    place = f"rank 3 on {socket.gethostname()}: " if named else "rank 3: "
    assert describe(ValueError("x"), rank=3, log=LOG).text().startswith(f"{place}x")
