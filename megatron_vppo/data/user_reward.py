"""A reward function of the user's: its file, the convention that it follows, its call and what it returns.

Nothing here imports torch or transformers: reward workers start fast.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import reprlib
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vppo.config.choices import RewardType
from megatron_vppo.data.columns import DATA_SOURCE, EXTRA_INFO, NO_EXTRAS, RowExtras


@dataclass(frozen=True)
class UserReward:
    """A function in a file of the user's, and what it is called with besides the responses."""

    file: str
    """Absolute, so that workers find it from any folder."""
    name: str
    arguments: Mapping[str, Any]
    """By name, the same in every call."""
    reward_type: RewardType
    data_sources: Mapping[str, str]
    """The data set that rows of a split come from, by split, for functions of verl and rows that name none."""

    def __str__(self) -> str:
        return f"{self.file}:{self.name}"


@dataclass(frozen=True)
class Graded:
    """One response to be graded, and its row."""

    response: str
    """The text, without special tokens."""
    response_length: int
    """Tokens."""
    ground_truth: str
    """The answer of the data set row."""
    split: str
    row: int
    extras: RowExtras = NO_EXTRAS
    """This response's own copy: a function may change it."""


# --- Conventions ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Convention:
    """A way to call reward functions, recognised by the names of their parameters."""

    origin: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    """Parameters that are given where the function has them."""
    batch: bool
    """True: one call takes lists, and returns a list."""

    def __str__(self) -> str:
        return f"({', '.join((*self.required, *(f'{name}=None' for name in self.optional)))}), {self.origin}"


DICTIONARIES = Convention("EasyR1's with a list of dictionaries", ("reward_inputs",), (), True)
DICTIONARY = Convention("EasyR1's with one dictionary", ("reward_input",), (), False)
BY_NAME = (
    Convention("verl's", ("data_source", "solution_str", "ground_truth"), ("extra_info",), False),
    Convention("verl's with lists", ("data_sources", "solution_strs", "ground_truths"), ("extra_infos",), True),
    Convention("EasyR1's older one", ("predict_str", "ground_truth"), ("extra_info",), False),
    Convention("EasyR1's older one", ("predict", "ground_truth"), (), False),
    Convention("EasyR1's older one with lists", ("predicts", "ground_truths"), (), True),
)
"""Conventions whose arguments are passed by name."""


def find_convention(function: Callable[..., Any], reward: UserReward) -> Convention:
    """Returns the convention that a function follows by the names of its parameters.

    A single parameter of any other name gets a dictionary or a list of them, by reward.reward_type.

    Raises:
        ValueError: it is async, fits none, needs arguments that nobody gives, or is called the other way by
            reward.reward_type.
    """
    if inspect.iscoroutinefunction(function):
        raise ValueError(f"reward.reward_function={reward} is an async function; make it an ordinary one")
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions of compiled modules have none
        return DICTIONARY if reward.reward_type == "sequential" else DICTIONARIES
    shown = f"reward.reward_function={reward} is {getattr(function, '__name__', 'it')}{signature}"
    names = signature.parameters.keys()
    found = next((kind for kind in BY_NAME if names >= {*kind.required}), None)
    if found is None:
        _check_arguments(signature, [None], reward.arguments, shown)
        first = next((name for name in signature.parameters if name not in reward.arguments), "")
        named = next((kind for kind in (DICTIONARY, DICTIONARIES) if first in kind.required), None)
        if named is None:
            return DICTIONARY if reward.reward_type == "sequential" else DICTIONARIES
        found = named
    else:
        given = (*found.required, *(name for name in found.optional if name in names))
        _check_arguments(signature, [], {**dict.fromkeys(given), **reward.arguments}, shown)
    wanted: RewardType = "batch" if found.batch else "sequential"
    if reward.reward_type not in ("auto", wanted):
        raise ValueError(
            f"{shown}: by its parameters it is {found}, and reward.reward_type is {reward.reward_type}; set "
            f"reward.reward_type={wanted}, or leave it out"
        )
    return found


def _check_arguments(
    signature: inspect.Signature, positional: Sequence[Any], by_name: Mapping[str, Any], shown: str
) -> None:
    try:
        signature.bind(*positional, **by_name)
    except TypeError as error:
        known = "\n  ".join(map(str, (DICTIONARIES, DICTIONARY, *BY_NAME)))
        raise ValueError(
            f"{shown}, which cannot be called ({error}). Known are functions with the parameters\n  {known}\n"
            "and further ones that have a default or are set by reward.reward_function_kwargs"
        ) from error


def call(function: Callable[..., Any], convention: Convention, reward: UserReward, graded: Sequence[Graded]) -> Any:
    """Calls a function with responses, of which a convention without lists takes one. Returns what it returned."""
    if convention in (DICTIONARIES, DICTIONARY):
        items = [
            {"response": one.response, "response_length": one.response_length, "ground_truth": one.ground_truth}
            for one in graded
        ]
        return function(items if convention.batch else items[0], **reward.arguments)
    names = _given(function, convention)
    columns = {name: [_value(one, name.removesuffix("s"), reward) for one in graded] for name in names}
    values = columns if convention.batch else {name: column[0] for name, column in columns.items()}
    return function(**{**values, **reward.arguments})


