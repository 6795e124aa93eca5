"""The stage of a pipeline on which each kind of parameter lies."""

from __future__ import annotations

from megatron_vppo.weights.entries import Entry
from megatron_vppo.weights.kinds import whole


def test_stages_by_hand() -> None:
    """Three stages of 2, 1 and 2 layers."""
    layers = (2, 1, 2)
    first, last = (Entry("name", ("hf",), whole(1), place) for place in ("first", "last"))
    assert (first.stage(layers), last.stage(layers)) == (0, 2)
    assert first.local_name(layers) == last.local_name(layers) == "name"
    of_layers = [Entry("layers.{}.norm", (f"hf.{n}",), whole(1), "layer", n) for n in range(5)]
    assert [entry.stage(layers) for entry in of_layers] == [0, 0, 1, 2, 2]
    names = ["layers.0.norm", "layers.1.norm", "layers.0.norm", "layers.0.norm", "layers.1.norm"]
    assert [entry.local_name(layers) for entry in of_layers] == names
