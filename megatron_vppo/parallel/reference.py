"""The weights of the reference model: those that the run began with, kept on the host.

They take the place of the trained ones while responses are scored, parameter by parameter, so that the device never
holds more than one of them twice:

    device    trained weights        reference weights       trained weights
    host      reference weights      trained weights         reference weights
              update, sampling       scoring                 update, sampling
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from megatron_vppo.models.qwen_vl import QwenVLModel


class ReferenceWeights:
    """A copy of the present weights of some stages, those that are trained."""

    def __init__(self, stages: Sequence[QwenVLModel]) -> None:
        self._parameters = [p for stage in stages for p in stage.parameters() if p.requires_grad]
        self._elsewhere = [_host_copy(parameter) for parameter in self._parameters]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Puts the reference weights into the model meanwhile. Afterwards it has its own again, every bit of them."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for parameter, host in zip(self._parameters, self._elsewhere, strict=True):
            here = parameter.detach().clone()
            parameter.copy_(host)
            host.copy_(here)


def _host_copy(parameter: torch.nn.Parameter) -> torch.Tensor:
    host = torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=parameter.device.type == "cuda")
    return host.copy_(parameter.detach())
