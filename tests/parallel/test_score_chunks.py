"""The chunks of a scoring pass: their sizes, their number on every rank, the way out between them, the same scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from megatron_vppo.models.options import ModelOptions
from megatron_vppo.parallel import score_chunks as module
from megatron_vppo.parallel.score_chunks import ScoreChunks
from megatron_vppo.parallel.scorer import Scorer
from megatron_vppo.system.agreement import any_rank
from megatron_vppo.system.stop_signals import StopRequested
from tests.gloo import run_gloo
from tests.models.tiny import save_tiny_model, tiny_config
from tests.parallel.case import Case
from tests.parallel.policy_rig import STEP, make_responses, make_scorer
from tests.parallel.test_scorer import unequal_fields

LAYOUTS = {
    "PP 2": Case(pipeline=2, options=ModelOptions(pipeline_layers=(1, 2))),
    "PP 2, interleaved": Case(pipeline=2, options=ModelOptions(pipeline_layers=(1, 1, 1, 1), virtual_stages=2)),
    "DP 2": Case(data=2),
}
CHUNKS = {"PP 2": 4, "PP 2, interleaved": 4, "DP 2": 5}
"""Eight rows one by one: two at a time in a pipeline of two; five on one data-parallel rank, three on the other."""
FOLDERS = {name: "four" if "interleaved" in name else "three" for name in LAYOUTS}


# --- Sizes ------------------------------------------------------------------------------------------------------------


def _sizes(rank: int, world: int, stages: int) -> list[list[int]]:
    """Three passes over 13 micro-batches on rank 0 and 11 on rank 1, where each takes 2 s, and 40 s in the last one."""
    now = [0.0]
    module.time = SimpleNamespace(monotonic=lambda: now[0])  # type: ignore[assignment]
    layout: Any = SimpleNamespace(pipeline=stages, device=torch.device("cpu"))
    chunks, views = ScoreChunks(layout, seconds=8.0), [[] for _ in range((13, 11)[rank])]
    passes = []
    for seconds in (2.0, 2.0, 40.0):
        passes.append([])
        for chunk in chunks.of(views, lambda: None):
            passes[-1].append(len(chunk))
            now[0] += len(chunk) * seconds * (0.5, 1.0)[rank]
    return passes


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        # Four fit into 8 s; what is left is shared out. At 40 s none fits, and one each is the least.
        (1, ([[4, 3, 3, 3]] * 2 + [[4] + [1] * 9], [[4, 3, 3, 1]] * 2 + [[4] + [1] * 7 + [0] * 2])),
        # The first chunk of the run has four for each stage. A pipeline of two takes two at a time.
        (2, ([[8, 4, 1], [4, 4, 4, 1], [4] + [2] * 4 + [1]], [[8, 3, 0], [4, 4, 3, 0], [4] + [2] * 3 + [1, 0]])),
    ],
)
def test_chunks_have_the_size_that_the_slowest_rank_needs(stages: int, expected: tuple[list[list[int]], ...]) -> None:
    assert tuple(run_gloo(_sizes, 2, stages)) == expected


def test_without_a_boundary_everything_is_one_chunk() -> None:
    layout: Any = SimpleNamespace(pipeline=2, device=torch.device("cpu"))
    views: list[Any] = [[], [], []]
    assert list(ScoreChunks(layout, seconds=1e-9).of(views, None)) == [views]


# --- Scores -----------------------------------------------------------------------------------------------------------


class Boundaries:
    """Counts the boundaries that a rank reaches; at one of them rank 1 is asked to stop."""

    def __init__(self, rank: int, *, asked_at: int | None) -> None:
        self.asks_at = asked_at if rank == 1 else None
        self.reached = 0

    def __call__(self) -> None:
        self.reached += 1
        if any_rank(self.reached == self.asks_at):
            raise StopRequested


def _score(scorer: Scorer, boundary: Callable[[], None] | None) -> Any:
    return scorer.score(make_responses(), step=STEP, views="both", divergence="kl_full", boundary=boundary)


def _scores(rank: int, world: int, folders: dict[str, Path]) -> dict[str, Any]:
    module.FIRST_PER_STAGE = 1
    found = {}
    for name, case in LAYOUTS.items():
        layout = case.open()
        scorer = make_scorer(folders[FOLDERS[name]], layout, rows=1, options=case.options, scoring_chunk_seconds=1e-9)
        whole = _score(scorer, None)
        assert whole.old_logp_BT.abs().sum() > 0 and not torch.equal(whole.old_logp_BT, whole.perturbed_logp_BT)
        through = Boundaries(rank, asked_at=None)
        differences = unequal_fields(_score(scorer, through), whole)
        cut = Boundaries(rank, asked_at=2)
        with pytest.raises(StopRequested):
            _score(scorer, cut)
        differences += unequal_fields(_score(scorer, Boundaries(rank, asked_at=None)), whole)
        assert all(stage.training for stage in scorer.stages)
        found[name] = (differences, through.reached + 1, cut.reached)
        parallel_state.destroy_model_parallel()
    return found


@pytest.mark.distributed
def test_scores_do_not_depend_on_chunks_and_all_ranks_leave_together(tmp_path: Path) -> None:
    folders = {"three": tmp_path / "three", "four": tmp_path / "four"}
    save_tiny_model(folders["three"], tiny_config(tied=True, vocab=299))
    save_tiny_model(folders["four"], tiny_config(tied=True, vocab=299, num_hidden_layers=4))
    expected = {name: ([], CHUNKS[name], 2) for name in LAYOUTS}
    assert run_gloo(_scores, 2, folders, timeout_seconds=300) == [expected] * 2
