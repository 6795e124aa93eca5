"""Functions written for EasyR1 and verl: recognised by their parameters, called as there, and refused otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megatron_vppo.config.choices import RewardType
from megatron_vppo.data.columns import RowExtras
from megatron_vppo.data.user_reward import Graded, UserReward, checked_score, find_convention, grade, reads_extras

RESPONSES = [Graded("x", 3, "42", "train", 7), Graded("yy", 5, "43", "val", 8)]


def user_reward(reward_type: RewardType = "auto", **arguments: Any) -> UserReward:
    return UserReward("/r.py", "f", arguments, reward_type, {"train": "lab/shapes", "val": "held.jsonl"})


SEEN: list[Any] = []
"""The arguments of every call of the functions below."""


def saw(*arguments: Any) -> float:
    SEEN.append(arguments)
    return 0.5


# The signatures as they stand in EasyR1, its older versions included, and in verl.
def easyr1_batch(reward_inputs: list[dict[str, Any]], format_weight: float = 0.1):
    return [saw(item, format_weight) for item in reward_inputs]


def easyr1_dapo(reward_inputs, max_response_length, overlong_buffer_length, overlong_penalty_factor):
    return [saw(item, max_response_length + overlong_buffer_length) for item in reward_inputs]


def easyr1_sequential(reward_input: dict[str, Any], format_weight: float = 0.1):
    return saw(reward_input, format_weight)


def easyr1_old(predict_str: str, ground_truth: str, format_weight: float = 0.1):
    return saw(predict_str, ground_truth, format_weight)


def easyr1_older(predict: str, ground_truth: str):
    return saw(predict, ground_truth)


def easyr1_lists(predicts: list[str], ground_truths: list[str], format_weight: float = 0.1):
    return [saw(*pair, format_weight) for pair in zip(predicts, ground_truths, strict=True)]


def with_extra_info(predict_str: str, ground_truth: str, extra_info=None):
    return saw(predict_str, ground_truth, extra_info)


def verl(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return saw(data_source, solution_str, ground_truth, extra_info, kwargs)


def verl_bare(solution_str, ground_truth, data_source):
    return saw(data_source, solution_str, ground_truth)


def verl_kwargs(data_source, solution_str, ground_truth, **kwargs):
    return saw(data_source, solution_str, ground_truth, kwargs)


def verl_lists(data_sources, solution_strs, ground_truths, extra_infos):
    return [saw(*row) for row in zip(data_sources, solution_strs, ground_truths, extra_infos, strict=True)]


ITEMS = [
    {"response": "x", "response_length": 3, "ground_truth": "42"},
    {"response": "yy", "response_length": 5, "ground_truth": "43"},
]
OF_VERL = {"num_turns": 2, "rollout_reward_scores": {}}
ROWS = [{"split": "train", "index": 7, **OF_VERL}, {"split": "val", "index": 8, **OF_VERL}]
CALLED: list[tuple[Callable[..., Any], dict[str, Any], str, bool, list[Any]]] = [
    (easyr1_batch, {}, "EasyR1", True, [(ITEMS[0], 0.1), (ITEMS[1], 0.1)]),
    (easyr1_batch, {"format_weight": 0.5}, "EasyR1", True, [(ITEMS[0], 0.5), (ITEMS[1], 0.5)]),
    (
        easyr1_dapo,
        {"max_response_length": 8, "overlong_buffer_length": 1, "overlong_penalty_factor": 1.0},
        "EasyR1", True, [(ITEMS[0], 9), (ITEMS[1], 9)],
    ),
    (easyr1_sequential, {"format_weight": 0.5}, "EasyR1", False, [(ITEMS[0], 0.5), (ITEMS[1], 0.5)]),
    (easyr1_old, {}, "EasyR1", False, [("x", "42", 0.1), ("yy", "43", 0.1)]),
    (easyr1_older, {}, "EasyR1", False, [("x", "42"), ("yy", "43")]),
    (easyr1_lists, {"format_weight": 0.5}, "EasyR1", True, [("x", "42", 0.5), ("yy", "43", 0.5)]),
    (with_extra_info, {}, "EasyR1", False, [("x", "42", ROWS[0]), ("yy", "43", ROWS[1])]),
    (
        verl, {"scale": 2}, "verl", False,
        [("lab/shapes", "x", "42", ROWS[0], {"scale": 2}), ("held.jsonl", "yy", "43", ROWS[1], {"scale": 2})],
    ),
    (verl, {"data_source": "gsm8k"}, "verl", False, [("gsm8k", *values, {}) for values in
                                                     (("x", "42", ROWS[0]), ("yy", "43", ROWS[1]))]),
    (verl_bare, {}, "verl", False, [("lab/shapes", "x", "42"), ("held.jsonl", "yy", "43")]),
    (
        verl_kwargs, {}, "verl", False,
        [("lab/shapes", "x", "42", {"extra_info": ROWS[0]}), ("held.jsonl", "yy", "43", {"extra_info": ROWS[1]})],
    ),
    (verl_lists, {}, "verl", True, [("lab/shapes", "x", "42", ROWS[0]), ("held.jsonl", "yy", "43", ROWS[1])]),
]  # fmt: skip


@pytest.mark.parametrize(("function", "arguments", "origin", "batch", "seen"), CALLED)
def test_functions_are_found_and_called_as_where_they_come_from(function, arguments, origin, batch, seen) -> None:
    reward = user_reward(**arguments)
    convention = find_convention(function, reward)
    SEEN.clear()
    scores = grade(function, convention, reward, RESPONSES)
    assert convention.origin.startswith(f"{origin}'s") and convention.batch is batch
    assert seen == SEEN
    assert scores == [{"overall": 0.5, "accuracy": 0.5}] * 2


@pytest.mark.parametrize(("function", "unread"), [(verl, verl_bare), (verl_lists, easyr1_lists)])
def test_functions_of_verl_get_what_their_rows_hold(function, unread) -> None:
    """Entries of the row stay as they are, and what is no record is passed on as it is. EasyR1's get none of it."""
    own = {"index": 3, "answer": None, "shape": {"sides": [3, 4.5]}, "num_turns": 1}
    rows = [
        Graded("x", 1, "42", "train", 7, RowExtras("geo", own)),
        Graded("y", 1, "43", "train", 8, RowExtras(extra_info="{}")),
        Graded("z", 1, "44", "train", 9, RowExtras(data_source=4, extra_info={})),
    ]
    reward = user_reward()
    SEEN.clear()
    grade(function, find_convention(function, reward), reward, rows)
    assert [(seen[0], seen[3]) for seen in SEEN] == [
        ("geo", {**own, "rollout_reward_scores": {}}), ("lab/shapes", "{}"), (4, OF_VERL)
    ]  # fmt: skip
    assert reads_extras(function, find_convention(function, reward), reward)
    named = user_reward(data_source="geo") if unread is verl_bare else reward
    assert not reads_extras(unread, find_convention(unread, named), named)


