"""Temporary folders of processes that are killed: the next start removes them, and no others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from megatron_vppo.system.owned_folder import OwnedFolder, remove_left_folders

OLD = (1_000_000_000, 1_000_000_000)
OWNER = """
import sys
from pathlib import Path
from megatron_vppo.system.owned_folder import OwnedFolder
folder = OwnedFolder(prefix="own-", base=Path(sys.argv[1]))
(folder.path / "file").write_text("")
print(folder.path, flush=True)
sys.stdin.read()
"""


def start_owner(base: Path) -> tuple[subprocess.Popen[str], Path]:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(base)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    path = Path(owner.stdout.readline().strip())
    os.utime(path, OLD)
    return owner, path


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    owner, path = start_owner(tmp_path)
    remove_left_folders(prefix="own-", base=tmp_path)
    assert (path / "file").exists(), "its owner lives"
    owner.kill()
    owner.wait()
    seen: list[list[str]] = []
    remove_left_folders(prefix="own-", base=tmp_path, first=lambda folder: seen.append(os.listdir(folder)))
    assert not path.exists() and seen == [["file"]]


def test_what_is_young_or_of_another_name_stays(tmp_path: Path) -> None:
    for name in ("own-young", "other-old", "own-file"):
        if name == "own-file":
            (tmp_path / name).write_text("")
        else:
            (tmp_path / name).mkdir()
    os.utime(tmp_path / "other-old", OLD)
    os.utime(tmp_path / "own-file", OLD)
    (tmp_path / "own-link").symlink_to("other-old")
    os.utime(tmp_path / "own-link", OLD, follow_symlinks=False)
    remove_left_folders(prefix="own-", base=tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["other-old", "own-file", "own-link", "own-young"]


def test_remove_is_idempotent(tmp_path: Path) -> None:
    folder = OwnedFolder(prefix="own-", base=tmp_path)
    (folder.path / "file").write_text("")
    folder.remove()
    folder.remove()
    assert list(tmp_path.iterdir()) == []
