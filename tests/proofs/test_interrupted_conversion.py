"""A conversion that is ended in the middle leaves nothing that looks complete, and no process.

A real conversion in a process of its own, which stops when the first bytes are done until the test ends it. Those
that write files of Hugging Face stop too, after one tensor each.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from torch.distributed.checkpoint.filesystem import FileSystem

from megatron_vppo.conversion.to_megatron import hf_to_megatron
from megatron_vppo.system.whole import whole_folder
from megatron_vppo.weights.config_files import copy_config_files
from tests.conversion.folders import left_behind

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

NAME = "Qwen2.5 tied"
STOPPING = """
import sys, time
from megatron_vppo.cli.main import main
from megatron_vppo.observability.byte_progress import ByteProgress
from megatron_vppo.weights.hf_folder import FileTensor

write, done = FileTensor.write_rows, []

def write_once(*arguments, **options):
    if done:
        time.sleep(300)
    done.append(write(*arguments, **options))

def stop(progress, num_bytes):
    print("in the middle", flush=True)
    time.sleep(300)

ByteProgress.add = stop
FileTensor.write_rows = write_once
if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
"""
LIMITED = """
import resource, sys
from megatron_vppo.cli.main import main

if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    sys.exit(main(["convert", *sys.argv[1:]]))
"""
"""No file may grow beyond that: what a full disk does to a write, without a disk to fill."""


@contextmanager
def stopped_in_the_middle(tmp_path: Path, repo_root: Path, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    script = tmp_path / "stopping.py"
    script.write_text(STOPPING)
    with subprocess.Popen(
        [sys.executable, script, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(repo_root)}, start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # whoever runs the tests may ignore it
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "in the middle\n"
            yield process
        finally:
            process.kill()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while alive := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, f"still there: {alive}"
        time.sleep(0.05)


@pytest.mark.distributed
@pytest.mark.extended
@pytest.mark.parametrize(
    ("processes", "ending", "status"),
    [(1, signal.SIGTERM, 143), (2, signal.SIGINT, 130)],
)
def test_ended_by_a_signal(
    processes: int, ending: signal.Signals, status: int, hf_folders: dict[str, Path], tmp_path: Path, repo_root: Path
) -> None:
    target = tmp_path / "target"
    arguments = ("hf-to-megatron", hf_folders[NAME], target, "--processes", processes)
    with stopped_in_the_middle(tmp_path, repo_root, *arguments) as process:
        assert left_behind(target) == [".target.tmp"]
        workers = children(process.pid)
        assert len(workers) >= (2 if processes == 2 else 0)
        process.send_signal(ending)
        assert process.wait(timeout=60) == status
    wait_until_gone(workers)
    assert left_behind(target) == []


@pytest.mark.parametrize("ending", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("writes", [42, 49, 56, 63, 84])
def test_a_signal_within_a_write(
    ending: type[BaseException], writes: int, hf_folders: dict[str, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """torch.save would hide it behind an error of its own, depending on which of its writes it meets."""

    class Ended(io.BytesIO):
        left = writes

        def write(self, data: Buffer, /) -> int:
            self.left -= 1
            if self.left < 0:
                raise ending
            return super().write(data)

    @contextmanager
    def ended(*_: object) -> Iterator[io.BytesIO]:
        yield Ended()

    before = threading.active_count()
    monkeypatch.setattr(FileSystem, "create_stream", ended)
    with pytest.raises(ending):
        hf_to_megatron(hf_folders[NAME], tmp_path / "target")
    assert left_behind(tmp_path / "target") == []
    assert threading.active_count() == before, "a thread that still reads"


@pytest.mark.distributed
def test_killed(hf_folders: dict[str, Path], converted: dict[str, Path], tmp_path: Path, repo_root: Path) -> None:
    """A killed conversion leaves a folder of another name and no worker.

    Meanwhile nobody else may write there; the next one cleans up.
    """
    target = tmp_path / "target"
    arguments = ("megatron-to-hf", converted[NAME], target, "--processes", 2)
    with stopped_in_the_middle(tmp_path, repo_root, *arguments) as process:
        with pytest.raises(ValueError, match=r"another process is writing .*target"):
            hf_to_megatron(hf_folders[NAME], target)
        assert left_behind(target) == [".target.tmp"]
        workers = children(process.pid)
        assert len(workers) >= 2
        process.kill()
    wait_until_gone(workers)
    assert left_behind(target) == [".target.tmp"]
    (tmp_path / ".target.tmp" / "left").touch()
    hf_to_megatron(hf_folders[NAME], target)
    assert left_behind(target) == ["target"]
    assert not (target / "left").exists() and not (target / "model.safetensors").exists()


@pytest.mark.distributed
@pytest.mark.extended
@pytest.mark.parametrize(("direction", "processes"), [("hf-to-megatron", 2), ("megatron-to-hf", 1)])
def test_full_disk(
    direction: str, processes: int, hf_folders: dict[str, Path], converted: dict[str, Path], tmp_path: Path,
    repo_root: Path,
) -> None:  # fmt: skip
    source = (hf_folders if direction == "hf-to-megatron" else converted)[NAME]
    (tmp_path / "limited.py").write_text(LIMITED)
    arguments = [direction, source, tmp_path / "target", "--processes", str(processes)]
    done = subprocess.run(
        [sys.executable, tmp_path / "limited.py", *arguments],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(repo_root)},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"vppo: {tmp_path / 'target'}: File too large. About 0.07 GB are needed in {tmp_path}")
    assert left_behind(tmp_path / "target") == []


def test_disk_full_at_the_tokenizer(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    (source / "config.json").write_text("{}")
    (source / "tokenizer.json").write_text("{}" * 10_000)
    with (
        pytest.raises(ValueError, match=r"target: No space left on device\. About 0\.07 GB are needed in .*, \d"),
        whole_folder(target, num_bytes=1) as folder,
    ):
        (folder / "tokenizer.json").symlink_to("/dev/full")
        copy_config_files(source, folder)
    assert left_behind(target) == []
