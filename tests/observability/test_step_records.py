"""Flat arrays of a step become the records of its file, number by number as Python rounds them."""

from __future__ import annotations

import base64
import io
import json
import pickle
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_vppo.observability.json_lines import dump_line
from megatron_vppo.observability.step_records import StepRecords


def make(**changes: Any) -> StepRecords:
    parts: dict[str, Any] = {
        "heads": [{"split": "train", "row": row, "response": "x", "reward": 0.5} for row in range(3)],
        "lengths": [2, 0, 1],
        "token_texts": {4: "four", 5: "\udc80"},
        "token_ids_N": np.array([4, 5, 4], np.int32),
        "floats_N": {"rollout_logps": np.array([-0.1234567, -1e-7, -2.0]), "dependency": None},
        "kept_N": np.array([1, 0, 1], np.int8),
    }
    return StepRecords(**{**parts, **changes})


def test_records_in_the_order_of_the_fields() -> None:
    first, empty, last = pickle.loads(pickle.dumps(make(), protocol=5)).records()
    assert json.dumps(first) == (
        '{"split": "train", "row": 0, "response": "x", "tokens": ["four", "\\udc80"], "token_ids": [4, 5], '
        '"rollout_logps": [-0.123457, -0.0], "dependency": null, "kept": [1, 0], "reward": 0.5}'
    )
    assert empty["tokens"] == empty["rollout_logps"] == [] and last["rollout_logps"] == [-2.0]


@pytest.mark.parametrize("scale", [1e-8, 1e-6, 1e-3, 1.0, 40.0])
def test_numbers_are_rounded_as_python_rounds_them(scale: float) -> None:
    """Ties included: 0.5 ** 7 has seven digits, the last of them a five."""
    draw = np.random.default_rng(0)
    numbers = np.concatenate([-scale * draw.random(20_000), np.arange(-999, 999) * 0.5**7, [0.0, -0.0]]).astype("f4")
    count = len(numbers)
    records = make(
        heads=[{}], lengths=[count], token_ids_N=np.full(count, 4, np.int32), kept_N=np.ones(count, np.int8),
        floats_N={"old_logps": numbers},
    )  # fmt: skip
    (record,) = records.records()
    assert list(map(repr, record["old_logps"])) == [repr(round(x, 6)) for x in numbers.tolist()]


def test_numbers_that_are_not_finite_stay_so() -> None:
    records = make(floats_N={"old_logps": np.array([-np.inf, np.nan, -1.0], "f4")})
    first, _, last = (json.loads(dump_line(record)) for record in records.records())
    assert first["old_logps"] == ["-Infinity", "NaN"] and last["old_logps"] == [-1.0]


def test_images_are_png_of_the_same_pixels() -> None:
    gray, black = Image.new("RGB", (3, 2), (9, 9, 9)), Image.new("RGB", (3, 2))
    sent = pickle.loads(pickle.dumps(make(images={1: [(gray, black)], 2: [(black, None)]})))
    none, both, one = sent.records()
    assert "images" not in none and list(one["images"][0]) == ["original"]
    for name, image in {"original": gray, "masked": black}.items():
        png = base64.b64decode(both["images"][0][name])
        assert Image.open(io.BytesIO(png)).tobytes() == image.tobytes()
