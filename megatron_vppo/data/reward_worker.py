"""A reward worker: `python -m megatron_vppo.data.reward_worker PARENT_PID FUNCTION TYPE TOKENIZER`, driven by
`RewardPool`. TOKENIZER is the number of a descriptor with what `describe_tokenizer` returned.

Requests come as length-prefixed JSON on stdin, and answers leave the same way on the descriptor that was stdout;
anything that a user's function prints goes to stderr. There is one request at a time, a list of responses, which are
decoded to text, and which the function grades in one call ('batch') or one by one ('sequential'). Nothing here imports
torch or transformers, so that it starts fast.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import os
import reprlib
import resource
import struct
import sys
import traceback
from array import array
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, BinaryIO

from megatron_vppo.config.choices import BUILT_IN_REWARD
from megatron_vppo.data.text_decoder import TextDecoder
from megatron_vppo.system.processes import die_with_parent

_HEADER = struct.Struct("<Q")
_TOKEN = "i"  # array.array's 32 bits
_GRADER_MEMORY_BYTES = 4 << 30  # of the built-in grader: symbolic algebra on hostile answers can ask for any amount

Ungraded = tuple[Sequence[int], str]
"""The token ids of a response, and the ground truth."""


def write_message(stream: BinaryIO, message: Any) -> None:
    data = json.dumps(message).encode()
    stream.write(_HEADER.pack(len(data)) + data)
    stream.flush()


def read_message(stream: BinaryIO) -> Any:
    """Reads one message. Raises EOFError if the other side is gone, also in the middle of it."""
    return json.loads(_read_whole(stream, _HEADER.unpack(_read_whole(stream, _HEADER.size))[0]))


def _read_whole(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError("the other side closed the pipe")
    return data


def write_request(stream: BinaryIO, ungraded: Sequence[Ungraded]) -> None:
    """Sends responses to be graded."""
    data = json.dumps([(len(token_ids), answer) for token_ids, answer in ungraded]).encode()
    tokens = [array(_TOKEN, token_ids).tobytes() for token_ids, _ in ungraded]
    stream.write(b"".join([_HEADER.pack(len(data)), data, *tokens]))
    stream.flush()


def read_request(stream: BinaryIO) -> list[Ungraded]:
    """Reads what `write_request` has sent. Raises EOFError if the other side is gone."""
    ungraded: list[Ungraded] = []
    for length, answer in read_message(stream):
        token_ids = array(_TOKEN)
        token_ids.frombytes(_read_whole(stream, length * token_ids.itemsize))
        ungraded.append((token_ids.tolist(), answer))
    return ungraded


def load_function(spec: str) -> Callable[..., Any]:
    """Loads the built-in reward function, or that of `file.py:function`. Raises ValueError if there is no such thing.

    The file's folder is not put on the import path, where a file called math.py would hide the standard library's.
    """
    if spec == BUILT_IN_REWARD:
        from megatron_vppo.data.mathruler import compute_score

        resource.setrlimit(resource.RLIMIT_AS, (_GRADER_MEMORY_BYTES, _GRADER_MEMORY_BYTES))
        return compute_score
    file, _, name = spec.rpartition(":")
    module_spec = importlib.util.spec_from_file_location("_user_reward_function", file)
    if not Path(file).is_file() or module_spec is None or module_spec.loader is None:
        raise ValueError(f"reward.reward_function={spec}: no such Python file")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    try:
        module_spec.loader.exec_module(module)
    except BaseException as error:  # sys.exit() as well
        raise ValueError(f"reward.reward_function={spec} cannot be imported:\n{_lines_of_file(error, file)}") from error
    function = module.__dict__.get(name)
    if not callable(function):
        known = ", ".join(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise ValueError(f"reward.reward_function={spec}: no function {name!r} in that file; it has {known or 'none'}")
    check_call(function, spec)
    return function


def _lines_of_file(error: BaseException, file: str) -> str:
    """Formats an error with the lines of `file`, and of what it called, that led to it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != file:
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(error), error, trace, chain=False))[-2000:].strip()


