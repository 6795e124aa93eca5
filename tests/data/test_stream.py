"""The order of prompts: every one once an epoch, and exact after a resume."""

from __future__ import annotations

import json

import pytest

from megatron_vppo.data.prompt_sets import PromptSets
from megatron_vppo.data.stream import PromptStream, StreamPosition
from tests.data.test_prompts import load


@pytest.fixture
def ten(processor, image_folder):
    rows = [{"problem": f"question {i}", "answer": str(i), "images": []} for i in range(10)]
    rows[4]["problem"] = "<image> without an image"
    return PromptSets([load(image_folder, processor, rows, on_bad_row="skip")])


def drawn(stream: PromptStream, k: int) -> list[int]:
    return [prompt.row for prompt in stream.next(k)]


def test_epochs_cover_every_prompt_once_in_changing_order(ten) -> None:
    stream = PromptStream(ten, seed=1, shuffle=True)
    epochs = [drawn(stream, 3) + drawn(stream, 3) + drawn(stream, 3) for _ in range(3)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 5, 6, 7, 8, 9] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert stream.position == StreamPosition(2, 9)
    again, other = (PromptStream(ten, seed=seed, shuffle=True) for seed in (1, 2))
    assert drawn(again, 9) == epochs[0] != drawn(other, 9)
    in_order = PromptStream(ten, seed=1, shuffle=False)
    assert [drawn(in_order, 9), drawn(in_order, 9)] == [[0, 1, 2, 3, 5, 6, 7, 8, 9]] * 2


def test_a_short_rest_of_an_epoch_is_dropped(ten) -> None:
    stream = PromptStream(ten, seed=1, shuffle=True)
    assert stream.steps_per_epoch(4) == 2
    full = drawn(PromptStream(ten, seed=1, shuffle=True), 9)
    assert drawn(stream, 4) + drawn(stream, 4) == full[:8]
    third = drawn(stream, 4)
    assert stream.position == StreamPosition(1, 4) and len(set(third)) == 4
    with pytest.raises(ValueError, match=r"data\.rollout_batch_size=10.*has 9 usable"):
        stream.next(10)


def test_resume_is_exact(ten) -> None:
    stream = PromptStream(ten, seed=3, shuffle=True)
    for _ in range(5):
        stream.next(2)
    state = json.loads(json.dumps(stream.state_dict()))
    rest = [drawn(stream, 2) for _ in range(8)]
    resumed = PromptStream(ten, seed=3, shuffle=True)
    resumed.load_state_dict(state)
    assert [drawn(resumed, 2) for _ in range(8)] == rest
    with pytest.raises(ValueError, match=r"seed=3, this run has seed=4.*trainer\.experiment_name"):
        PromptStream(ten, seed=4, shuffle=True).load_state_dict(state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offset": ...}, r"^lacks offset$"),
        ({"epoch": "0"}, r"^has epoch='0': "),
        ({"offset": -2}, r"^has offset=-2: "),
        ({"num_prompts": None}, r"^has num_prompts=None: "),
    ],
)
def test_what_is_no_place_changes_nothing(ten, changes: dict[str, object], message: str) -> None:
    stream = PromptStream(ten, seed=3, shuffle=True)
    stream.next(2)
    state = {name: value for name, value in {**stream.state_dict(), **changes}.items() if value is not ...}
    with pytest.raises(ValueError, match=message):
        stream.load_state_dict(state)
    assert stream.position == StreamPosition(0, 2)
