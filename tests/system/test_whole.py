"""Files and folders appear whole or not at all, whatever ends the one who writes them."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_vppo.system.whole import remove_folder, unfinished_folder, whole_file, whole_folder, write_new_text

WRITER = """
import sys, time
from contextlib import nullcontext
from pathlib import Path
from megatron_vppo.system.whole import exit_on_sigterm, whole_file, whole_folder

what, target = sys.argv[1], Path(sys.argv[2])
with exit_on_sigterm() if what == "folder until SIGTERM" else nullcontext():
    if what == "file":
        with whole_file(target) as file:
            file.write(b"half of the new")
            file.flush()
            print("in the middle", flush=True)
            time.sleep(300)
    else:
        with whole_folder(target, replace=True) as folder:
            (folder / "half").write_text("of the new")
            print("in the middle", flush=True)
            time.sleep(300)
"""


def write_until(ending: signal.Signals, what: str, target: Path, *, meanwhile: Callable[[], None]) -> int:
    """A process that writes the target and is ended in the middle; its exit status."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, what, str(target)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "in the middle\n"
            meanwhile()
            process.send_signal(ending)
            return process.wait(timeout=60)
        finally:
            process.kill()


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def old_file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_text("old")
    return path


@pytest.fixture
def old_folder(tmp_path: Path) -> Path:
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    (tmp_path / "folder" / "sub" / "file").write_text("old")
    return tmp_path / "folder"


# --- One file ---------------------------------------------------------------------------------------------------------


def test_a_file_is_replaced(old_file: Path) -> None:
    with whole_file(old_file) as file:
        file.write(b"new")
        assert old_file.read_text() == "old"
    assert contents(old_file.parent) == {"file": "new"}


@pytest.mark.parametrize("ending", [OSError, KeyboardInterrupt])
def test_a_file_that_fails_leaves_the_old_one(old_file: Path, ending: type[BaseException]) -> None:
    with pytest.raises(ending), whole_file(old_file) as file:
        file.write(b"half of the new")
        raise ending
    assert contents(old_file.parent) == {"file": "old"}


