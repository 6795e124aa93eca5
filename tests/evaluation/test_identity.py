"""The fingerprint of a model's folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from megatron_vppo.evaluation.identity import model_fingerprint, template_digest

SIZE = 5 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"\1" * SIZE)
    return tmp_path / "m"


def test_where_a_model_lies_and_when_it_was_written_does_not_count(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    os.utime(copy / "model.safetensors", (0, 0))
    assert model_fingerprint(copy) == model_fingerprint(folder)


@pytest.mark.parametrize("at", [0, SIZE // 15 + 100, SIZE - 1])
def test_other_weights_are_another_model(folder: Path, at: int) -> None:
    """At the begin, within the second of the sixteen pieces, and at the end."""
    before = model_fingerprint(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(at)
        file.write(b"\2")
    assert model_fingerprint(folder) != before


def test_so_are_another_length_and_another_description(folder: Path) -> None:
    found = {model_fingerprint(folder)}
    (folder / "model.safetensors").write_bytes(b"\1" * (SIZE + 1))
    found.add(model_fingerprint(folder))
    (folder / "chat_template.jinja").write_text("x")
    found.add(model_fingerprint(folder))
    assert len(found) == 3


def test_a_template_is_told_by_its_text(tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("a", "b")]
    for path in paths:
        Path(path).write_text("{{ content }} Think.")
    first, copy = map(template_digest, paths)
    assert first is not None and first == copy
    Path(paths[0]).write_text("{{ content }} Look.")
    assert template_digest(paths[0]) != first
    assert template_digest(None) is None
