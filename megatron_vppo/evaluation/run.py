"""An evaluation from its settings to recorded responses: inputs, engines, grading, and what is left to do."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from megatron_vppo.data.reward_pool import RewardPool
from megatron_vppo.data.text_decoder import describe_tokenizer
from megatron_vppo.evaluation.engines import check_engines, engine_settings, eval_sampling, running
from megatron_vppo.evaluation.folder import EvalSettings, claimed, take_over
from megatron_vppo.evaluation.grading_worker import QUESTION_REWARD
from megatron_vppo.evaluation.identity import model_fingerprint, template_digest
from megatron_vppo.evaluation.inputs import AskedBenchmark, EvalInputs, open_benchmarks
from megatron_vppo.evaluation.responses import ResponseFile, ResponseRecord, read_samples, response_path
from megatron_vppo.evaluation.sampling import Missing, Sampling
from megatron_vppo.evaluation.settings import EvalConfig
from megatron_vppo.models.model_files import ModelFiles, open_model_files
from megatron_vppo.setup.model_folder import model_folder
from megatron_vppo.setup.own_host import own_place
from megatron_vppo.setup.rewards import fair_workers

Say = Callable[[str], None]
"""Shows a line to the user."""
SECONDS_BETWEEN_LINES = 30.0
_SHOWN = (
    "rollout.n", "rollout.temperature", "rollout.top_p", "rollout.top_k", "data.max_response_length",
    "data.min_pixels", "data.max_pixels", "data.format_prompt", "seed",
)  # fmt: skip


def evaluate(config: EvalConfig, model: str, out: Path, *, say: Say) -> EvalInputs:
    """Samples and grades what is not recorded in the folder `out` yet. Returns what was asked.

    Without anything to do no engine is started.

    Raises:
        ValueError: a model, a benchmark or settings that cannot be used; or `out` holds an evaluation that was made
            otherwise.
        RuntimeError: the engines were lost too often. What they had done is recorded.
    """
    folder = model_folder(model, option="--model")
    files = open_model_files(folder)
    place = own_place()
    check_engines(config, files.hf_config, on_gpu=bool(place.gpu_ids))
    template = template_digest(config.data.format_prompt)
    settings = EvalSettings(str(folder.absolute()), model_fingerprint(folder), template, config)
    inputs = open_benchmarks(config, files)
    with claimed(out):
        take_over(out, settings)
        say("\n".join(_resolved(config, inputs, settings)))
        missing = [one for benchmark in inputs.benchmarks for one in missing_samples(out, benchmark, config.rollout.n)]
        if missing:
            _sample(config, folder, files, inputs, out, missing, say)
        else:
            say("eval: every response is recorded")
    return inputs


def missing_samples(out: Path, benchmark: AskedBenchmark, n: int) -> list[Missing]:
    """Lists the questions of a benchmark of which samples are not recorded, with these.

    Raises ValueError if responses are recorded to questions that are others now, or are no more.
    """
    path = response_path(out, benchmark.name)
    recorded = read_samples(path)
    digests = benchmark.digests
    changed = {question for question, digest, _ in recorded if digests.get(question, digest) != digest}
    gone = {question for question, _, _ in recorded if question not in digests}
    for found, what in ((changed, "has changed since"), (gone, "is not in the benchmark any more")):
        if found:
            raise ValueError(
                f"{path}: responses are recorded to {len(found)} of {len(digests)} questions that are others now; "
                f"question {min(found)} {what}. Give another --out, or remove that file"
            )
    missing = [
        Missing(one, tuple(k for k in range(n) if (one.question.id, one.digest, k) not in recorded))
        for one in benchmark.asked
    ]
    return [one for one in missing if one.samples]


def _sample(
    config: EvalConfig,
    folder: Path,
    files: ModelFiles,
    inputs: EvalInputs,
    out: Path,
    missing: Sequence[Missing],
    say: Say,
) -> None:
    place, rollout, tokenizer = own_place(), config.rollout, inputs.processor.tokenizer
    settings = engine_settings(config, folder, files, inputs, place)
    say(f"eval: {len(settings)} engine{'s load' if len(settings) > 1 else ' loads'}; logs: {out / 'logs'}")
    with ExitStack() as stack:
        engines = stack.enter_context(
            running(
                settings,
                logs=out / "logs",
                start_seconds=rollout.start_timeout_seconds,
                silence_seconds=rollout.engine_timeout_seconds,
            )
        )
        pool = stack.enter_context(
            RewardPool(
                QUESTION_REWARD,
                tokenizer=describe_tokenizer(tokenizer),
                num_workers=config.reward.num_workers or fair_workers([place]),
                num_batch_workers=1,
                timeout_seconds=config.reward.timeout_seconds,
            )
        )
        records = {one.name: ResponseFile(response_path(out, one.name)) for one in inputs.benchmarks}
        for file in records.values():
            stack.callback(file.close)
        Sampling(
            engines=engines,
            settings=eval_sampling(config, files.eos_ids),
            images=inputs.images,
            pool=pool,
            files=records,
            tokenizer=tokenizer,
            seed=config.seed,
            responses_at_once=settings[0].max_num_seqs,
            max_engine_restarts=rollout.max_engine_restarts,
            start_timeout_seconds=rollout.start_timeout_seconds,
            recorded=SamplingProgress(missing, say).recorded,
        ).run(missing)


def _resolved(config: EvalConfig, inputs: EvalInputs, settings: EvalSettings) -> Iterator[str]:
    values = config.model_dump(mode="json")
    shown = []
    for name in _SHOWN:
        section, _, key = name.rpartition(".")
        shown.append(f"{name}={(values[section] if section else values)[key]}")
    preset = "no preset" if config.preset is None else f"preset {config.preset}"
    yield f"eval: {settings.model} ({settings.fingerprint})"
    yield f"eval: {preset}: {' '.join(shown)}"
    for benchmark in inputs.benchmarks:
        rules = Counter(question.rule.kind for question in benchmark.questions)
        left_out = f", {benchmark.left_out} bad ones left out" if benchmark.left_out else ""
        yield f"eval: {benchmark.name}: {len(benchmark.asked):,} questions, graded by {' and '.join(rules)}{left_out}"


class SamplingProgress:
    """Says now and then how far an evaluation is."""

    def __init__(self, missing: Sequence[Missing], say: Say) -> None:
        self._say = say
        self._total = sum(len(one.samples) for one in missing)
        self._done = self._tokens = 0
        self._right = 0.0
        self._began = self._said = time.monotonic()

    def recorded(self, record: ResponseRecord, benchmark: str) -> None:
        """Counts a response, and says a line if it is time for one, or if it was the last."""
        self._done += 1
        self._tokens += len(record["tokens"])
        self._right += record["accuracy"]
        now = time.monotonic()
        if now - self._said < SECONDS_BETWEEN_LINES and self._done < self._total:
            return
        self._said, seconds = now, now - self._began
        left = seconds * (self._total - self._done) / self._done
        self._say(
            f"eval: {self._done:,} of {self._total:,} responses, now {benchmark}, {self._right / self._done:.1%} "
            f"right, {self._tokens / max(seconds, 1e-9):,.0f} tokens/s, {left / 60:.0f} min left"
        )