def test_a_file_that_fills_the_disk_is_named(old_file: Path) -> None:
    """A limit of 1 KiB per file stands in for the disk; write() then fails in the same way, and names no file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    try:
        with pytest.raises(OSError) as caught, whole_file(old_file) as file:
            file.write(b"x" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(old_file))
    assert contents(old_file.parent) == {"file": "old"}


def test_a_file_that_cannot_be_put_in_place_is_named(tmp_path: Path) -> None:
    """By the name that the user knows, not by that of the unfinished file."""
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as in_the_way, whole_file(tmp_path / "folder") as file:
        file.write(b"new")
    with pytest.raises(FileNotFoundError) as no_parent, whole_file(tmp_path / "none" / "file"):
        pass
    assert in_the_way.value.filename == str(tmp_path / "folder")
    assert no_parent.value.filename == str(tmp_path / "none" / "file")
    assert contents(tmp_path) == {}


def test_a_file_whose_writer_is_killed_leaves_the_old_one(old_file: Path) -> None:
    assert write_until(signal.SIGKILL, "file", old_file, meanwhile=lambda: None) == -signal.SIGKILL
    assert old_file.read_text() == "old"


# --- A folder ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replace", [False, True])
def test_a_folder_appears_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replace: bool) -> None:
    monkeypatch.chdir(tmp_path)
    target = Path("missing", "folder")
    with whole_folder(target, replace=replace, num_bytes=1) as folder:
        assert folder == unfinished_folder(target) == tmp_path / "missing" / ".folder.tmp"
        (folder / "file").write_text("new")
        assert not target.exists()
    assert contents(tmp_path) == {"missing/folder/file": "new"}


def test_a_folder_is_replaced_where_that_is_wanted(old_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"folder exists; remove it"), whole_folder(old_folder):
        pass
    with whole_folder(old_folder, replace=True) as folder:
        (folder / "file").write_text("new")
        assert contents(old_folder) == {"sub/file": "old"}
    assert contents(old_folder.parent) == {"folder/file": "new"}


@pytest.mark.parametrize("ending", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_folder_that_fails_leaves_the_old_one(old_folder: Path, ending: type[BaseException]) -> None:
    with pytest.raises(ending), whole_folder(old_folder, replace=True) as folder:
        (folder / "half").write_text("of the new")
        raise ending
    assert os.listdir(old_folder.parent) == ["folder"]
    assert contents(old_folder) == {"sub/file": "old"}


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(
    old_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if Path(source).name == ".folder.tmp":
            raise OSError(errno.EIO, "broken disk")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="broken disk"), whole_folder(old_folder, replace=True):
        pass
    assert os.listdir(old_folder.parent) == ["folder"]
    assert contents(old_folder) == {"sub/file": "old"}


def test_a_folder_whose_writer_is_killed(old_folder: Path) -> None:
    """The old one stays. Nobody else may write there meanwhile, and the next one removes what the killed one left."""

    def refused() -> None:
        with (
            pytest.raises(ValueError, match=r"another process is writing .*folder"),
            whole_folder(old_folder, replace=True),
        ):
            pass
        assert (unfinished_folder(old_folder) / "half").exists()

    assert write_until(signal.SIGKILL, "folder", old_folder, meanwhile=refused) == -signal.SIGKILL
    assert contents(old_folder) == {"sub/file": "old"}
    assert (unfinished_folder(old_folder) / "half").exists()
    with whole_folder(old_folder, replace=True) as folder:
        (folder / "file").write_text("new")
    assert contents(old_folder.parent) == {"folder/file": "new"}


def test_a_folder_whose_writer_gets_sigterm(old_folder: Path) -> None:
    status = write_until(signal.SIGTERM, "folder until SIGTERM", old_folder, meanwhile=lambda: None)
    assert status == 128 + signal.SIGTERM
    assert contents(old_folder.parent) == {"folder/sub/file": "old"}


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int | str] = []
    rename = os.rename
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(os, "rename", lambda *names: (done.append("renamed"), rename(*names)))
    with whole_folder(tmp_path / "target") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
        written = {path.stat().st_ino for path in (folder, folder / "sub", folder / "sub" / "file")}
    renamed = done.index("renamed")
    assert set(done[:renamed]) == written
    assert done[renamed + 1 :] == [tmp_path.stat().st_ino], "the name itself"


def test_a_full_disk_is_said(old_folder: Path) -> None:
    message = r"folder: No space left on device\. \d+\.\d\d GB are free in "
    with pytest.raises(ValueError, match=message), whole_folder(old_folder, replace=True) as folder:
        (folder / "file").symlink_to("/dev/full")
        (folder / "file").write_text("x")
    assert contents(old_folder.parent) == {"folder/sub/file": "old"}


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with whole_folder(tmp_path / "target") as folder:
        (folder / "file").write_text("x")
    assert contents(tmp_path) == {"target/file": "x"}


def test_a_folder_is_removed_as_a_whole(old_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shutil, "rmtree", ended)
        remove_folder(old_folder)
    assert not old_folder.exists()
    old_folder.mkdir()
    remove_folder(old_folder)
    assert list(old_folder.parent.iterdir()) == []


def test_the_free_space_is_asked_for_first(tmp_path: Path) -> None:
    message = r"target: not enough space\. About 1000000000\.07 GB are needed in .*, \d+\.\d\d GB are free there"
    with pytest.raises(ValueError, match=message):
        whole_folder(tmp_path / "target", num_bytes=10**18).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_an_edited_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "run.sbatch"
    write_new_text(path, "one\n", option="--output")
    write_new_text(path, "one\n", option="--output")
    path.write_text("mine\n")
    with pytest.raises(ValueError, match=r"run\.sbatch is there already and says something else.* set --output"):
        write_new_text(path, "one\n", option="--output")
    assert path.read_text() == "mine\n"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--output .*: there is no folder .*nowhere; make it"):
        write_new_text(tmp_path / "nowhere/run.sbatch", "one\n", option="--output")
