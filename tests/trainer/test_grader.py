"""Groups are graded while others are sampled. Rewards that fail as a whole end the run; single ones do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from megatron_vppo.algorithm.types import Prompt, Response, Reward
from megatron_vppo.rollout.records import Completion
from megatron_vppo.trainer.grader import Grader, Group, GroupJudge, graded_groups, verdicts_of

SIZE = 2
PROMPTS = [Prompt("train", 10 + number, "?", "a", (1,), (1,), (), ()) for number in range(4)]


class Pool:
    """Grades what it is given when `ready` says so: the reward is the first token. The first `failures` fail."""

    def __init__(self, *, batches: bool = False, failures: int = 0) -> None:
        self.grades_batches = batches
        self.failures = failures
        self.batches: list[list[tuple[int, int]]] = []
        self.given: dict[int, Response] = {}
        self.ready: list[int] = []

    def submit(self, responses: Sequence[Response]) -> list[int]:
        self.batches.append([(one.group_id, one.sample) for one in responses])
        tickets = [1000 + len(self.given) + number for number in range(len(responses))]
        self.given.update(zip(tickets, responses, strict=True))
        return tickets

    def take(self) -> dict[int, tuple[str, Reward]]:
        ready, self.ready = self.ready, []
        return {ticket: self._verdict(ticket) for ticket in ready}

    def forget(self) -> None:
        self.forgotten = True

    def _verdict(self, ticket: int) -> tuple[str, Reward]:
        right = float(self.given[ticket].token_ids[0])
        error = "TypeError: f() missing 1 required positional argument" if ticket < 1000 + self.failures else None
        return f"text {ticket}", Reward(0.0 if error else right, 0.0 if error else right, {}, error=error)


def judge_of(pool: Pool, *, share: float = 1.0, least: int = 100) -> GroupJudge:
    made: Any = pool
    grader = Grader(made, max_error_share=share)
    return grader.judge(PROMPTS.__getitem__, size=SIZE, keeps=is_mixed, least=least)


def is_mixed(group: Group) -> bool:
    return {item.reward.accuracy for item in group} == {0.0, 1.0}


def sampled(judge: GroupJudge, number: int, sample: int, right: int) -> None:
    judge.sampled(number, sample, Completion((right, 7), (-0.5, -1.5), "stop", 3))


def test_responses_are_graded_one_by_one_while_others_come() -> None:
    pool = Pool()
    judge = judge_of(pool)
    sampled(judge, 2, 1, right=1)
    assert pool.batches == [[(2, 1)]] and judge.verdicts(idle=False) == []
    sampled(judge, 0, 0, right=0)
    sampled(judge, 2, 1, right=0)  # again, from another engine
    sampled(judge, 2, 0, right=0)
    assert pool.batches == [[(2, 1)], [(0, 0)], [(2, 0)]]
    pool.ready = [1002]
    assert judge.verdicts(idle=False) == []
    pool.ready = [1000]
    assert judge.verdicts(idle=False) == [(2, True)], "graded in another order than sampled"
    assert judge.verdicts(idle=False) == []
    sampled(judge, 0, 1, right=0)
    pool.ready = [1003, 1001]
    assert judge.verdicts(idle=True) == [(0, False)]
    group = judge.group(2)
    assert [(item.response.sample, item.reward.overall, item.text) for item in group] == [
        (0, 0.0, "text 1002"), (1, 1.0, "text 1000"),
    ]  # fmt: skip
    assert all(item.response.prompt is PROMPTS[2] and item.response.weight_version == 3 for item in group)
    assert list(group[1].response.rollout_logps) == [-0.5, -1.5]


def test_what_a_draw_left_behind_is_not_taken_for_the_next() -> None:
    pool = Pool()
    sampled(judge_of(pool), 0, 0, right=1)
    judge = judge_of(pool)
    assert pool.forgotten
    sampled(judge, 0, 1, right=0)
    sampled(judge, 0, 0, right=1)
    pool.ready = [1000, 1001, 1002]
    assert judge.verdicts(idle=True) == [(0, True)]
    assert [item.text for item in judge.group(0)] == ["text 1002", "text 1001"]


def test_a_function_of_lists_gets_all_that_was_sampled_in_order() -> None:
    pool = Pool(batches=True)
    judge = judge_of(pool)
    for number, sample in ((1, 1), (0, 0), (1, 0), (0, 1)):
        sampled(judge, number, sample, right=sample)
        assert judge.verdicts(idle=False) == [] and pool.batches == []
    assert judge.verdicts(idle=True) == []
    assert pool.batches == [[(0, 0), (0, 1), (1, 0), (1, 1)]]
    assert judge.verdicts(idle=True) == [] and len(pool.batches) == 1
    pool.ready = list(pool.given)
    assert judge.verdicts(idle=True) == [(0, True), (1, True)]


def grade(failures: int, share: float, *, least: int = 4) -> list[float]:
    pool = Pool(failures=failures)
    judge = judge_of(pool, share=share, least=least)
    for number in range(2):
        for sample in range(SIZE):
            sampled(judge, number, sample, right=1)
    pool.ready = list(pool.given)
    judge.verdicts(idle=True)
    return [item.reward.overall for number in range(2) for item in judge.group(number)]


def test_single_failures_are_zero() -> None:
    assert grade(3, 1.0) == [0, 0, 0, 1]
    assert grade(1, 0.5) == [0, 1, 1, 1]
    assert grade(0, 0.01) == [1, 1, 1, 1]
    assert grade(4, 1.0, least=5) == [0, 0, 0, 0], "not yet: more may come"


@pytest.mark.parametrize(("failures", "share"), [(4, 1.0), (2, 0.5), (1, 0.25), (4, 0.1)])
def test_a_share_of_failures_ends_the_run(failures: int, share: float) -> None:
    with pytest.raises(
        ValueError, match=rf"{failures} of 4 rewards failed, .* is {share:g}\)\. .* row 10: TypeError: f"
    ):
        grade(failures, share)


def test_the_end_of_a_run_says_how_the_function_is_called() -> None:
    """Most functions that fail for every response are called in the other way than they expect."""
    with pytest.raises(
        ValueError, match=r"reward\.reward_type=batch calls the function with a list, sequential with one"
    ):
        grade(4, 1.0)
    with pytest.raises(ValueError, match=r"positional argument$"):
        grade(2, 0.5)


def test_verdicts_come_back_to_their_responses() -> None:
    pool = Pool()
    judge = judge_of(pool)
    for number in (0, 1):
        for sample in range(SIZE):
            sampled(judge, number, sample, right=sample)
    pool.ready = list(pool.given)
    judge.verdicts(idle=True)
    groups = [judge.group(1), judge.group(0)]
    responses = [[item.response for item in group] for group in groups]
    assert graded_groups(responses, verdicts_of(groups)) == groups
