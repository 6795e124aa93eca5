"""The key of a perturbation: one per response, or one per prompt."""

from __future__ import annotations

from megatron_vppo.algorithm.types import PerturbKey
from tests.algorithm.rows import response


def test_keys_of_rows_and_of_images() -> None:
    rows = [response(1, group=group, sample=sample) for group, sample in ((0, 0), (0, 1), (3, 5))]
    own = [PerturbKey.of(row, 7, per="row") for row in rows]
    assert own == [PerturbKey(7, 0), PerturbKey(7, 1), PerturbKey(7, 196_613)]  # 3 x 65536 + 5
    assert {PerturbKey.of(row, 7, per="image") for row in rows} == {PerturbKey(7, None)}
    shared = [PerturbKey.of(row, 7, per=2).draw for row in rows]
    assert shared == [-1 - row.sample % 2 for row in rows], "numbers that no response has by itself"
