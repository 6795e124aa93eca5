"""The record of a step: every trained response in order, images of some right and wrong ones, one writer."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from megatron_vppo.algorithm.assemble import assemble
from megatron_vppo.algorithm.types import PerturbKey
from megatron_vppo.observability.rollouts import read_rollouts, rollout_path, write_rollouts
from megatron_vppo.observability.step_records import StepRecords
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


@dataclass(frozen=True)
class AtOnce:
    """Writes in this process."""

    folder: Path

    def write(self, step: int, records: StepRecords) -> None:
        write_rollouts(self.folder, step, records.records())

    def wait(self) -> None:
        """Has nothing to wait for."""


def recorder(writer: Any, *, keys: list[PerturbKey] | None = None) -> Recorder:
    def perturbed_image(ref: Any, key: PerturbKey) -> Image.Image:
        if keys is not None:
            keys.append(key)
        return Image.new("RGB", (2, 2))

    images: Any = SimpleNamespace(
        image=lambda ref: Image.new("RGB", (2, 2), (7, 7, 7)), perturbed_image=perturbed_image
    )
    tokenizer = SimpleNamespace(batch_decode=lambda rows: [f"<{token}>" for (token,) in rows])
    return Recorder(tokenizer, images, perturb_per="row", writer=writer)


def written(recorder: Recorder, number: int, *step: Any) -> None:
    recorder.write(number, *step)
    recorder.wait()


def test_every_trained_response_is_recorded_in_order(tmp_path: Path, step: tuple[Any, ...]) -> None:
    written(recorder(AtOnce(tmp_path)), 7, *step)
    records = list(read_rollouts(rollout_path(tmp_path, 7)))
    assert [(record["row"], record["sample"]) for record in records] == [(g, s) for g in range(GROUPS) for s in (0, 1)]
    assert records[5]["old_logps"] == [-1.5, -1.6, -1.7]
    assert records[5]["masked_logps"] == [-2.5, -2.6, -2.7]
    assert records[0]["tokens"] == ["<0>", "<1>", "<2>"]
    assert records[0]["advantage"] > 0 > records[1]["advantage"]


def test_a_row_has_the_decisions_of_its_own_mini_batch(tmp_path: Path) -> None:
    """Rows of different lengths, narrower than the scores, in mini-batches of four; expected row by row."""
    lengths = [3, 1, 4, 2, 2, 4, 1, 3]
    logps = [[-0.1 * (row + 1) - 1e-7 * at for at in range(length)] for row, length in enumerate(lengths)]
    responses = [
        response(length, group=row // 2, sample=row % 2, rollout_logps=logps[row]) for row, length in enumerate(lengths)
    ]
    items = graded(responses, [1.0, 0.0] * 4)
    generator = torch.Generator().manual_seed(0)
    old_BT, perturbed_BT = (-torch.rand(8, 6, generator=generator) for _ in range(2))
    found = scores(old_BT, perturbed_BT)
    minibatches = assemble(items, found, settings=settings(), responses_per_minibatch=4)
    written(recorder(AtOnce(tmp_path)), 1, minibatches, [items[i : i + 2] for i in range(0, 8, 2)], found)
    for row, record in enumerate(read_rollouts(rollout_path(tmp_path, 1))):
        decided, local, length = minibatches[row // 4].record, row % 4, lengths[row]
        assert record["token_ids"] == list(range(length))
        assert record["rollout_logps"] == [round(x, 6) for x in logps[row]]
        for name, value_T in {
            "old_logps": old_BT[row],
            "masked_logps": perturbed_BT[row],
            "dependency": decided.dependency_BT[local],
            "kept": decided.token_mask_BT[local],
        }.items():
            assert record[name] == [round(x, 6) for x in value_T[:length].tolist()], (row, name)
        assert (record["advantage"], record["scale"]) == (
            decided.group_advantage_B[local].item(),
            decided.scale_B[local].item(),
        )


def test_what_was_not_computed_is_none(tmp_path: Path) -> None:
    items = graded([response(2, sample=sample) for sample in (0, 1)], [1.0, 0.0])
    found = scores(-torch.ones(2, 2), None)
    plain = settings(use_vppo_on_perception=False, use_advantage_shaping=False)
    minibatches = assemble(items, found, settings=plain, responses_per_minibatch=2)
    written(recorder(AtOnce(tmp_path)), 1, minibatches, [items], found)
    for record in read_rollouts(rollout_path(tmp_path, 1)):
        assert record["masked_logps"] is None and record["dependency"] is None
        assert all("masked" not in image for image in record.get("images", []))


def test_perturbed_images_that_the_update_alone_reads_are_shown(tmp_path: Path) -> None:
    items = graded([response(2, sample=sample) for sample in (0, 1)], [1.0, 0.0])
    read = tuple(PerturbKey.of(item.response, 1, per="row") for item in items)
    found = replace(scores(-torch.ones(2, 2), None), perturb_keys=read)
    papo = settings(use_vppo_on_perception=False, use_advantage_shaping=False, perception_loss_coef=0.01)
    keys: list[PerturbKey] = []
    minibatches = assemble(items, found, settings=papo, responses_per_minibatch=2)
    written(recorder(AtOnce(tmp_path), keys=keys), 1, minibatches, [items], found)
    assert set(keys) <= set(read) and keys


def test_images_stay_with_a_few_right_and_wrong_ones_of_different_groups(tmp_path: Path, step: tuple[Any, ...]) -> None:
    keys: list[PerturbKey] = []
    written(recorder(AtOnce(tmp_path), keys=keys), 7, *step)
    kept = [record for record in read_rollouts(rollout_path(tmp_path, 7)) if "images" in record]
    assert [record["accuracy"] for record in kept] == [1.0] * IMAGES_PER_OUTCOME + [0.0] * IMAGES_PER_OUTCOME
    assert [record["row"] for record in kept] == list(range(2 * IMAGES_PER_OUTCOME)), "each of another prompt"
    # The perturbed image is the one that scoring saw: the same key.
    shown = [response(LENGTH, group=record["row"], sample=record["sample"]) for record in kept]
    assert keys == [PerturbKey.of(item, 7, per="row") for item in shown]


def test_a_token_is_decoded_once_in_a_run(step: tuple[Any, ...]) -> None:
    decoded: list[int] = []

    def batch_decode(rows: list[list[int]]) -> list[str]:
        decoded.extend(token for (token,) in rows)
        return [f"<{token}>" for (token,) in rows] or [""]  # as transformers does

    ours = replace(recorder(None), tokenizer=SimpleNamespace(batch_decode=batch_decode))
    texts = [ours.step_records(number, *step).token_texts for number in (1, 2)]
    assert texts == [{0: "<0>", 1: "<1>", 2: "<2>"}] * 2 and decoded == [0, 1, 2]


def test_a_rank_without_a_writer_does_nothing(step: tuple[Any, ...]) -> None:
    silent = recorder(None)
    silent.write(7, *step)
    silent.wait()
    assert silent.known_texts == {}


def test_the_loop_waits_for_neither_images_nor_files(step: tuple[Any, ...]) -> None:
    """The writer is stopped while the loop goes on; the error of a step is raised when the next one is written."""
    go_on, threads = threading.Event(), list[int]()

    class Stopped:
        def write(self, step: int, records: StepRecords) -> None:
            threads.append(threading.get_ident())
            assert go_on.wait(5)
            raise OSError("no space")

        def wait(self) -> None:
            """Has nothing to wait for."""

    ours = recorder(Stopped())
    ours.write(1, *step)
    go_on.set()
    with pytest.raises(OSError, match="no space"):
        ours.write(2, *step)
    ours.wait()
    assert threads != [threading.get_ident()] and len(threads) == 1
