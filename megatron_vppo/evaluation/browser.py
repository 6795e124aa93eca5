"""The responses that a page can show: which questions, with which images, within how many bytes."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from megatron_vppo.data.images import VisionInputs
from megatron_vppo.evaluation.inputs import AskedBenchmark, AskedQuestion
from megatron_vppo.evaluation.responses import RecordedSample, read_records, response_path
from megatron_vppo.evaluation.results import RecordedRun
from megatron_vppo.system.visible import visible

BUDGET_BYTES = 12 << 20
"""Bytes of questions, images and responses on a page; each benchmark has an equal share."""
MOST_QUESTIONS = 200
"""Questions of one benchmark."""
MAX_TOKENS = 800
"""Tokens that are shown of one response."""
IMAGE_SIDE = 320
"""Pixels of the longer side of an image on a page, at most."""


@dataclass(frozen=True)
class Shown:
    """The part of an evaluation that is on its page."""

    questions: Sequence[Mapping[str, Any]]
    """The questions as `page.js` reads them."""
    of: Mapping[str, tuple[int, int]]
    """By benchmark: questions on the page, and all."""
    cut_responses: int
    """Responses of more than MAX_TOKENS tokens, whose end is left out."""


def pick_shown(
    benchmarks: Sequence[AskedBenchmark],
    images: VisionInputs,
    runs: Sequence[RecordedRun],
    *,
    budget_bytes: int = BUDGET_BYTES,
) -> Shown:
    """Picks questions of each benchmark in turn from those right in every sample, in some and in none.

    Where runs disagree most, questions come first.

    Args:
        runs: this evaluation, and then those that it is compared with.
    """
    questions: list[Mapping[str, Any]] = []
    counts: dict[str, tuple[int, int]] = {}
    cut = 0
    for number, benchmark in enumerate(benchmarks):
        candidates = _in_turn(benchmark, runs)[:MOST_QUESTIONS]
        records = [_records(run, benchmark.name, candidates) for run in runs]
        left, shown = budget_bytes // len(benchmarks), 0
        for asked in candidates:
            entry = _entry(number, asked, images, [of_run.get(asked.question.id, {}) for of_run in records])
            left -= len(json.dumps(entry))
            if left < 0 and shown:
                break
            questions.append(entry)
            shown += 1
            cut += sum(response["of"] > MAX_TOKENS for of_run in entry["runs"] for response in of_run)
        counts[benchmark.name] = (shown, len(benchmark.asked))
    return Shown(questions, counts, cut)


def _in_turn(benchmark: AskedBenchmark, runs: Sequence[RecordedRun]) -> list[AskedQuestion]:
    """Sorts the recorded questions: right in every sample, in some, in none, and again."""
    kinds: dict[str, list[tuple[float, int, AskedQuestion]]] = {"some": [], "none": [], "every": []}
    for place, asked in enumerate(benchmark.asked):
        samples = [run.samples[benchmark.name].get(asked.question.id, ()) for run in runs]
        if not samples[0]:
            continue
        means = [mean_accuracy(of_run) for of_run in samples if of_run]
        kind = "every" if means[0] == 1 else "none" if means[0] == 0 else "some"
        kinds[kind].append((-max(abs(means[0] - mean) for mean in means), place, asked))
    ordered = [[asked for _, _, asked in sorted(entries, key=lambda e: e[:2])] for entries in kinds.values()]
    return [entries[i] for i in range(max(map(len, ordered), default=0)) for entries in ordered if i < len(entries)]


def mean_accuracy(samples: Sequence[RecordedSample]) -> float:
    """Returns the mean accuracy of the samples of a question."""
    return sum(one.graded.accuracy for one in samples) / len(samples)


def _records(
    run: RecordedRun, benchmark: str, wanted: Sequence[AskedQuestion]
) -> dict[str, dict[int, Mapping[str, Any]]]:
    """Reads the records of the wanted questions, by id and sample."""
    digests = {asked.question.id: asked.digest for asked in wanted}
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for record in read_records(response_path(run.folder, benchmark)):
        if digests.get(record["question"]) == record["digest"]:
            found.setdefault(record["question"], {})[record["sample"]] = record
    return found


def _entry(
    benchmark: int, asked: AskedQuestion, images: VisionInputs, runs: Sequence[Mapping[int, Mapping[str, Any]]]
) -> dict[str, Any]:
    question = asked.question
    return {
        "benchmark": benchmark,
        "id": visible(question.id),
        "problem": visible(question.problem),
        "answer": visible(question.answer),
        "grader": question.rule.kind,
        "categories": {visible(name): visible(value) for name, value in question.categories.items()},
        "images": [_thumbnail(images.image(ref)) for ref in asked.prompt.images],
        "runs": [[_response(record) for _, record in sorted(samples.items())] for samples in runs],
    }


def _response(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "sample": record["sample"],
        "accuracy": record["accuracy"],
        "vote": None if record["vote"] is None else visible(record["vote"]),
        "error": None if record["error"] is None else visible(record["error"]),
        "truncated": record["finish_reason"] == "length",
        "tokens": [visible(token) for token in record["tokens"][:MAX_TOKENS]],
        "logps": [float(logp) for logp in record["logps"][:MAX_TOKENS]],
        "of": len(record["tokens"]),
    }


def surprises(questions: Sequence[Mapping[str, Any]]) -> Iterator[float]:
    """Yields minus the log-prob of every token on the page, in nats."""
    for question in questions:
        for of_run in question["runs"]:
            for response in of_run:
                yield from (-logp for logp in response["logps"])


def _thumbnail(image: Image.Image) -> str:
    """Returns a small copy as a data URI, in the format that takes fewer bytes."""
    small = image.copy()
    small.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    encoded = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 75})):
        buffer = io.BytesIO()
        small.save(buffer, kind, **options)
        encoded.append((len(buffer.getvalue()), kind, buffer.getvalue()))
    _, kind, data = min(encoded)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