def test_a_single_parameter_of_another_name_is_called_by_the_reward_type() -> None:
    def any_name(things, scale=1):
        return [1.0] * len(things)

    assert find_convention(any_name, user_reward()).batch
    assert find_convention(any_name, user_reward("batch", scale=2)).batch
    assert not find_convention(any_name, user_reward("sequential")).batch
    assert find_convention(lambda *things: [1.0], user_reward()).batch
    assert find_convention(lambda predict_str: [1.0], user_reward()).origin == "EasyR1's with a list of dictionaries"


@pytest.mark.parametrize(
    ("function", "given", "wanted"),
    [(easyr1_batch, "sequential", "batch"), (easyr1_sequential, "batch", "sequential"), (verl, "batch", "sequential")],
)
def test_a_reward_type_against_the_parameters_is_refused(function, given: RewardType, wanted: RewardType) -> None:
    with pytest.raises(ValueError, match=rf"reward_type is {given}; set reward\.reward_type={wanted}, or leave it out"):
        find_convention(function, user_reward(given))
    assert find_convention(function, user_reward(wanted)).batch is (wanted == "batch")


@pytest.mark.parametrize(
    ("function", "arguments", "reason"),
    [
        (lambda a, b: 0, {}, "missing a required argument: 'b'"),
        (easyr1_dapo, {"max_response_length": 8}, "missing a required argument: 'overlong_buffer_length'"),
        (easyr1_batch, {"weight": 1}, "got an unexpected keyword argument 'weight'"),
        (verl_bare, {"scale": 1}, "got an unexpected keyword argument 'scale'"),
        (lambda data_source, solution_str, ground_truth, model: 0, {}, "missing a required argument: 'model'"),
        (lambda: 0, {}, "too many positional arguments"),
    ],
)
def test_what_fits_no_convention_is_refused_with_those_that_are_known(function, arguments, reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        find_convention(function, user_reward(**arguments))
    message = str(caught.value)
    assert f"which cannot be called ({reason}). Known are functions with the parameters\n" in message
    assert "\n  (data_source, solution_str, ground_truth, extra_info=None), verl's\n" in message
    assert "\n  (reward_inputs), EasyR1's with a list" in message and "reward.reward_function_kwargs" in message


def test_results_of_verl() -> None:
    """'score' is the reward, 'acc' the accuracy; texts such as 'pred' of its math_dapo are left out."""
    assert checked_score({"score": -1.0, "acc": True, "pred": "5", "n": 2, "found": None}) == {
        "overall": -1.0, "accuracy": 1.0, "n": 2.0
    }  # fmt: skip
    assert checked_score({"score": -1.0}) == {"overall": -1.0, "accuracy": 0.0}
    assert checked_score({"score": 3.0, "overall": 0.5}) == {"score": 3.0, "overall": 0.5, "accuracy": 0.5}
    with pytest.raises(TypeError, match="returned text for 'overall'"):
        checked_score({"score": "1"})
    with pytest.raises(ValueError, match=r"returned no 'overall' and no 'score', only \['acc'\]"):
        checked_score({"acc": 1.0})
