"""Errors in a checkpoint are reported with the tensor's and the file's name."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from megatron_vppo.weights.entries import Entry
from megatron_vppo.weights.kinds import Gated, Split
from megatron_vppo.weights.load_hf import load_hf_weights


class TwoTensors(nn.Module):
    """A gated projection and a row-parallel one, as the second of two tensor-parallel ranks holds them."""

    weight_map = (
        Entry("gated.{}", ("gate", "up"), Gated(4, (3,)), "layer", 0),
        Entry("down.{}", ("down",), Split((3, 4), 1), "layer", 0),
    )
    stage_layers = (1,)
    stage = 0
    hf_copies = MappingProxyType({"spare": "down"})

    def __init__(self) -> None:
        super().__init__()
        self.gated = nn.ParameterList([torch.zeros(4, 3)])
        self.down = nn.ParameterList([torch.zeros(3, 2)])

    @staticmethod
    def tensor_group(entry: Entry) -> SimpleNamespace:
        return SimpleNamespace(rank=lambda: 1, size=lambda: 2)

    @staticmethod
    def to_released_name(name: str) -> str:
        return name.removeprefix("prefix.")


def tensors() -> dict[str, torch.Tensor]:
    return {
        "gate": torch.arange(12.0).view(4, 3),
        "prefix.up": torch.arange(12.0).view(4, 3) + 100,
        "down": torch.arange(12.0).view(3, 4),
        "spare": torch.arange(12.0).view(3, 4),
    }


def test_a_rank_gets_its_part(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    model = TwoTensors()
    load_hf_weights(model, tmp_path)
    assert model.gated[0].tolist() == [[6, 7, 8], [9, 10, 11], [106, 107, 108], [109, 110, 111]]
    assert model.down[0].tolist() == [[2, 3], [6, 7], [10, 11]]


def test_errors_name_tensor_and_file(tmp_path: Path) -> None:
    model, file = TwoTensors(), tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match=r"holds neither model\.safetensors nor"):
        load_hf_weights(model, tmp_path)
    save_file({n: t for n, t in tensors().items() if n != "down"}, file)
    with pytest.raises(ValueError, match=r"lacks 1 tensors of the model, first \['down'\]"):
        load_hf_weights(model, tmp_path)
    for spare in (torch.zeros(3, 4), torch.zeros(4, 3)):
        save_file({**tensors(), "spare": spare}, file)
        with pytest.raises(ValueError, match=r"spare in .*model\.safetensors differs from down, which config"):
            load_hf_weights(model, tmp_path)
    save_file({**tensors(), "extra": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"does not know, first \['extra'\] in \['model\.safetensors'\]"):
        load_hf_weights(model, tmp_path)
    save_file({**tensors(), "down": torch.zeros(3, 5), "spare": torch.zeros(3, 5)}, file)
    with pytest.raises(ValueError, match=r"down in .*model\.safetensors has shape \(3, 5\), .* says \(3, 4\)"):
        load_hf_weights(model, tmp_path)
    file.unlink()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"down": "part.safetensors"}}')
    with pytest.raises(ValueError, match=r"part\.safetensors.*download them again"):
        load_hf_weights(model, tmp_path)


def test_a_value_that_is_no_number(tmp_path: Path) -> None:
    """Whichever tensor of a parameter holds it, and only where this rank reads it."""
    for name, index, read in (("prefix.up", (3, 0), True), ("down", (0, 3), True), ("gate", (0, 0), False)):
        held = tensors()
        held[name][index] = float("nan")
        del held["spare"]
        save_file(held, tmp_path / "model.safetensors")
        if read:
            with pytest.raises(ValueError, match=rf"{name} in .*model\.safetensors holds NaN"):
                load_hf_weights(TwoTensors(), tmp_path)
        else:
            load_hf_weights(TwoTensors(), tmp_path)
