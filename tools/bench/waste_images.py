"""Bars 6 and 7 of waste.py: how often an image is decoded and processed, and who waits for it.

A rank's images of one step are as many as at the real sizes, and small; the cache is smaller by as much, so that it
holds as many of them as it would at the real sizes.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image
from transformers import Qwen2VLImageProcessor

from bench.waste_bars import Bar, Case
from bench.waste_policy import Images, make_policy, make_responses, small_config, train_batch
from megatron_vppo.algorithm.types import Prompt, Response
from megatron_vppo.config.choices import PerturbUnit
from megatron_vppo.data.dataset import VisionDataset, open_dataset
from megatron_vppo.data.geometry import ImageGeometry
from megatron_vppo.data.images import Perturbing, VisionInputs
from megatron_vppo.data.perturb import BlackPatches
from megatron_vppo.parallel.layout import Layout, single_rank
from megatron_vppo.parallel.policy import MegatronPolicy

IMAGES, MINIBATCHES = 96, 3
"""The images of a rank of four in a step of 384 prompts, and the optimizer steps."""
REAL_PIXELS, REAL_CACHE = 1_003_520, 1 << 30
FILE_SIDE, MODEL_SIDE = 60, 56
"""Pixels of an image in its file, and after the resize."""
LENGTHS = (4, 3)
"""The tokens of the responses to each image."""

GROUPS = 8
WAITED, REPEATS = 0.05, 5


def images() -> list[Bar]:
    """Counts bars 6 and 7."""
    units: tuple[PerturbUnit, ...] = ("image", "row")
    with single_rank() as layout, tempfile.TemporaryDirectory(prefix="vppo-waste-") as folder:
        _write_images(Path(folder))
        times = [case for per in units for case in _times_read(layout, Path(folder), per)]
        waited = _waited(layout)
    return [
        Bar(6, "Times that an image is read in a step of a rank, over images: the mean", tuple(times)),
        Bar(7, "Calls for images by the thread that runs micro-batches, and the share of their time", waited),
    ]


# --- Reading ----------------------------------------------------------------------------------------------------------


def _write_images(folder: Path) -> None:
    rows = []
    for number in range(IMAGES):
        Image.new("RGB", (FILE_SIDE, FILE_SIDE), (number, 0, 0)).save(folder / f"{number}.png")
        rows.append({"problem": "<image>?", "answer": "1", "images": [f"{number}.png"]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class CountedProcessor:
    """An image processor that counts the images it is given."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self.processed = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, images: list[Any], **options: Any) -> Any:
        self.processed += len(images)
        return self._processor(images=images, **options)


@contextmanager
def _decoded() -> Iterator[Counter[int]]:
    """Counts the times that each row's image is decoded."""
    times: Counter[int] = Counter()
    decode = VisionDataset.image

    def counted(dataset: VisionDataset, row: int, index: int) -> Image.Image:
        times[row] += 1
        return decode(dataset, row, index)

    with patch.object(VisionDataset, "image", counted):
        yield times


def _times_read(layout: Layout, folder: Path, per: PerturbUnit) -> list[Case]:
    """Counts a step of a rank that leads an engine: images for sampling, scoring, and an update for each mini-batch."""
    processor = CountedProcessor(Qwen2VLImageProcessor())
    source = _vision_inputs(folder, processor, per)
    before = processor.processed
    rows = _responses(source)
    with _decoded() as decoded:
        for row in rows:
            source.image(row.prompt.images[0])
        policy = make_policy(small_config("qwen2.5-vl"), layout, per=per, images=source, rows_each=len(LENGTHS))
        policy.score(rows, step=1, views="both")
        share = len(rows) // MINIBATCHES
        for start in range(0, len(rows), share):
            policy.accumulate_gradients(train_batch(rows[start : start + share]))
    processed = processor.processed - before
    return [
        Case(f"decoded, perturb.per={per}", decoded.total() / IMAGES, 1.0),
        Case(f"processed, perturb.per={per}", processed / IMAGES, 1.0),
    ]


def _vision_inputs(folder: Path, processor: Any, per: PerturbUnit) -> VisionInputs:
    dataset = open_dataset(
        str(folder / "rows.jsonl"),
        problem_key="problem",
        answer_key="answer",
        image_key="images",
        image_place="marks",
    )
    limits = {"min_pixels": 28 * 28, "max_pixels": MODEL_SIDE**2}
    return VisionInputs(
        {"train": dataset},
        processor,
        geometry=ImageGeometry.from_processor(processor, **limits, mode="smart"),
        background=(255, 255, 255),
        perturbing=Perturbing(BlackPatches(probability=0.5), per=per),
        cache_bytes=REAL_CACHE * MODEL_SIDE**2 // REAL_PIXELS,
    )


def _responses(source: VisionInputs) -> list[Response]:
    """Makes responses whose prompts show the images of the data set."""
    made = make_responses(IMAGES, lengths=LENGTHS)
    grid = source.grid(made[0].prompt.images[0])
    tokens = (small_config("qwen2.5-vl").image_token_id,) * (grid[1] * grid[2] // 4) + (7, 7)
    prompts: dict[int, Prompt] = {}
    for row in made:
        prompts.setdefault(row.group_id, dataclasses.replace(row.prompt, token_ids=tokens, grids_thw=(grid,)))
    return [dataclasses.replace(row, prompt=prompts[row.group_id]) for row in made]


# --- Waiting ----------------------------------------------------------------------------------------------------------


def _waited(layout: Layout) -> tuple[Case, ...]:
    """Scores with images that are ready at once, and with some that take half the time of a micro-batch each.

    The waits are what lies between two micro-batches more in the second case. The first micro-batch is left out.
    """
    source = Images()
    policy = make_policy(small_config("qwen2.5-vl"), layout, per="image", images=source)
    ready = [_score(policy) for _ in range(REPEATS)]
    micro_batch = min(seconds.inside for seconds in ready) / GROUPS
    source.seconds, source.threads = micro_batch / 2, []
    late = [_score(policy) for _ in range(REPEATS)]
    calls = len(source.threads) / REPEATS
    own = source.threads.count(threading.get_ident()) / len(source.threads)
    took = source.seconds * calls * (GROUPS - 1) / GROUPS
    more = min(seconds.between for seconds in late) - min(seconds.between for seconds in ready)
    return (
        Case("calls by the thread of the schedule, of all (counted)", own, 0.0),
        Case("time waited for images, of the time they take (measured)", max(0.0, more / took), WAITED),
    )


@dataclasses.dataclass
class Seconds:
    """The time of a scoring pass from the first micro-batch to the last."""

    inside: float = 0.0
    """The forward passes of all micro-batches."""
    between: float = 0.0
    """From the end of a forward pass to the beginning of the next."""


def _score(policy: MegatronPolicy) -> Seconds:
    seconds, ended, began = Seconds(), 0.0, 0.0

    def begin(stage: torch.nn.Module, inputs: Any) -> None:
        nonlocal began
        began = time.perf_counter()
        if ended:
            seconds.between += began - ended

    def end(stage: torch.nn.Module, inputs: Any, output: Any) -> None:
        nonlocal ended
        ended = time.perf_counter()
        seconds.inside += ended - began

    stage = policy.trainable.stages[0]
    hooks = stage.register_forward_pre_hook(begin), stage.register_forward_hook(end)
    policy.score(make_responses(GROUPS), step=1, views="both")
    for hook in hooks:
        hook.remove()
    return seconds
