"""The grader: responses become graded responses, in workers of rank 0, while others are sampled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from types import MappingProxyType
from typing import Any

from megatron_vppo.algorithm.types import GradedResponse, Prompt, Response, Reward
from megatron_vppo.data.reward_pool import RewardPool
from megatron_vppo.rollout.carry import CarriedGroup
from megatron_vppo.rollout.sharing import SampledGroups

Group = list[GradedResponse]
Keeps = Callable[[Group], bool]
"""Returns True for a group that can be trained on."""
Change = Callable[[Response, Reward], Reward]
"""Returns the reward of a response with what does not come from the reward workers."""


class Grader:
    """The reward workers."""

    def __init__(self, pool: RewardPool | None, *, max_error_share: float) -> None:
        """
        Args:
            pool: on rank 0; None elsewhere.
            max_error_share: the share of failed rewards in one sampling that ends the run.
        """
        self._pool = pool
        self._max_error_share = max_error_share

    def judge(
        self,
        prompt: Callable[[int], Prompt],
        *,
        size: int,
        keeps: Keeps,
        least: int,
        change: Change | None = None,
        carried: Mapping[int, CarriedGroup] = MappingProxyType({}),
    ) -> GroupJudge:
        """Returns the judge of one draw; on rank 0.

        Args:
            prompt: returns that of a group, by its number.
            size: the responses of a group.
            keeps: decides whether a graded group is kept.
            least: graded responses from which on failures are counted.
            change: applied to every reward; None: rewards stay as they are.
            carried: the groups that an earlier step began, by their numbers.
        """
        assert self._pool is not None, "rewards are computed on rank 0"
        judge = GroupJudge(
            self._pool, prompt, size=size, keeps=keeps, max_error_share=self._max_error_share, least=least,
            change=change, carried=carried,
        )  # fmt: skip
        judge.take_carried()
        return judge

    @property
    def grades_batches(self) -> bool:
        """True if responses are graded together, when engines have nothing more to do; on rank 0."""
        assert self._pool is not None, "rewards are computed on rank 0"
        return self._pool.grades_batches

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()


class GroupJudge(SampledGroups):
    """The groups of one draw, graded as they come.

    A function that is called with lists may compare responses. It gets all those of the draw together, in their order,
    when engines have nothing more to do.
    """

    def __init__(
        self,
        pool: RewardPool,
        prompt: Callable[[int], Prompt],
        *,
        size: int,
        keeps: Keeps,
        max_error_share: float,
        least: int,
        change: Change | None,
        carried: Mapping[int, CarriedGroup],
    ) -> None:
        super().__init__(prompt, size=size, carried=carried)
        pool.forget()
        self._pool, self._keeps, self._change = pool, keeps, change
        self._max_error_share, self._least = max_error_share, least
        self._submitted: dict[int, Response] = {}
        """By the pool's ticket."""
        self._waiting: list[Response] = []
        """Those that are graded in one batch."""
        self._graded: dict[int, dict[int, GradedResponse]] = {}
        self._undelivered: list[int] = []
        """Groups that are graded, and whose verdicts nobody has taken yet."""
        self._errors: list[tuple[Response, str]] = []

    def add(self, response: Response) -> None:
        """Takes a response that is not there yet."""
        super().add(response)
        if self._pool.grades_batches:
            self._waiting.append(response)
        else:
            self._submit([response])

    def verdicts(self, *, idle: bool) -> list[tuple[int, bool]]:
        """Returns the groups that have been graded since the last call, and whether they are kept.

        Raises ValueError if too many rewards fail.
        """
        if idle and self._waiting:
            self._submit(sorted(self._waiting, key=lambda response: (response.group_id, response.sample)))
            self._waiting = []
        for ticket, (text, reward) in self._pool.take().items():
            if (response := self._submitted.pop(ticket, None)) is None:
                continue  # of a draw before, which was decided without it
            if self._change is not None:
                reward = self._change(response, reward)
            group = self._graded.setdefault(response.group_id, {})
            group[response.sample] = GradedResponse(response=response, text=text, reward=reward)
            if reward.error is not None:
                self._errors.append((response, reward.error))
            if len(group) == self.size:
                self._undelivered.append(response.group_id)
        if sum(map(len, self._graded.values())) >= self._least:
            self.check()
        if self._pool.grades_batches and self._submitted:
            return []  # the parts of a batch come back in any order, and what is drawn next must not depend on it
        whole, self._undelivered = self._undelivered, []
        return [(number, self._keeps(self.group(number))) for number in sorted(whole)]

    def sources(self) -> list[Any]:
        """Returns what becomes readable when there are verdicts."""
        return list(self._pool.sources())

    def group(self, number: int) -> Group:
        """Returns a group that is graded."""
        return [self._graded[number][sample] for sample in range(self.size)]

    def check(self) -> None:
        """Raises ValueError if too many of the rewards so far have failed."""
        graded = sum(map(len, self._graded.values()))
        if not self._errors or len(self._errors) < self._max_error_share * graded:
            return
        first, error = self._errors[0]
        call = "; reward.reward_type=batch calls the function with a list, sequential with one dictionary"
        raise ValueError(
            f"{len(self._errors)} of {graded} rewards failed, which ends the run (reward.max_error_share is "
            f"{self._max_error_share:g}). The first, of split {first.prompt.split}, row {first.prompt.row}: {error}"
            + (call if len(self._errors) == graded else "")
        )

    def _submit(self, responses: Sequence[Response]) -> None:
        self._submitted.update(zip(self._pool.submit(responses), responses, strict=True))


def graded_groups(groups: Sequence[Sequence[Response]], verdicts: Sequence[tuple[str, Reward]]) -> list[Group]:
    """Returns groups with the texts and rewards of their responses, which come one after the other."""
    found = iter(verdicts)
    return [[GradedResponse(response, *next(found)) for response in group] for group in groups]


def verdicts_of(groups: Sequence[Group]) -> list[tuple[str, Reward]]:
    """Returns the text and reward of each response, one group after the other."""
    return [(item.text, item.reward) for item in chain.from_iterable(groups)]