def reads_extras(function: Callable[..., Any], convention: Convention, reward: UserReward) -> bool:
    """Returns True if a function is called with what its rows have besides the answer."""
    if convention not in BY_NAME:
        return False
    given = {name.removesuffix("s") for name in _given(function, convention) if name not in reward.arguments}
    return not given.isdisjoint((DATA_SOURCE, EXTRA_INFO))


def _given(function: Callable[..., Any], convention: Convention) -> tuple[str, ...]:
    """Returns the names of the parameters that a call of a function gives it by a convention."""
    return convention.required + tuple(name for name in convention.optional if _takes(function, name))


def _takes(function: Callable[..., Any], name: str) -> bool:
    parameters = inspect.signature(function).parameters
    return name in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())


def _value(one: Graded, name: str, reward: UserReward) -> Any:
    """Returns the value of a parameter; that of lists has its name with an s."""
    match name:
        case "data_source":
            own = one.extras.data_source
            return reward.data_sources[one.split] if own is None else own
        case "extra_info":
            return _extra_info(one)
        case "ground_truth":
            return one.ground_truth
    return one.response


def _extra_info(one: Graded) -> Any:
    """Returns the row's own, with the entries that verl adds where it has none of that name.

    A row without one gets the two entries that verl's own data sets have in theirs.
    """
    own = one.extras.extra_info
    if own is None:
        own = {"split": one.split.partition("/")[0], "index": one.row}
    # Two turns: the question and the response.
    return {"num_turns": 2, "rollout_reward_scores": {}, **own} if isinstance(own, dict) else own


# --- Results ----------------------------------------------------------------------------------------------------------


def checked_score(value: Any) -> dict[str, float]:
    """Turns a number, or a mapping with 'overall', into finite floats with 'overall' and 'accuracy'.

    If there is no accuracy, it is the overall reward clipped to [0, 1]. A mapping with 'score' is verl's: that is the
    overall reward, 'acc' the accuracy, and what is no number is left out. Raises TypeError, ValueError.
    """
    if not isinstance(value, Mapping):
        value = {"overall": value}
    elif "overall" not in value and "score" in value:
        value = _of_verl(value)
    if "overall" not in value:
        raise ValueError(f"the reward function returned no 'overall' and no 'score', only {sorted(map(str, value))}")
    score = {str(name): _finite(number, name) for name, number in value.items()}
    score.setdefault("accuracy", min(1.0, max(0.0, score["overall"])))
    if not 0.0 <= score["accuracy"] <= 1.0:
        raise ValueError(f"the reward function returned an accuracy of {score['accuracy']}, outside [0, 1]")
    return score


def _of_verl(value: Mapping[Any, Any]) -> dict[Any, Any]:
    names = {"score": "overall", "acc": "accuracy"}
    others = {name: number for name, number in value.items() if name in names or isinstance(number, int | float)}
    return {names.get(name, name): number for name, number in others.items()}


def _finite(number: Any, name: Any) -> float:
    if isinstance(number, str):
        raise TypeError(f"the reward function returned text for {name!r}: {number[:40]!r}")
    refusal = f"the reward function returned {reprlib.repr(number)} for {name!r}, which is no number"
    if isinstance(number, bytes | bytearray):  # float() reads b"1.0"
        raise TypeError(refusal)
    try:
        value = float(number)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # the last is torch's
        raise TypeError(refusal) from error
    if not math.isfinite(value):
        raise ValueError(f"the reward function returned {value} for {name!r}")
    return value


def grade(
    function: Callable[..., Any], convention: Convention, reward: UserReward, graded: Sequence[Graded]
) -> list[dict[str, float]]:
    """Returns one checked result per response. Raises whatever the function raises."""
    if not convention.batch:
        return [checked_score(call(function, convention, reward, [one])) for one in graded]
    results = call(function, convention, reward, graded)
    # A set has no order, and iterating a dictionary or a text would give its keys or letters.
    if isinstance(results, Mapping | Set | str | bytes) or not hasattr(results, "__iter__"):
        raise TypeError(
            f"the reward function returned a {type(results).__name__}, and it should return a list with a reward for "
            "each response (reward.reward_type=batch)"
        )
    results = list(results)
    if len(results) != len(graded):
        raise ValueError(f"the reward function returned {len(results)} scores for {len(graded)} responses")
    return [checked_score(result) for result in results]


# --- The file ---------------------------------------------------------------------------------------------------------


def load_function(reward: UserReward) -> Callable[..., Any]:
    """Imports the user's file and returns the function. Raises ValueError if there is no such thing.

    The file's folder is not put on the import path, where a file called math.py would hide the standard library's.
    """
    module_spec = importlib.util.spec_from_file_location("_user_reward_function", reward.file)
    if not Path(reward.file).is_file() or module_spec is None or module_spec.loader is None:
        raise ValueError(f"reward.reward_function={reward}: no such Python file")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    try:
        module_spec.loader.exec_module(module)
    except BaseException as error:  # sys.exit() as well
        lines = _lines_of_file(error, reward.file)
        raise ValueError(f"reward.reward_function={reward} cannot be imported:\n{lines}") from error
    function = module.__dict__.get(reward.name)
    if not callable(function):
        known = ", ".join(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise ValueError(
            f"reward.reward_function={reward}: no function {reward.name!r} in that file; it has {known or 'none'}"
        )
    return function


def _lines_of_file(error: BaseException, file: str) -> str:
    """Formats an error with the lines of `file`, and of what it called, that led to it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != file:
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(error), error, trace, chain=False))[-2000:].strip()