def check_call(function: Callable[..., Any], spec: str) -> None:
    """Refuses a function that cannot be called as reward functions are: with one argument, and not awaited."""
    if inspect.iscoroutinefunction(function):
        raise ValueError(f"reward.reward_function={spec} is an async function; make it an ordinary one")
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions of compiled modules have none
        return
    try:
        signature.bind(None)
    except TypeError as error:
        raise ValueError(
            f"reward.reward_function={spec} is {getattr(function, '__name__', 'it')}{signature}, but it is called with "
            "one argument: a dict with 'response', 'response_length' and 'ground_truth', or a list of them, by "
            "reward.reward_type"
        ) from error


def checked_score(value: Any) -> dict[str, float]:
    """Turns a number, or a mapping with 'overall', into finite floats with 'overall' and 'accuracy'.

    If there is no accuracy, it is the overall reward clipped to [0, 1]. Raises TypeError, ValueError.
    """
    if not isinstance(value, Mapping):
        value = {"overall": value}
    if "overall" not in value:
        raise ValueError(f"the reward function returned no 'overall', only {sorted(map(str, value))}")
    score: dict[str, float] = {}
    for name, number in value.items():
        if isinstance(number, str):
            raise TypeError(f"the reward function returned text for {name!r}: {number[:40]!r}")
        refusal = f"the reward function returned {reprlib.repr(number)} for {name!r}, which is no number"
        if isinstance(number, bytes | bytearray):  # float() reads b"1.0"
            raise TypeError(refusal)
        try:
            score[str(name)] = float(number)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # the last is torch's
            raise TypeError(refusal) from error
        if not math.isfinite(score[str(name)]):
            raise ValueError(f"the reward function returned {score[str(name)]} for {name!r}")
    score.setdefault("accuracy", min(1.0, max(0.0, score["overall"])))
    if not 0.0 <= score["accuracy"] <= 1.0:
        raise ValueError(f"the reward function returned an accuracy of {score['accuracy']}, outside [0, 1]")
    return score


def grade(function: Callable[..., Any], inputs: list[dict[str, Any]], *, batch: bool) -> list[dict[str, float]]:
    """Returns one checked result per input. Raises whatever the function raises."""
    count = len(inputs)  # the function may change the list
    results = function(inputs) if batch else [function(item) for item in inputs]
    # A set has no order, and iterating a dictionary or a text would give its keys or letters.
    if isinstance(results, Mapping | Set | str | bytes) or not hasattr(results, "__iter__"):
        raise TypeError(
            f"the reward function returned a {type(results).__name__}, and it should return a list with a reward for "
            "each response (reward.reward_type=batch)"
        )
    results = list(results)
    if len(results) != count:
        raise ValueError(f"the reward function returned {len(results)} scores for {count} responses")
    return [checked_score(result) for result in results]


def _describe(error: BaseException) -> dict[str, str]:
    """Describes an error, with the line that raised it: two errors of one line count as one kind."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    try:
        text = str(error)
    except Exception:  # the user's own kind of error
        text = "its text cannot be made"
    return {"error": f"{type(error).__name__}: {text}"[:500], "kind": f"{type(error).__name__} at {place}"}


def main() -> None:
    parent_pid, spec, reward_type, tokenizer = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    die_with_parent(parent_pid)
    decoder = TextDecoder(_description(tokenizer))
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # the function's output must not get between the messages,
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # and the function must not read them
    try:
        function = load_function(spec)
    except ValueError as error:
        write_message(answers, {"fatal": str(error)})
        return
    write_message(answers, {"ready": True})
    while True:
        try:
            ungraded = read_request(requests)
        except EOFError:
            return
        try:
            texts = [decoder.decode(token_ids) for token_ids, _ in ungraded]
            inputs = [
                {"response": text, "response_length": len(token_ids), "ground_truth": answer}
                for text, (token_ids, answer) in zip(texts, ungraded, strict=True)
            ]
            scores = grade(function, inputs, batch=reward_type == "batch")
            write_message(answers, {"scores": scores, "texts": texts})
        except BaseException as error:  # sys.exit() as well
            write_message(answers, _describe(error))


def _description(descriptor: int) -> str:
    """Reads an open file from its beginning: all workers share the descriptor, and so its position."""
    try:
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode()
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    main()
