"""Bar 13 of waste.py: the work of rank 0's main thread between a weight sync and the next sampling.

That is to hand over the records of the step, and to hand out prompts until its own engine has its first requests; the
other engines have theirs by then. Recorder, draw and sampler are real, and so are the images: JPEGs of a megapixel.
Engines are not.
"""

from __future__ import annotations

import io
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from digits.checkpoint import make_processor
from PIL import Image

from bench.scaling_step import GROUP, Step, make_step, tokenizer
from bench.waste_bars import Bar, Case
from megatron_vppo.algorithm.assemble import assemble
from megatron_vppo.algorithm.types import GradedResponse, ImageRef, Prompt
from megatron_vppo.config.schema import RunConfig
from megatron_vppo.data.images import VisionInputs
from megatron_vppo.models.model_files import ModelFiles
from megatron_vppo.observability.record_writer import RecordWriter
from megatron_vppo.rollout.conductor import Work
from megatron_vppo.rollout.draw import Draw
from megatron_vppo.rollout.records import Ask, SampleRequest, SamplingSettings
from megatron_vppo.rollout.sampler import EngineSampler
from megatron_vppo.rollout.sharing import SampledGroups
from megatron_vppo.setup.inputs import open_inputs
from megatron_vppo.setup.settings import vppo_settings
from megatron_vppo.system.stop_signals import StopRequested
from megatron_vppo.trainer.recorder import Recorder

ROWS, TOKENS, ENGINES, KEPT = 3072, 450, 8, 0.55
SIZE = (1120, 896)
"""Width and height of every image; 1,280 image tokens."""
SECONDS = 0.5
CALLS_OF_ROW, CALLS_OF_TOKENS = 40, 1.01
"""The most calls of functions for each response of a step of 64, and none for its tokens but chance in how often a
thread is looked at."""
SLOW_PACKAGES = ("json", "zstandard", "tokenizers", "transformers", "PIL")
"""Packages of which the main thread calls nothing: they make JSON and texts, and decode images."""


def between() -> list[Bar]:
    """Counts bar 13."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="vppo-waste-") as folder, alone(Path(folder)):
        few, many = (counted(Path(folder) / f"{tokens}", rows=64, tokens=tokens) for tokens in (4, 64))
        seconds = timed(Path(folder) / "timed")
    cases = (
        Case(f"seconds of the thread, {ROWS} responses of {TOKENS} tokens", seconds, SECONDS),
        Case("calls for each response", many.total / 64, CALLS_OF_ROW),
        Case("calls with 64 tokens a response over those with 4", many.total / few.total, CALLS_OF_TOKENS),
        Case("calls that make JSON or texts, or decode images", many.slow, 0),
    )
    return [Bar(13, "Rank 0's main thread between the weight sync and the next sampling", cases)]


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Makes this process a process group of one rank."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def timed(folder: Path) -> float:
    """Returns the CPU seconds of the main thread, at real sizes."""
    found: list[float] = []

    def measure(work: Callable[[], None]) -> None:
        began = time.thread_time()
        work()
        found.append(time.thread_time() - began)

    _between_steps(folder, ROWS, TOKENS, measure)
    return found[0]


@dataclass(frozen=True)
class Calls:
    """The calls of functions that the main thread makes, Python's and others."""

    total: int
    slow: int
    """Those into SLOW_PACKAGES."""


def counted(folder: Path, *, rows: int, tokens: int) -> Calls:
    """Counts the calls of the main thread."""
    calls: Counter[str] = Counter()

    def note(frame: FrameType, event: str, what: Any) -> None:
        if event == "call":
            calls[str(frame.f_globals.get("__name__"))] += 1
        elif event == "c_call":
            calls[str(getattr(what, "__module__", None))] += 1

    def measure(work: Callable[[], None]) -> None:
        sys.setprofile(note)
        try:
            work()
        finally:
            sys.setprofile(None)

    _between_steps(folder, rows, tokens, measure)
    slow = sum(count for name, count in calls.items() if name.startswith(SLOW_PACKAGES))
    return Calls(calls.total(), slow)


def _between_steps(folder: Path, rows: int, tokens: int, measure: Callable[[Callable[[], None]], None]) -> None:
    folder.mkdir()
    drawn = round(rows / GROUP / KEPT * 1.1)
    images = open_images(folder, drawn)
    step = make_step(rows, tokens)
    graded = [_with_image(item) for item in step.graded]
    config = RunConfig.model_validate({"data": {"train_files": "x"}, "model": {"path": "y"}})
    minibatches = assemble(
        graded, step.scores, settings=vppo_settings(config), responses_per_minibatch=max(GROUP, rows // 3)
    )
    groups = Step([item.response for item in graded], graded, step.scores).groups
    recorder = Recorder(tokenizer(), images, config.algorithm.perturb.per, RecordWriter(folder))
    engine = FakeEngine(drawn // ENGINES)
    sampler = EngineSampler(
        engine,  # type: ignore[arg-type]
        engine_index=0,
        num_engines=ENGINES,
        images=images,
        verify="never",
        store=dist.HashStore(),
        max_num_seqs=drawn // ENGINES * GROUP,
    )
    prompts = [_prompt(row) for row in range(drawn)]

    def work() -> None:
        recorder.write(1, minibatches, groups, step.scores)
        try:
            sampler.sample(lambda: _work(prompts, rows // GROUP), SamplingSettings(max_tokens=tokens))
        except StopRequested:
            return

    measure(work)
    assert engine.asked == drawn // ENGINES, "the engine has what it can hold"
    recorder.close()


class FakeEngine:
    """Ends the run once it has been asked."""

    asked = 0

    def __init__(self, images: int) -> None:
        self._images = images

    def begin_sampling(self, settings: SamplingSettings) -> None: ...

    def ask(self, requests: Mapping[int, SampleRequest]) -> None:
        assert sum(len(request.images) for request in requests.values()) == self._images
        self.asked = len(requests)
        raise StopRequested


def _work(prompts: list[Prompt], wanted: int) -> Work:
    groups = SampledGroups(prompts.__getitem__, size=GROUP)
    draw = Draw(wanted=wanted, most=len(prompts), responses=GROUP, order="draw", seen=(KEPT * 1000, 1000))
    return Work(draw, lambda number: Ask(prompts[number], tuple(range(GROUP))), groups)


def _prompt(row: int) -> Prompt:
    ids, grid = (7,) * 120, (1, SIZE[1] // 14, SIZE[0] // 14)
    return Prompt("train", row, "What is it? " * 10, "42", ids, ids, (ImageRef("train", row, 0),), (grid,))


def _with_image(item: GradedResponse) -> GradedResponse:
    return replace(item, response=replace(item.response, prompt=_prompt(item.response.prompt.row)))


def open_images(folder: Path, rows: int) -> VisionInputs:
    """Writes rows with photographs, as large as JPEG makes them, and opens them as a run does."""
    noise = np.random.default_rng(0).integers(0, 256, (SIZE[1] // 8, SIZE[0] // 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(SIZE, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    cell = [{"bytes": buffer.getvalue(), "path": None}]
    columns = {"problem": ["<image>?"] * rows, "answer": ["42"] * rows, "images": [cell] * rows}
    pq.write_table(pa.table(columns), folder / "rows.parquet", row_group_size=64)
    config = RunConfig.model_validate({"data": {"train_files": str(folder / "rows.parquet")}, "model": {"path": "y"}})
    no_config: Any = None
    model = ModelFiles(hf_config=no_config, processor=make_processor(), eos_ids=(0,))
    return open_inputs(config, model).images
