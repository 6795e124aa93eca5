"""The grader: from responses to graded responses, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vppo.algorithm.types import GradedResponse, Response, Reward
from megatron_vppo.data.reward_pool import RewardPool
from megatron_vppo.parallel.collective import from_rank_zero


class Grader:
    """Grades responses in worker processes of rank 0."""

    def __init__(self, pool: RewardPool | None, *, max_error_share: float) -> None:
        """
        Args:
            pool: on rank 0; None elsewhere.
            max_error_share: the share of failed rewards in one call of `grade` that ends the run.
        """
        self._pool = pool
        self._max_error_share = max_error_share

    def grade(self, responses: Sequence[Response]) -> list[GradedResponse]:
        """Grades responses, in their order. A collective over all ranks.

        Raises ValueError if too many rewards fail.
        """
        graded = from_rank_zero(lambda: self._grade_here(responses))
        return [
            GradedResponse(response=response, text=text, reward=reward)
            for response, (text, reward) in zip(responses, graded, strict=True)
        ]

    def _grade_here(self, responses: Sequence[Response]) -> list[tuple[str, Reward]]:
        assert self._pool is not None, "rewards are computed on rank 0"
        graded = self._pool.grade(responses)
        errors = [
            (response, reward.error) for response, (_, reward) in zip(responses, graded, strict=True) if reward.error
        ]
        if errors and len(errors) >= self._max_error_share * len(graded):
            first, error = errors[0]
            call = "; reward.reward_type=batch calls the function with a list, sequential with one dictionary"
            raise ValueError(
                f"{len(errors)} of {len(graded)} rewards failed, which ends the run (reward.max_error_share is "
                f"{self._max_error_share:g}). The first, of split {first.prompt.split}, row {first.prompt.row}: {error}"
                + (call if len(errors) == len(graded) else "")
            )
        return graded

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
