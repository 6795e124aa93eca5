"""Processes that a rank starts: an environment without the rank's own place, and an end with the rank's."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_vppo.rollout.os_processes import parent_of
from megatron_vppo.system.processes import child_environment, children_of


def test_a_child_does_not_take_itself_for_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names are those that torchrun sets (torch.distributed.elastic, `LocalElasticAgent._get_worker_env`)."""
    names = [
        "RANK",
        "LOCAL_RANK",
        "GROUP_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC_RUN_ID",
    ]
    for name in names:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("KEPT", "x")
    environment = child_environment()
    assert not environment.keys() & {*names}
    assert environment["KEPT"] == "x"
    assert set(names) <= os.environ.keys(), "this process stays a rank"


def test_a_child_finds_this_package_before_any_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "megatron_vppo.py").write_text("raise ImportError('the wrong one')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    program = "import megatron_vppo; print(megatron_vppo.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", program], env=child_environment(), cwd="/", capture_output=True, text=True, check=True
    )
    assert Path(found.stdout.strip()).parents[1] == Path(__file__).resolve().parents[2]
    assert child_environment()["PYTHONPATH"].endswith(f"{os.pathsep}{tmp_path}")


def test_a_child_ends_with_its_parent() -> None:
    child = "import time; from megatron_vppo.system.processes import die_with_parent as d; import sys; "
    child += "d(int(sys.argv[1])); print('ready', flush=True); time.sleep(600)"
    program = (
        "import os, subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}, str(os.getpid())], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program], env=child_environment(), stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert _is_alive(pid)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while _is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_alive(pid)


def test_names_that_are_no_utf_8_do_no_harm(tmp_path: Path) -> None:
    """Linux cuts names after 15 bytes. One process on the host with half a character ended every checkpoint."""
    program = tmp_path / ("x" + "\u8bad" * 5)
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([program, "60"]) as named:
        try:
            comm, deadline = Path(f"/proc/{named.pid}/comm"), time.monotonic() + 10
            while comm.read_bytes() != os.fsencode(program.name)[:15] + b"\n":  # not yet, just after exec
                assert time.monotonic() < deadline
            assert named.pid in children_of(os.getpid())
            assert parent_of(named.pid) == os.getpid()
        finally:
            named.kill()


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
