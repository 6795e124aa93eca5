"""Bars 1, 2 and 17 of waste.py: FLOPs, and passes of the vision tower."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bench.counted_flops import Floor, count_flops
from bench.waste_bars import Bar, Case
from bench.waste_policy import (
    CHANNELS,
    FAMILIES,
    FRAMES,
    IMAGE_TOKENS,
    LENGTHS,
    PATCH_SIDE,
    FamilyName,
    Images,
    make_policy,
    make_responses,
    small_config,
    train_batch,
)
from megatron_vppo.algorithm.types import Response
from megatron_vppo.config.choices import PerturbUnit
from megatron_vppo.models.flops import model_cost
from megatron_vppo.parallel.layout import Layout, init_layout, single_rank
from megatron_vppo.parallel.policy import MegatronPolicy

GROUPS = 2
UNITS: tuple[PerturbUnit, ...] = ("image", "row")
SHARE, SECOND_VIEW = 1.05, 1.27
"""The limits of bars 1 and 17. Without any waste the second view makes training 1.25 times as expensive."""


def flops() -> list[Bar]:
    """Counts bars 1, 2 and 17 on one rank, and bar 1 on two tensor-parallel ranks."""
    with single_rank() as layout:
        shares = [case for family in FAMILIES for case in _shares(family, layout)]
        second = [_second_view(family, layout) for family in FAMILIES]
        towers = [case for family in FAMILIES for case in _tower_passes(family, layout)]
    words = "FLOPs that scoring and update execute, over the least with prompts that are shared"
    return [
        Bar(1, words, (*shares, *_shares_of_two_ranks())),
        Bar(2, "Images through the vision tower, over distinct images and perturbations", tuple(towers)),
        Bar(17, "FLOPs of training with the second view over those without it, perturb.per=image", tuple(second)),
    ]


def _groups(rows: list[Response]) -> list[list[Response]]:
    return [list(group) for _, group in itertools.groupby(rows, key=lambda row: row.group_id)]


def _shares(family: FamilyName, layout: Layout, *, units: tuple[PerturbUnit, ...] = UNITS) -> list[Case]:
    """Counts the FLOPs of this rank, and compares them with its part of the least."""
    config, rows, ranks = small_config(family), make_responses(GROUPS), layout.tensor
    patch_product = 2 * CHANNELS * FRAMES * PATCH_SIDE**2 * config.vision_config.hidden_size
    groups, floor = _groups(rows), Floor(model_cost(config), patch_product, ranks)
    name = family if ranks == 1 else f"{family}, {ranks} tensor-parallel ranks"
    cases = []
    for per in units:
        policy = make_policy(config, layout, per=per, images=Images())
        executed = count_flops(lambda policy=policy: policy.score(rows, step=1, views="both"))
        cases.append(Case(f"score, {per}, {name}", executed * ranks / floor.scoring(groups, per=per), SHARE))
    executed = count_flops(lambda: policy.accumulate_gradients(train_batch(rows)))
    return [*cases, Case(f"update, {name}", executed * ranks / floor.update(groups), SHARE)]


def _second_view(family: FamilyName, layout: Layout) -> Case:
    policy, rows = make_policy(small_config(family), layout, per="image", images=Images()), make_responses(GROUPS)
    one = count_flops(lambda: policy.score(rows, step=1, views="original"))
    both = count_flops(lambda: policy.score(rows, step=1, views="both"))
    update = count_flops(lambda: policy.accumulate_gradients(train_batch(rows)))
    return Case(family, (both + update) / (one + update), SECOND_VIEW)


# --- The vision tower -------------------------------------------------------------------------------------------------


def _tower_passes(family: FamilyName, layout: Layout) -> list[Case]:
    """Counts in micro-batches that hold whole groups, and in some that cut them."""
    rows = make_responses(GROUPS)
    cases = []
    one = len(LENGTHS)
    for rows_each, cut in (
        (one, "whole groups"),
        (3 * one // 2, "room for a group and a half"),
        (one // 2, "half groups"),
    ):
        for per, perturbed in (("image", 1), ("row", len(LENGTHS))):
            policy = make_policy(small_config(family), layout, per=per, images=Images(), rows_each=rows_each)
            found = _images_run(policy, lambda policy=policy: policy.score(rows, step=1, views="both"))
            cases.append(Case(f"score, {per}, {cut}, {family}", found / (GROUPS * (1 + perturbed)), 1.0))
        found = _images_run(policy, lambda policy=policy: policy.accumulate_gradients(train_batch(rows)))
        cases.append(Case(f"update, {cut}, {family}", found / GROUPS, 1.0))
    return cases


def _images_run(policy: MegatronPolicy, work: Callable[[], object]) -> float:
    """Counts the images whose features the tower makes."""
    features = 0

    def add(tower: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal features
        features += len(output.merged_Mh)

    tower = policy.trainable.stages[0].vision
    assert tower is not None
    hook = tower.register_forward_hook(add)
    work()
    hook.remove()
    return features / IMAGE_TOKENS


# --- Two ranks --------------------------------------------------------------------------------------------------------


def _shares_of_two_ranks() -> list[Case]:
    with tempfile.TemporaryDirectory(prefix="vppo-waste-") as folder:
        mp.spawn(_rank, args=(2, folder), nprocs=2)
        return [Case(**case) for case in json.loads((Path(folder) / "cases.json").read_text(encoding="utf-8"))]


def _rank(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    layout = init_layout(tensor=ranks, pipeline=1, timeout_seconds=60)
    cases = [vars(case) for family in FAMILIES for case in _shares(family, layout, units=("image",))]
    if rank == 0:
        (Path(folder) / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()
