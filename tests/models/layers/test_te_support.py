"""The amaxes of recipe 'delayed' around a pass that is to leave them alone. The layers are stand-ins of TE's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from megatron_vppo.models.layers.te_support import amaxes_untouched


class Layer(nn.Module):
    """Keeps a history of amaxes like a layer of TransformerEngine: from its first pass on, the present row first."""

    def __init__(self, recipe: str = "delayed") -> None:
        super().__init__()
        self.recipe = recipe
        self.fp8_meta: dict[str, object] = {"fp8_checkpoint": False}

    def forward(self, x: Tensor) -> Tensor:
        fresh = {"amax_history": torch.zeros(3, 1)} if self.recipe == "delayed" else {}
        state = self.fp8_meta.setdefault("scaling_fwd", SimpleNamespace(**fresh))
        if isinstance(state, SimpleNamespace) and fresh:
            state.amax_history[0] = torch.maximum(state.amax_history[0], x.abs().max())
        return x

    def history(self) -> list[float]:
        history: Tensor = self.fp8_meta["scaling_fwd"].amax_history  # type: ignore[attr-defined]
        return history[:, 0].tolist()


def test_amaxes_are_those_before_the_pass() -> None:
    ran, fresh, other = Layer(), Layer(), Layer("blockwise")
    ran(torch.tensor([-2.0]))
    row = ran.fp8_meta["scaling_fwd"].amax_history[0]  # type: ignore[attr-defined]
    models = [nn.Sequential(ran, other), nn.Sequential(nn.Linear(1, 1), fresh)]
    with amaxes_untouched(models):
        for layer in (ran, fresh, other):
            layer(torch.tensor([7.0]))
        assert ran.history() == fresh.history() == [7.0, 0.0, 0.0]
    assert ran.history() == [2.0, 0.0, 0.0] and fresh.history() == [0.0, 0.0, 0.0]
    assert row.tolist() == [2.0], "TransformerEngine holds views of the rows"


def test_amaxes_are_put_back_after_an_error() -> None:
    layer = Layer()
    with pytest.raises(KeyError), amaxes_untouched([layer]):
        layer(torch.tensor([7.0]))
        raise KeyError
    assert layer.history() == [0.0, 0.0, 0.0]
