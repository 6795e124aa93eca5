"""The record of a step: every trained response in order, images of some right and wrong ones, one writer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from megatron_vppo.algorithm.assemble import assemble
from megatron_vppo.algorithm.types import PerturbKey
from megatron_vppo.observability.rollouts import read_rollouts, rollout_path
from megatron_vppo.trainer.recorder import IMAGES_PER_OUTCOME, Recorder
from tests.algorithm.rows import graded, response, scores, settings

GROUPS, SIZE, LENGTH = 12, 2, 3


@pytest.fixture
def step() -> tuple[Any, ...]:
    """(mini-batches, groups, scores) of 12 groups with a right and a wrong response each, four groups a mini-batch."""
    responses = [response(LENGTH, group=group, sample=sample) for group in range(GROUPS) for sample in range(SIZE)]
    items = graded(responses, [1.0, 0.0] * GROUPS)
    old_logp_BT = -torch.arange(GROUPS * SIZE * LENGTH).reshape(-1, LENGTH) / 10
    found = scores(old_logp_BT, old_logp_BT - 1)
    minibatches = assemble(items, found, settings=settings(), responses_per_minibatch=8)
    return minibatches, [items[i : i + SIZE] for i in range(0, len(items), SIZE)], found


def recorder(folder: Path, *, keys: list[PerturbKey], is_writer: bool = True) -> Recorder:
    def perturbed_image(ref: Any, key: PerturbKey) -> Image.Image:
        keys.append(key)
        return Image.new("RGB", (2, 2))

    images: Any = SimpleNamespace(image=lambda ref: Image.new("RGB", (2, 2)), perturbed_image=perturbed_image)
    tokenizer = SimpleNamespace(batch_decode=lambda rows: [f"<{token}>" for (token,) in rows])
    return Recorder(folder, tokenizer, images, perturb_per="row", is_writer=is_writer)


def test_every_trained_response_is_recorded_in_order(tmp_path: Path, step: tuple[Any, ...]) -> None:
    recorder(tmp_path, keys=[]).write(7, *step)
    records = list(read_rollouts(rollout_path(tmp_path, 7)))
    assert [(record["row"], record["sample"]) for record in records] == [(g, s) for g in range(GROUPS) for s in (0, 1)]
    assert records[5]["old_logps"] == pytest.approx([-1.5, -1.6, -1.7])
    assert records[5]["masked_logps"] == pytest.approx([-2.5, -2.6, -2.7])
    assert records[0]["tokens"] == ["<0>", "<1>", "<2>"]
    assert records[0]["advantage"] > 0 > records[1]["advantage"]


def test_images_stay_with_a_few_right_and_wrong_ones_of_different_groups(tmp_path: Path, step: tuple[Any, ...]) -> None:
    keys: list[PerturbKey] = []
    recorder(tmp_path, keys=keys).write(7, *step)
    kept = [record for record in read_rollouts(rollout_path(tmp_path, 7)) if "images" in record]
    assert [record["accuracy"] for record in kept] == [1.0] * IMAGES_PER_OUTCOME + [0.0] * IMAGES_PER_OUTCOME
    assert [record["row"] for record in kept] == list(range(2 * IMAGES_PER_OUTCOME)), "each of another prompt"
    # The perturbed image is the one that scoring saw: the same key.
    shown = [response(LENGTH, group=record["row"], sample=record["sample"]) for record in kept]
    assert keys == [PerturbKey.of(item, 7, per="row") for item in shown]


def test_other_ranks_write_nothing(tmp_path: Path, step: tuple[Any, ...]) -> None:
    recorder(tmp_path, keys=[], is_writer=False).write(7, *step)
    assert list(tmp_path.iterdir()) == []
