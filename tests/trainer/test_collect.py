"""The draw of a step, group filtering, and the place in the data after it. The rule is under test: sampler and pool
follow a script, in an order that a seed shuffles.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from megatron_vppo.algorithm.types import Prompt, Response, Reward
from megatron_vppo.config.schema import RunConfig
from megatron_vppo.data.prompt_sets import PromptSets
from megatron_vppo.data.stream import PromptStream
from megatron_vppo.observability.metrics import RunLog, read_metrics
from megatron_vppo.observability.validations import ValidationRecords
from megatron_vppo.rollout.carry import CarriedGroup, Carry
from megatron_vppo.rollout.conductor import Work
from megatron_vppo.rollout.records import UNFINISHED, Ask, Completion, SamplingSettings
from megatron_vppo.rollout.seeds import continued_seed, sample_seeds
from megatron_vppo.trainer.collect import Collector, DrawnPrompts
from megatron_vppo.trainer.format_share import FormatShare
from megatron_vppo.trainer.grader import Grader
from megatron_vppo.trainer.keep_rate import KeepRate
from megatron_vppo.trainer.recorder import Recorder
from megatron_vppo.trainer.validate import Validator

ROWS = 22
"""Rows of the data set: five draws of four prompts, and two that are left over."""


class Prompts:
    """Stands for a PromptSet."""

    dataset: Any = None
    split = "train"

    def __init__(self, rows: int = ROWS) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> Prompt:
        return Prompt("train", row, "q", "a", (1, 2), (1, 2), (), ())

    def of_row(self, row: int) -> Prompt:
        return self[row]


class Sampler:
    """Samples and grades what the draw hands out, one response at a time, in a shuffled order."""

    capacity = 6

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.samplings = 0
        self.seeds: dict[int, tuple[int | None, ...]] = {}

    def sample(self, work: Any, settings: SamplingSettings) -> float:
        mine: Work = work()
        self.samplings += 1
        asked: dict[int, Ask] = {}
        mine.draw.open_to([0, 1], capacity=self.capacity)
        left: list[tuple[int, int]] = []
        while not mine.draw.is_decided:
            for numbers in mine.draw.hand_out().values():
                for number in numbers:
                    asked[number] = mine.ask(number)
                    assert asked[number] == mine.ask(number)
                    self.seeds[number] = asked[number].seeds
                    left += [(number, place) for place in range(len(self.seeds[number]))]
            if left:
                number, place = left.pop(self.random.randrange(len(left)))
                mine.draw.ended(number)
                mine.judge.sampled(number, place, self.whole(asked[number], place))
            for number, kept in mine.judge.verdicts(idle=mine.draw.is_idle):
                mine.draw.judged(number, kept=kept)
        for number, place in left if settings.keeps_unfinished else []:
            mine.judge.left(number, place, Completion((self.samplings,), (-1.0,), UNFINISHED, self.samplings))
        return 0.25

    def whole(self, ask: Ask, place: int) -> Completion:
        return Completion((5,) * (place + 1), (0.0,) * (place + 1), "stop", 0)


class Carrying(Sampler):
    """A response has three tokens, each of which is the number of the sampling in which it was sampled."""

    capacity = 2  # so that prompts wait for room, and others are begun ahead

    def whole(self, ask: Ask, place: int) -> Completion:
        tokens = 3 - (len(ask.begun[place]) if ask.begun else 0)
        return Completion((self.samplings,) * tokens, (-float(self.samplings),) * tokens, "stop", self.samplings)


class Pool:
    """Row r is right in its first sample where `mixed` says so, and wrong otherwise. Row `broken` cannot be graded."""

    grades_batches = False

    def __init__(self, mixed: set[int], *, broken: int | None = None) -> None:
        self.mixed, self.broken = mixed, broken
        self.graded: dict[int, tuple[str, Reward]] = {}
        self.tickets = 0

    def submit(self, responses: Sequence[Response]) -> list[int]:
        for one in responses:
            right = float(one.sample == 0 and one.prompt.row in self.mixed)
            failed = Reward(0.0, 0.0, {}, error="it raised") if one.prompt.row == self.broken else None
            self.graded[self.tickets] = "", failed or Reward(right, right, {})
            self.tickets += 1
        return list(range(self.tickets - len(responses), self.tickets))

    def forget(self) -> None:
        self.graded = {}

    def take(self) -> dict[int, tuple[str, Reward]]:
        graded, self.graded = self.graded, {}
        return graded


@pytest.fixture(autouse=True)
def world() -> Any:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make_config(**algorithm: Any) -> RunConfig:
    longest = algorithm.pop("max_response_length", 2048)
    rollout = {name: algorithm.pop(name) for name in ("order", "unfinished") if name in algorithm}
    reward = {name: algorithm.pop(name) for name in ("overlong_buffer_tokens", "overlong_penalty") if name in algorithm}
    return RunConfig.model_validate(
        {
            "data": {"train_files": "x", "rollout_batch_size": 4, "max_response_length": longest},
            "model": {"path": "y"},
            "actor": {"global_batch_size": 4},
            "rollout": {"n": 2, **rollout},
            "reward": reward,
            "algorithm": algorithm,
        }
    )


SILENT = FormatShare("mathruler", asks=False, has_tokens=False, say=lambda line: None)


class Run:
    """Steps of a collector, one after the other."""

    def __init__(self, folder: Path, mixed: set[int], *, timing: int = 0, rows: int = ROWS, **algorithm: Any) -> None:
        self.folder = folder
        config = make_config(**algorithm)
        carries = config.rollout.unfinished == "carry"
        self.sampler = Carrying(timing) if carries else Sampler(timing)
        self.stream = PromptStream(PromptSets([Prompts(rows)]), seed=1, shuffle=False)  # type: ignore[list-item]
        pool: Any = Pool(mixed)
        sampler: Any = self.sampler
        self.collector = Collector(
            config, self.stream, KeepRate(), Carry(self.stream), sampler,
            Grader(pool, max_error_share=1.0), SamplingSettings(max_tokens=4, keeps_unfinished=carries), SILENT,
        )  # fmt: skip
        self.log = RunLog(folder)

    def step(self, step: int) -> list[int]:
        """Takes a step. Returns the rows of its groups."""
        with self.log.step(step):
            groups = self.collector.groups(step, self.log)
        self.groups = groups
        assert all([item.response.sample for item in group] == [0, 1] for group in groups)
        return [group[0].response.prompt.row for group in groups]

    def lines(self) -> list[dict[str, float]]:
        return [
            {name: value for name, value in line.items() if not name.startswith(("time", "timing_s", "perf/"))}
            for line in read_metrics(self.folder)
        ]


def test_a_step_trains_on_the_first_kept_groups_and_gives_back_the_rest(tmp_path: Path) -> None:
    run = Run(tmp_path, {1, 3, 4, 6, 7, 8, 9, 12})
    assert run.step(1) == [1, 3, 4, 6]
    assert run.stream.position.offset == 7, "7 was graded or not, and is drawn again"
    assert run.step(2) == [7, 8, 9, 12]
    assert run.stream.position.offset == 13
    first, second = run.lines()
    assert (first["rollout/sampled_groups"], first["rollout/kept_groups"], first["rollout/trained_groups"]) == (7, 4, 4)
    assert (first["rollout/attempts"], second["rollout/attempts"]) == (2, 2)
    assert first["reward/accuracy"] == 4 / 14, "over the groups that the step needed"
    assert run.collector.keep_rate.seen == (4 / 2 + 4, 7 / 2 + 6)


def test_overlong_responses_lose_reward_and_not_accuracy(tmp_path: Path) -> None:
    """The last two tokens of three are the buffer: a response of one loses nothing, and one of two half of 4."""
    run = Run(tmp_path, set(range(ROWS)), overlong_buffer_tokens=2, overlong_penalty=4.0, max_response_length=3)
    assert run.step(1) == [0, 1, 2, 3]
    assert [[item.reward.overall for item in group] for group in run.groups] == [[1.0, -2.0]] * 4
    assert [[item.reward.accuracy for item in group] for group in run.groups] == [[1.0, 0.0]] * 4
    (line,) = run.lines()
    assert line["reward/overlong"] == -1.0 and line["critic/score/min"] == -2.0 and line["reward/accuracy"] == 0.5


def test_a_reward_that_failed_stays_zero(tmp_path: Path) -> None:
    run = Run(tmp_path, {0, 1, 2, 3}, overlong_buffer_tokens=2, max_response_length=3, online_filtering=False)
    pool: Any = Pool({0}, broken=1)
    run.collector = replace(run.collector, grader=Grader(pool, max_error_share=1.0))
    run.step(1)
    assert [item.reward.overall for item in run.groups[1]] == [0.0, 0.0]
    assert [item.reward.overall for item in run.groups[0]] == [1.0, -0.5]


@pytest.mark.parametrize("filtering", [True, False])
def test_no_delay_changes_what_is_trained_on_or_logged(filtering: bool, tmp_path: Path) -> None:
    mixed = set(random.Random(5).sample(range(ROWS), 12))
    runs = [
        Run(tmp_path / str(timing), mixed, timing=timing, online_filtering=filtering, max_try_make_batch=3)
        for timing in range(8)
    ]
    found = [[run.step(step) for step in range(1, 7)] for run in runs]
    assert all(rows == found[0] for rows in found)
    assert all(run.lines() == runs[0].lines() for run in runs)
    assert all(run.stream.position == runs[0].stream.position for run in runs)
    assert len({tuple(run.sampler.seeds) for run in runs}) > 1 or not filtering, "they were sampled in another order"
    if not filtering:
        assert found[0][0] == [0, 1, 2, 3] and all(len(run.sampler.seeds) == 4 for run in runs), "as many as are wanted"


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    mixed = set(range(0, ROWS, 3))
    straight, resumed = (Run(tmp_path / name, mixed) for name in ("straight", "resumed"))
    straight.step(1)
    place = straight.collector.place()
    expected = [straight.step(2), straight.step(3)]
    after = straight.collector.place()
    resumed.collector.go_back_to(place)
    assert [resumed.step(2), resumed.step(3)] == expected
    assert resumed.collector.place() == after
    straight.collector.go_back_to(place)  # a step that was cut off
    assert straight.collector.place() == place


def test_seeds_are_those_of_the_prompt_and_of_the_round_it_would_be_in(tmp_path: Path) -> None:
    run = Run(tmp_path, {0, 5, 9, 10})
    run.step(7)
    for number, seeds in run.sampler.seeds.items():
        assert seeds == sample_seeds(
            "independent", n=2, run_seed=1, step=7, attempt=number // 4, split="train", row=number
        )
    assert set(run.sampler.seeds) >= set(range(11))


def test_an_epoch_ends_within_a_draw(tmp_path: Path) -> None:
    """20 of 22 rows are whole fours; the two left over are dropped, and row 17 comes again with other seeds."""
    run = Run(tmp_path, {1, 17}, max_try_make_batch=6)
    run.stream.next(16)
    assert run.step(1) == [17, 1, 17], "of 24 prompts"
    assert run.sampler.seeds[1] != run.sampler.seeds[21]
    assert (run.stream.position.epoch, run.stream.position.offset) == (1, 20)
    run = Run(tmp_path / "again", {1, 17, 18, 19}, max_try_make_batch=6)
    run.stream.next(16)
    assert run.step(1) == [17, 18, 19, 1]
    assert (run.stream.position.epoch, run.stream.position.offset) == (1, 2)


def test_sampling_stops_at_the_bound_and_says_what_to_do(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(tmp_path, {2}, max_try_make_batch=3)
    assert run.step(1) == [2]
    assert run.lines()[0]["rollout/sampled_groups"] == 12 == run.stream.position.offset
    assert "1 of 4 wanted groups" in caplog.text and "algorithm.max_try_make_batch" in caplog.text


def test_a_step_may_keep_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, set(), max_try_make_batch=2)
    assert run.step(1) == []
    (metrics,) = run.lines()
    assert metrics["rollout/kept_groups"] == metrics["critic/score/mean"] == 0
    assert run.step(2) == [], "a keep rate of zero draws as many as there may be"


def test_the_first_to_be_graded_count_where_that_is_asked_for(tmp_path: Path) -> None:
    mixed = {1, 3, 4, 6, 7, 8, 9, 12}
    runs = [Run(tmp_path / str(timing), mixed, timing=timing, order="arrival") for timing in range(8)]
    found = [run.step(1) for run in runs]
    assert all(rows == sorted(rows) and len(rows) == 4 and mixed.issuperset(rows) for rows in found)
    assert len({tuple(rows) for rows in found}) > 1
    for run in runs:
        assert run.stream.position.offset == len(run.sampler.seeds), "just behind all that engines were given"


def test_without_filtering_every_group_is_kept(tmp_path: Path) -> None:
    run = Run(tmp_path, {0}, online_filtering=False)
    assert run.step(1) == [0, 1, 2, 3]
    (metrics,) = read_metrics(tmp_path)
    # One of eight responses is right; lengths are 1 and 2.
    assert metrics["critic/score/mean"] == pytest.approx(1 / 8)
    assert metrics["response_length/mean"] == pytest.approx(1.5)
    assert metrics["prompt_length/max"] == 2
    assert (metrics["rollout/attempts"], metrics["perf/dropped_groups"]) == (1, 0)
    assert metrics["timing_s/reward"] >= 0.25, "what only grading was left for is not sampling"
    assert -0.25 < metrics["timing_s/gen"] < 0, "the stand-in took no time for what it says"


def test_validation_is_a_mean_over_samples_and_counts_what_could_not_be_graded() -> None:
    config = RunConfig.model_validate(
        {"data": {"train_files": "x"}, "model": {"path": "y"}, "rollout": {"val": {"n": 4}}}
    )
    pool: Any = Pool({0, 1, 2}, broken=1)
    sampler: Any = Sampler(3)
    prompts = [Prompts()[row] for row in range(4)]
    grader = Grader(pool, max_error_share=1.0)
    written: list[tuple[int, ValidationRecords]] = []
    writer: Any = SimpleNamespace(write=lambda step, records: written.append((step, records)), wait=lambda: None)
    recorder = Recorder(tokenizer=None, images=None, perturb_per="row", writer=writer)  # type: ignore[arg-type]
    metrics = Validator(config, prompts, sampler, grader, SamplingSettings(max_tokens=4), recorder, SILENT).run(6)
    recorder.wait()
    assert metrics["val/accuracy"] == 2 / 16  # rows 0 and 2, one sample in four
    assert metrics["val/errors"] == 4.0
    assert metrics["val/response_length"] == (1 + 2 + 3 + 4) / 4
    ((step, records),) = written
    assert step == 6
    found = [(line["row"], line["sample"]) for line in records.responses]
    assert found == [(row, sample) for row in range(4) for sample in range(4)]
    assert [line["row"] for line in records.responses if line["accuracy"] == 1.0] == [0, 2]
    assert [line["row"] for line in records.responses if line["reward_error"] is not None] == [1] * 4
    assert {line["sample"]: line["response_length"] for line in records.responses} == {0: 1, 1: 2, 2: 3, 3: 4}


class TwoFiles(Prompts):
    """Stands for the PromptSet of one of two files."""

    def __init__(self, name: str, rows: int) -> None:
        super().__init__(rows)
        self.split = name

    def __getitem__(self, row: int) -> Prompt:
        return Prompt(self.split, row, "q", "a", (1, 2), (1, 2), (), ())


def test_the_share_and_the_rewards_of_each_file_are_logged(tmp_path: Path) -> None:
    """Files alternate one to three, so that of ten prompts the shares are known; row 0 of either is never right."""
    run = Run(tmp_path, {1, 2, 3, 4, 5, 6, 7})
    files = [
        {"path": "geo.parquet", "weight": 1},
        {"path": "k12.parquet", "weight": 3},
        {"path": "none", "weight": 1e-9},
    ]
    data = {"train_files": files, "rollout_batch_size": 4}
    config = RunConfig.model_validate({**run.collector.config.model_dump(exclude_unset=True), "data": data})
    sets: Any = [TwoFiles("train/geo", 8), TwoFiles("train/k12", 24), TwoFiles("train/none", 8)]
    stream = PromptStream(PromptSets(sets), seed=1, shuffle=False, weights=(1.0, 3.0, 1e-9))
    run.collector = replace(run.collector, config=config, stream=stream)
    run.step(1)
    trained = [(group[0].response.prompt.split, group[0].response.prompt.row) for group in run.groups]
    # The order is k12 0, (geo 0 and k12 1 are due together), k12 2, k12 3, geo 1: of these geo 0 and k12 0 are wrong.
    assert trained == [("train/k12", 1), ("train/k12", 2), ("train/k12", 3), ("train/geo", 1)]
    (line,) = run.lines()
    assert (line["data/geo/trained_share"], line["data/k12/trained_share"]) == (0.25, 0.75)
    assert (line["data/geo/accuracy"], line["data/k12/reward"]) == (1 / 4, 3 / 8), "2 and 4 groups of two, all sampled"
    assert line["data/none/trained_share"] == 0 and "data/none/reward" not in line


def test_validation_has_an_accuracy_for_each_file_and_each_part_of_the_reward() -> None:
    data = {"train_files": "x", "val_files": ["geo.parquet", "k12.parquet"]}
    config = RunConfig.model_validate({"data": data, "model": {"path": "y"}, "rollout": {"val": {"n": 2}}})
    pool: Any = Pool({0, 1, 2})
    pool.submit_plain = pool.submit
    pool.submit = lambda responses: _with_format(pool, responses)
    sampler: Any = Sampler(3)
    prompts = [TwoFiles("val/geo", 9)[0], TwoFiles("val/k12", 9)[1], TwoFiles("val/k12", 9)[5]]
    recorder: Any = SimpleNamespace(write_validation=lambda step, items: None)
    grader, sampling, said = Grader(pool, max_error_share=1.0), SamplingSettings(max_tokens=4), list[str]()
    share = FormatShare("mathruler", asks=False, has_tokens=False, say=said.append)
    validator = Validator(config, prompts, sampler, grader, sampling, recorder, share)
    metrics = validator.run(0)
    assert (metrics["val/geo/accuracy"], metrics["val/k12/accuracy"]) == (1 / 2, 1 / 4)
    assert (metrics["val/accuracy"], metrics["val/reward/format"]) == (2 / 6, 0.5)
    assert said == ["format: 50.0% of 6 responses of the validation before training keep it"]


def _with_format(pool: Any, responses: Sequence[Response]) -> list[int]:
    tickets: list[int] = pool.submit_plain(responses)
    for ticket, one in zip(tickets, responses, strict=True):
        text, reward = pool.graded[ticket]
        pool.graded[ticket] = text, replace(reward, metrics={"format": float(one.sample)})
    return tickets


CARRY = {"unfinished": "carry", "rollout_correction_cap": 2.0}
MIXED = {row for row in range(120) if row % 3}


@pytest.mark.parametrize("order", ["draw", "arrival"])
@pytest.mark.parametrize("timing", range(6))
def test_what_a_step_leaves_the_next_one_goes_on_with(order: str, timing: int, tmp_path: Path) -> None:
    """Every prompt that an engine was given trains, is of no use, or is carried on: none is lost or comes twice."""
    run = Run(tmp_path, MIXED, timing=timing, rows=120, order=order, max_try_make_batch=3, **CARRY)
    seen: list[int] = []
    carried: list[int] = []
    older = 0
    for step in range(1, 8):
        before = {group.prompt.row: group for group in run.collector.carry.groups}
        run.step(step)
        for group in run.groups:
            row = group[0].response.prompt.row
            for one in (item.response for item in group):
                begun = before[row].responses.get(one.sample) if row in before else None
                tokens = [] if begun is None else list(begun.token_ids)
                assert list(one.token_ids) == tokens + [step] * (3 - len(tokens))
                assert one.carried_tokens == len(tokens)
                assert list(one.rollout_logps)[len(tokens) :] == [-float(step)] * (3 - len(tokens))
                older += len(tokens)
        carried = [group.prompt.row for group in run.collector.carry.groups]
        seen.append(int(run.lines()[-1]["rollout/sampled_groups"]))
        assert run.stream.position.offset == sum(seen) + len(carried), (
            "from the stream came what was needed or is carried"
        )
        assert run.lines()[-1]["rollout/carried_groups"] == len(carried) and len(set(carried)) == len(carried)
        share = sum(item.response.carried_tokens for group in run.groups for item in group) / 24
        assert run.lines()[-1]["rollout/carried_share"] == pytest.approx(share)
    assert older > 0, "some tokens that trained were sampled in an earlier step"


def test_a_carried_response_goes_on_with_another_seed_and_an_ended_one_is_not_asked_again(tmp_path: Path) -> None:
    run = Run(tmp_path, MIXED, timing=1, rows=120, order="arrival", **CARRY)
    run.step(1)
    groups = run.collector.carry.groups
    (torn,) = [group for group in groups if len(group.ended) == 1][:1]
    ask = torn.ask()
    (missing,) = torn.missing
    assert len(ask.seeds) == 1 and ask.begun == (torn.begun(missing),) and len(ask.begun[0]) == 1
    first = sample_seeds("independent", n=2, run_seed=1, step=1, attempt=torn.prompt.row // 4, split="train",
                         row=torn.prompt.row)  # fmt: skip
    assert torn.seeds == first and ask.seeds == (continued_seed(first[missing], tokens=1),) != first[missing]


def test_a_checkpoint_keeps_what_is_carried(tmp_path: Path) -> None:
    straight, resumed = (
        Run(tmp_path / name, MIXED, rows=120, order="arrival", max_try_make_batch=3, **CARRY)
        for name in ("straight", "resumed")
    )
    straight.step(1)
    place = json.loads(json.dumps(straight.collector.place()))  # as the file of a checkpoint has it
    assert straight.collector.carry.groups
    resumed.collector.go_back_to(place)
    for run in (straight, resumed):
        run.sampler.random, run.sampler.samplings = random.Random(7), 1
    assert resumed.step(2) == straight.step(2)
    assert [[item.response for item in group] for group in resumed.groups] == [
        [item.response for item in group] for group in straight.groups
    ]
    assert resumed.collector.place() == straight.collector.place()


@pytest.mark.parametrize("changed", ["n", "max_response_length", "unfinished"])
def test_groups_that_do_not_fit_other_settings_are_left_behind(
    changed: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path, MIXED, timing=1, rows=120, order="arrival", **CARRY)
    run.step(1)
    assert run.collector._carried()
    config = run.collector.config.model_dump()
    changes = {"n": ("rollout", 3), "max_response_length": ("data", 1), "unfinished": ("rollout", "drop")}
    section, value = changes[changed]
    config[section][changed] = value
    other = replace(run.collector, config=RunConfig.model_validate(config))
    assert len(other._carried()) < len(run.collector._carried())
    assert all(not any(map(group.begun, group.missing)) for group in other._carried())
    assert "are left behind" in caplog.text


@pytest.mark.parametrize(
    ("options", "batches", "size"),
    [(CARRY, False, 11), (CARRY, True, 7), ({}, False, 7)],  # 2 x 4 / (2 / 3) - 1, or 1.1 x 4 / (2 / 3)
)
def test_prompts_of_the_next_step_are_begun_where_that_is_of_use(
    options: dict[str, Any], batches: bool, size: int, tmp_path: Path
) -> None:
    """A batch function grades when engines have ended, so it would wait for them."""
    run = Run(tmp_path, MIXED, rows=120, max_try_make_batch=6, **options)
    run.collector.keep_rate.seen = (2, 3)
    pool: Any = Pool(MIXED)
    pool.grades_batches = batches
    run.collector = replace(run.collector, grader=Grader(pool, max_error_share=1.0))
    draw = run.collector._begin(1, DrawnPrompts(run.stream, 4)).work.draw
    draw.open_to([0], capacity=2)
    assert draw.size == size


def test_attempts_are_the_blocks_of_the_stream_behind_what_is_carried(tmp_path: Path) -> None:
    """Within a block all rows differ, so no two prompts of a step have the same seeds, also where an epoch ends."""
    run = Run(tmp_path, set(range(16)), rows=16, order="arrival", max_try_make_batch=6, **CARRY)
    prompts = [Prompts()[row] for row in (3, 4)]
    run.collector.carry.groups = tuple(CarriedGroup(prompt, (1, 2), {}) for prompt in prompts)
    drawn = DrawnPrompts(run.stream, 4, run.collector._carried())
    sampling = run.collector._begin(1, drawn)
    for number in range(2, 34):
        row = (number - 2) % 16
        assert drawn.prompt(number).row == row
        assert sampling.seeds(number) == sample_seeds(
            "independent", n=2, run_seed=1, step=1, attempt=(number - 2) // 4, split="train", row=row
        )
