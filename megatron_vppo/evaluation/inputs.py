"""The questions of a suite as prompts of a model, all checked before an engine starts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any

from megatron_vppo.algorithm.types import Prompt
from megatron_vppo.config.choices import BadRows
from megatron_vppo.data.geometry import ImageGeometry
from megatron_vppo.data.images import VisionInputs
from megatron_vppo.data.prompts import PromptBuilder, PromptSet, load_prompts, read_template
from megatron_vppo.evaluation.question import Question, dataset_of
from megatron_vppo.evaluation.settings import EvalConfig
from megatron_vppo.evaluation.suite import Benchmark, read_questions
from megatron_vppo.models.model_files import ModelFiles
from megatron_vppo.setup.inputs import background_color, processor_and_bans


@dataclass(frozen=True)
class AskedQuestion:
    """A question that can be asked."""

    question: Question
    prompt: Prompt
    digest: str
    """The hex digest of all that the question consists of. Two runs have asked the same question if it is equal."""


@dataclass(frozen=True)
class AskedBenchmark:
    """A benchmark whose questions can be asked."""

    benchmark: Benchmark
    asked: Sequence[AskedQuestion]
    left_out: int
    """Rows and questions that cannot be used, under data.on_bad_row=skip."""

    @property
    def name(self) -> str:
        return self.benchmark.name

    @property
    def questions(self) -> list[Question]:
        return [one.question for one in self.asked]

    @property
    def digests(self) -> dict[str, str]:
        """The digest of each question, by its id."""
        return {one.question.id: one.digest for one in self.asked}


@dataclass(frozen=True)
class EvalInputs:
    """Everything that engines are asked."""

    benchmarks: Sequence[AskedBenchmark]
    images: VisionInputs
    """By the names of the benchmarks."""
    processor: Any
    """The model's processor, of transformers."""
    banned_ids: tuple[int, ...]
    """The tokens that are never sampled."""


def open_benchmarks(config: EvalConfig, files: ModelFiles) -> EvalInputs:
    """Reads all benchmarks and makes prompts of their questions.

    Raises ValueError: copies that are missing, of all benchmarks at once; a question that cannot be used; prompts that
    are too long, with their number and what to set.
    """
    data = config.data
    processor, banned_ids = processor_and_bans(data, files)
    geometry = ImageGeometry.from_processor(
        processor.image_processor, min_pixels=data.min_pixels, max_pixels=data.max_pixels, mode="smart"
    )
    template = None if data.format_prompt is None else read_template(data.format_prompt)
    builder = PromptBuilder(processor, geometry, template=template, system_prompt=data.system_prompt)
    background = background_color(data)
    read = _read_all(config.benchmarks, data.on_bad_row)
    datasets = {name: dataset_of(questions) for name, (questions, _) in read.items()}
    return EvalInputs(
        benchmarks=[
            _asked(config, benchmark, *read[benchmark.name], datasets[benchmark.name], builder)
            for benchmark in config.benchmarks
        ],
        images=VisionInputs(datasets, processor.image_processor, geometry=geometry, background=background),
        processor=processor,
        banned_ids=banned_ids,
    )


def _read_all(benchmarks: Sequence[Benchmark], on_bad_row: BadRows) -> dict[str, tuple[list[Question], int]]:
    """Reads the questions of all benchmarks, by name, with the number of bad rows of each."""
    found, problems = dict[str, tuple[list[Question], int]](), list[str]()
    for benchmark in benchmarks:
        try:
            found[benchmark.name] = read_questions(benchmark, on_bad_row=on_bad_row)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        heading = f"{len(problems)} of {len(benchmarks)} benchmarks cannot be read"
        raise ValueError("\n  - ".join([heading, *problems]) if len(problems) > 1 else problems[0])
    return found


def _asked(
    config: EvalConfig,
    benchmark: Benchmark,
    questions: Sequence[Question],
    bad_rows: int,
    dataset: Any,
    builder: PromptBuilder,
) -> AskedBenchmark:
    data = config.data
    prompts = load_prompts(
        dataset,
        builder,
        split=benchmark.name,
        max_prompt_length=data.max_prompt_length,
        max_images=config.rollout.max_images_per_prompt,
        on_bad_row=data.on_bad_row,
        num_workers=data.num_workers,
    )
    _refuse_long_prompts(config, benchmark, dataset, builder, prompts)
    asked = [
        AskedQuestion(questions[row], prompt, question_digest(questions[row]))
        for row, prompt in zip(prompts.rows, prompts, strict=True)
    ]
    return AskedBenchmark(benchmark, asked, left_out=bad_rows + len(prompts.report.bad_rows))


def _refuse_long_prompts(
    config: EvalConfig, benchmark: Benchmark, dataset: Any, builder: PromptBuilder, prompts: PromptSet
) -> None:
    """Refuses to leave questions out because of their length: the rest would be another benchmark."""
    rows, limit = prompts.report.too_long, config.data.max_prompt_length
    if not rows:
        return
    longest = 0
    for row in rows:
        number = len(dataset.image_cells(row))
        grids = [builder.geometry.grid(*dataset.image_size(row, index)) for index in range(number)]
        ids = builder.compact_ids(dataset.problem(row), num_images=number)
        longest = max(longest, builder.num_tokens(ids, tuple(grids)))
    raise ValueError(
        f"{benchmark.name}: {len(rows)} of {prompts.report.rows} prompts have more than data.max_prompt_length {limit} "
        f"tokens, the longest {longest}; set data.max_prompt_length={longest}, or lower data.max_pixels "
        f"({config.data.max_pixels})"
    )


def question_digest(question: Question) -> str:
    """Computes the digest of all that a question is asked and graded with. Raises BadRow for an unreadable image."""
    texts = [question.problem, question.answer, question.options, asdict(question.rule)]
    digest = blake2b(json.dumps(texts).encode(), digest_size=8)
    for image in question.images:
        digest.update(blake2b(image.read()).digest())
    return digest.hexdigest()
