"""The folder of a model: a local one as it is, and mistakes that never reach the network."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vppo.setup.model_folder import model_folder


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert model_folder(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("path", ["/no/such/folder", "./absent", "a/b/c", "absent"])
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match=r"model\.path=.*: no such folder, and not a hub id of the form owner/name"):
        model_folder(path)


@pytest.mark.parametrize("path", ["my model/x", "build/model"])
def test_a_missing_folder_that_may_be_a_hub_id_is_named(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`huggingface_hub` would speak of the network, or of the letters of a repository."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=rf"model\.path={path}: no such folder, and not read from the hub \(.+\)"):
        model_folder(path)
