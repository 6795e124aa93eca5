"""The entries of a weight map: which Hugging Face tensors make which parameter of a Megatron model, where, and how.

One immutable table of them per model family serves loading, export, conversion and the live stream to the rollout
engines.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_vppo.config.choices import ModelPart
from megatron_vppo.weights.kinds import Kind


@dataclass(frozen=True)
class Entry:
    """One parameter of the whole model.

    Example: `Entry("language.decoder.layers.{}.mlp.linear_fc2.weight", ("model.layers.5.mlp.down_proj.weight",),
    Split((3584, 18944), 1), "layer", 5)` is split by columns over the ranks of the stage that holds layer 5.
    """

    template: str
    """The name in a pipeline stage's `named_parameters()`, with `{}` for the layer's number within the stage."""
    hf_names: tuple[str, ...]
    """The names in released checkpoints, in the order that `kind` takes and returns the tensors."""
    kind: Kind
    place: Literal["first", "layer", "last"]
    """The pipeline stage: the first, the one that holds language layer `layer`, or the last. Stages are counted in the
    order of the model; a rank may hold several."""
    layer: int | None = None
    """The number, in the whole model, of the language layer that `{}` stands for."""
    part: ModelPart = "language_model"
    is_copy: bool = False
    """True if another entry has the same tensors: the tied output layer of a pipeline's last stage. It is loaded, kept
    equal by the optimizer step, and never exported."""

    def stage(self, stage_layers: Sequence[int]) -> int:
        """Returns the pipeline stage that holds it, given the number of language layers of each stage."""
        if self.place != "layer":
            return 0 if self.place == "first" else len(stage_layers) - 1
        return self._stage_and_local_layer(stage_layers)[0]

    def local_name(self, stage_layers: Sequence[int]) -> str:
        """Returns its name in the `named_parameters()` of that stage."""
        if self.place != "layer":
            return self.template
        return self.template.format(self._stage_and_local_layer(stage_layers)[1])

    def _stage_and_local_layer(self, stage_layers: Sequence[int]) -> tuple[int, int]:
        assert self.layer is not None
        local = self.layer
        for stage, layers in enumerate(stage_layers):
            if local < layers:
                return stage, local
            local -= layers
        raise ValueError(f"layer {self.layer} lies beyond the {sum(stage_layers)} layers of the stages {stage_layers}")


def stage_entries(entries: Iterable[Entry], *, stage_layers: Sequence[int], stage: int) -> list[Entry]:
    """Selects the entries of one pipeline stage.

    A tied copy is among them if there are several stages; a single one holds the tensor once.
    """
    return [
        entry
        for entry in entries
        if entry.stage(stage_layers) == stage and not (entry.is_copy and len(stage_layers) == 1)
    ]


def stream_entries(entries: Iterable[Entry]) -> list[Entry]:
    """Selects the entries of an export: every tensor once, in the order of the model."""
    return [entry for entry in entries if not entry.is_copy]


def parameter_count(entries: Iterable[Entry]) -> int:
    """Counts the values of the whole model. A tied output layer is counted once, as the embedding."""
    return sum(math.prod(shape) for entry in stream_entries(entries) for shape in entry.kind.hf_shapes())
