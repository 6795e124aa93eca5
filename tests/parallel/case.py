"""A layout as the tests of layouts write it: one line, opened on every rank by the same code."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vppo.models.options import PLAIN, ModelOptions
from megatron_vppo.parallel.layout import Layout, init_layout


@dataclass(frozen=True)
class Case:
    """The sizes of a layout and the options of the model under it."""

    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    data: int = 1
    options: ModelOptions = PLAIN
    token_alignment: int = 1
    overlap: bool = False
    """Gradients are reduced in the backward pass."""

    @property
    def ranks(self) -> int:
        return self.tensor * self.context * self.pipeline * self.data

    def open(self) -> Layout:
        """Builds the layout. A collective; what the ranks do not need for one model is data-parallel."""
        return init_layout(
            tensor=self.tensor,
            context=self.context,
            pipeline=self.pipeline,
            virtual_stages=self.options.virtual_stages,
            vision_split=self.options.vision_split,
            timeout_seconds=300,
        )
