"""Bars 3, 4 and 5 of waste.py: waits, copies and bytes of scoring and update, on a pretended device.

Which bytes are pixels is not asked of the code, since pixels may be copied, joined and converted on their way. Each
phase runs twice, with models that differ in the number of values of a patch and in nothing else: what grows with it are
pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench.pretend_device import PretendDevice
from bench.pretended_memory import BLOCKING_COPY, Tally
from bench.waste_bars import Bar, Case
from bench.waste_policy import (
    FAMILIES,
    PATCH_SIDE,
    FamilyName,
    Images,
    device_tensors,
    distinct_image_bytes,
    make_policy,
    make_responses,
    on_pretended_device,
    small_config,
    train_batch,
)
from megatron_vppo.config.choices import PerturbUnit
from megatron_vppo.parallel import staging
from megatron_vppo.parallel.layout import Layout, single_rank
from megatron_vppo.parallel.policy import MegatronPolicy

GROUPS = 4
"""A micro-batch has one group."""
SMALL_PATCH = PATCH_SIDE // 2
PIXEL_SHARE, BYTES_PER_TOKEN, COPIES, WAITS_OF_CALL = 1.05, 24, 1, 2
"""The limits of bars 4, 5, 4 and 3."""

_GRADIENT_SUM = "start_grad_sync"
"""The function of Megatron that sums gradients over data-parallel ranks. gloo copies within it; NCCL would not."""

Phase = Callable[[MegatronPolicy], object]
Name = tuple[str, PerturbUnit, FamilyName]
"""A phase, the responses that share a perturbed view, and a model."""


@dataclass(frozen=True)
class Counted:
    """One call of a phase, with GROUPS micro-batches."""

    tally: Tally
    tokens: int
    """Packed tokens of all micro-batches."""

    @property
    def num_bytes(self) -> int:
        return sum(self.tally.bytes_to_device.values())

    @property
    def waits_between(self) -> int:
        """The waits from the beginning of the first micro-batch to that of the last."""
        return self.tally.moments[-1].waits - self.tally.moments[0].waits

    @property
    def copies_between(self) -> float:
        """Copies to the device per micro-batch."""
        moments = self.tally.moments
        return (moments[-1].copies_to_device - moments[0].copies_to_device) / (len(moments) - 1)

    def lines(self, counter: dict[Any, int]) -> dict[str, int]:
        """Returns counts by line, of all micro-batches and the largest first."""
        ordered = sorted(counter.items(), key=lambda item: -item[1])
        return {" | ".join(key) if isinstance(key, tuple) else key: count for key, count in ordered}


def waits() -> list[Bar]:
    """Counts bars 3, 4 and 5."""
    with single_rank() as layout:
        counted = {name: found for family in FAMILIES for name, found in _phases(family, layout, PATCH_SIDE).items()}
        smaller = {name: found for family in FAMILIES for name, found in _phases(family, layout, SMALL_PATCH).items()}
    return [_waits(counted), _pixels(counted, smaller), _other_bytes(counted, smaller)]


def _phases(family: FamilyName, layout: Layout, patch_side: int) -> dict[Name, Counted]:
    """Runs the phases of a model. What is done once, in the first call of a phase, is left out."""
    rows = make_responses(GROUPS)
    batch = train_batch(rows)
    found: dict[Name, Counted] = {}
    units: tuple[PerturbUnit, ...] = ("image", "row")
    for per in units:
        phases: dict[str, Phase] = {
            "score": lambda policy: policy.score(rows, step=1, views="both"),
            "score, kl_full": lambda policy: policy.score(rows, step=1, views="both", divergence="kl_full"),
        }
        if per == "image":
            phases["update"] = lambda policy: policy.accumulate_gradients(batch)
        with PretendDevice() as device, patch.object(staging, "host_buffer", _pinned):
            policy = make_policy(
                small_config(family, patch_side=patch_side),
                on_pretended_device(layout),
                per=per,
                images=Images(patch_side),
            )
            device.take_over(device_tensors(policy.trainable))
            for name, phase in phases.items():
                phase(policy)
                found[name, per, family] = _count(device, policy, phase)
    return found


def _pinned(num_bytes: int, device: torch.device) -> Tensor:
    """Stands for the host's memory where the device is a GPU."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


def _count(device: PretendDevice, policy: MegatronPolicy, phase: Phase) -> Counted:
    tokens = 0

    def begin(stage: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal tokens
        tokens += len(inputs[0].token_ids_C)
        device.note()

    hook = policy.trainable.stages[0].register_forward_pre_hook(begin)
    device.restart()
    phase(policy)
    hook.remove()
    tally = device.restart()
    for counter in (tally.waits, tally.bytes_to_device, tally.copies_to_device):
        for key in [key for key in counter if _GRADIENT_SUM in str(key)]:
            del counter[key]
    return Counted(tally, tokens)


def _waits(counted: dict[Name, Counted]) -> Bar:
    cases = []
    for name, found in counted.items():
        of_call = sum(found.tally.waits.values())
        cases += [
            Case(f"{', '.join(name)}, between micro-batches", found.waits_between, 0),
            Case(f"{', '.join(name)}, of a call with {GROUPS}", of_call, WAITS_OF_CALL),
        ]
    where = {", ".join(name): found.lines(found.tally.waits) for name, found in counted.items()}
    return Bar(3, "Times that the host waits for the device", tuple(cases), where)


def _pixels(counted: dict[Name, Counted], smaller: dict[Name, Counted]) -> Bar:
    cases = []
    for name, found in counted.items():
        share = _pixel_bytes(found, smaller[name]) / distinct_image_bytes(GROUPS)
        cases += [
            Case(f"{', '.join(name)}, bytes", share, PIXEL_SHARE),
            Case(f"{', '.join(name)}, blocking copies", found.tally.waits_of(BLOCKING_COPY), 0),
            Case(f"{', '.join(name)}, copies of a micro-batch", found.copies_between, COPIES),
        ]
    words = "Pixels to the device, over the bytes of the distinct images; copies that block; copies"
    return Bar(4, words, tuple(cases))


def _other_bytes(counted: dict[Name, Counted], smaller: dict[Name, Counted]) -> Bar:
    cases = []
    for name, found in counted.items():
        other = found.num_bytes - _pixel_bytes(found, smaller[name])
        cases.append(Case(", ".join(name), other / found.tokens, BYTES_PER_TOKEN))
    where = {", ".join(name): found.lines(found.tally.bytes_to_device) for name, found in counted.items()}
    return Bar(5, "Bytes to the device per packed token, without pixels", tuple(cases), where)


def _pixel_bytes(found: Counted, smaller: Counted) -> float:
    return (found.num_bytes - smaller.num_bytes) * PATCH_SIDE**2 / (PATCH_SIDE**2 - SMALL_PATCH**2)
