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


# --- Several files ----------------------------------------------------------------------------------------------------


@pytest.fixture
def two_files(processor, image_folder):
    rows = [[{"problem": f"{name} {i}", "answer": str(i), "images": []} for i in range(n)] for name, n in NAMES.items()]
    rows[0][1]["answer"] = ""
    for name in NAMES:
        (image_folder / name).mkdir()
    return PromptSets(
        [
            load(image_folder / name, processor, some, on_bad_row="skip", split=f"train/{name}")
            for name, some in zip(NAMES, rows, strict=True)
        ]
    )


NAMES = {"a": 5, "b": 8}


def names(stream: PromptStream, k: int) -> list[tuple[str, int]]:
    return [(prompt.split, prompt.row) for prompt in stream.next(k)]


def test_rows_keep_their_numbers_under_the_name_of_their_file(two_files) -> None:
    assert (len(two_files), two_files.sizes) == (12, (4, 8))
    everything = [("train/a", row) for row in (0, 2, 3, 4)] + [("train/b", row) for row in range(8)]
    assert [(prompt.split, prompt.row) for prompt in two_files] == everything
    assert two_files.of_row("train/b", 4).problem == "b 4" == two_files[8].problem
    for split, row in (("train/a", 1), ("train/c", 0)):
        with pytest.raises(KeyError):
            two_files.of_row(split, row)
    assert [prompt.problem for prompt in two_files[3:5]] == ["a 4", "b 0"]
    together = PromptStream(two_files, seed=1, shuffle=True)
    assert sorted(names(together, 12)) == sorted(everything), "without weights every row comes once"
    assert together.describe() == (
        "an epoch is 12 prompts: 4 of train/a (1.00 times its 4), 8 of train/b (1.00 times its 8)"
    )


def test_weights_resume_and_giving_back(two_files) -> None:
    stream = PromptStream(two_files, seed=1, shuffle=True, weights=(1.0, 1.0))
    assert stream.describe() == (
        "an epoch is 12 prompts: 6 of train/a (1.50 times its 4), 6 of train/b (0.75 times its 8)"
    )
    draws = [names(stream, 4) for _ in range(3)]
    assert all(len(set(draw)) == 4 and [split for split, _ in draw].count("train/a") == 2 for draw in draws)
    state = json.loads(json.dumps(stream.state_dict()))
    rest = [names(stream, 3) for _ in range(6)]
    stream.move_to(StreamPosition(0, 4))
    assert names(stream, 4) == draws[1]
    resumed = PromptStream(two_files, seed=1, shuffle=True, weights=(1.0, 1.0))
    resumed.load_state_dict(state)
    assert [names(resumed, 3) for _ in range(6)] == rest
    for weights in ((1.0, 2.0), None):
        with pytest.raises(ValueError, match=r"is for files=\[\['train/a', 4, 1\.0\], .*resume with the data"):
            PromptStream(two_files, seed=1, shuffle=True, weights=weights).load_state_dict(state)


def test_a_step_never_asks_one_prompt_twice(two_files) -> None:
    stream = PromptStream(two_files, seed=1, shuffle=True, weights=(9.0, 1.0))
    with pytest.raises(
        ValueError, match=r"rollout_batch_size=6 has up to 6 prompts of .*rows\.jsonl by its weight, .*4 u"
    ):
        stream.next(6)
    for _ in range(9):
        assert len(set(names(stream, 4))) == 4


def test_a_checkpoint_from_before_there_were_several_files(ten) -> None:
    stream = PromptStream(ten, seed=3, shuffle=True)
    old = {"epoch": 1, "offset": 2, "seed": 3, "shuffle": True, "num_prompts": 9}
    stream.load_state_dict(old)
    assert stream.state_dict() == {**old, "files": None}
