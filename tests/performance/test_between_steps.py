"""The work of rank 0's main thread between a weight sync and the next sampling: it hands over, and no more.

Recorder, record writer, draw, sampler and images are real (tools/bench/waste_between.py). Counted are the calls of
functions, Python's and others, of the main thread. How long they take `tools/bench/waste.py --parts between` says.
"""

from __future__ import annotations

from pathlib import Path

from bench.waste_between import alone, counted

ROWS, TOKENS = 48, (4, 40)
CALLS_OF_ROW, CHANCE = 40, 1.02


def test_records_and_images_are_left_to_others(tmp_path: Path) -> None:
    """No text, JSON or image is made by the main thread, and nothing is done for each token."""
    with alone(tmp_path):
        few, many = (counted(tmp_path / str(tokens), rows=ROWS, tokens=tokens) for tokens in TOKENS)
    assert few.slow == many.slow == 0
    assert few.total <= CALLS_OF_ROW * ROWS
    assert many.total <= CHANCE * few.total
