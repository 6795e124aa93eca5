"""A reward worker: `python -m megatron_vppo.data.reward_worker PARENT_PID REWARD TOKENIZER`, driven by `RewardPool`.
REWARD is what `reward_to_text` returned, TOKENIZER the number of a descriptor with what `describe_tokenizer` returned.

Requests come as length-prefixed JSON on stdin, and answers leave the same way on the descriptor that was stdout;
anything that a user's function prints goes to stderr. There is one request at a time, a list of responses, which are
decoded to text, and which the function grades in one call or one by one. Nothing here imports torch or transformers, so
that it starts fast.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import struct
import sys
import traceback
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, BinaryIO, TypeAlias

from megatron_vppo.data.columns import NO_EXTRAS, RowExtras
from megatron_vppo.data.graders.weighted import BuiltInReward, load_graders, weighted_sum
from megatron_vppo.data.text_decoder import TextDecoder
from megatron_vppo.data.user_reward import Graded, UserReward, find_convention, grade, load_function, reads_extras
from megatron_vppo.system.processes import die_with_parent

_HEADER = struct.Struct("<Q")
_TOKEN = "i"  # array.array's 32 bits
_GRADER_MEMORY_BYTES = 4 << 30  # of the built-in grader: symbolic algebra on hostile answers can ask for any amount


@dataclass(frozen=True)
class Ungraded:
    """A response as the pool sends it."""

    token_ids: Sequence[int]
    ground_truth: str
    split: str
    row: int
    extras: bytes = b""
    """The row's `RowExtras` as bytes; none if the function does not read them."""


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
    """Sends responses to be graded. Extras go once for all responses that have the same."""
    extras = {data: number for number, data in enumerate(dict.fromkeys(one.extras for one in ungraded))}
    rows = [(len(one.token_ids), one.ground_truth, one.split, one.row, extras[one.extras]) for one in ungraded]
    data = json.dumps({"extras": [len(one) for one in extras], "responses": rows}).encode()
    tokens = [array(_TOKEN, one.token_ids).tobytes() for one in ungraded]
    stream.write(b"".join([_HEADER.pack(len(data)), data, *extras, *tokens]))
    stream.flush()


def read_request(stream: BinaryIO) -> list[Ungraded]:
    """Reads what `write_request` has sent. Raises EOFError if the other side is gone."""
    ungraded: list[Ungraded] = []
    request = read_message(stream)
    extras = [_read_whole(stream, size) for size in request["extras"]]
    for length, ground_truth, split, row, own in request["responses"]:
        token_ids = array(_TOKEN)
        token_ids.frombytes(_read_whole(stream, length * token_ids.itemsize))
        ungraded.append(Ungraded(token_ids.tolist(), ground_truth, split, row, extras[own]))
    return ungraded


@dataclass(frozen=True)
class ModuleReward:
    """A function of this project from a response and its ground truth to a result, which may have a 'vote'."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}:{self.name}"


AnyReward: TypeAlias = BuiltInReward | UserReward | ModuleReward
_KINDS: dict[str, type[AnyReward]] = {"built_in": BuiltInReward, "user": UserReward, "module": ModuleReward}


@dataclass(frozen=True)
class LoadedReward:
    """A reward function that is ready to be called."""

    grade: Callable[[Sequence[Graded]], list[dict[str, Any]]]
    """Returns 'overall', 'accuracy' and metrics for each response, and its 'vote' if there is one."""
    convention: str
    """The kind of function, for a person."""
    batch: bool
    """True if it is called with all responses of a request, and may compare them."""
    reads_extras: bool = False


def load_reward(reward: AnyReward) -> LoadedReward:
    """Loads graders of ours, or a function of the user's. Raises ValueError if it cannot be used."""
    match reward:
        case UserReward():
            function = load_function(reward)
            convention = find_convention(function, reward)
            return LoadedReward(
                partial(grade, function, convention, reward),
                str(convention),
                convention.batch,
                reads_extras(function, convention, reward),
            )
        case BuiltInReward():
            graders, weights, main = load_graders(reward), reward.weights, reward.main

            def one(response: str, ground_truth: str) -> dict[str, Any]:
                grades = {name: grader(response, ground_truth) for name, grader in graders.items()}
                return weighted_sum(grades, weights, main)

        case ModuleReward():
            one = getattr(importlib.import_module(reward.module), reward.name)
    resource.setrlimit(resource.RLIMIT_AS, (_GRADER_MEMORY_BYTES, _GRADER_MEMORY_BYTES))
    return LoadedReward(lambda graded: [one(r.response, r.ground_truth) for r in graded], "built-in", batch=False)


def reward_to_text(reward: AnyReward) -> str:
    """Returns what `reward_from_text` reads, for the command line of a worker."""
    kind = next(name for name, kind in _KINDS.items() if isinstance(reward, kind))
    return json.dumps({"kind": kind, **asdict(reward)})


def reward_from_text(text: str) -> AnyReward:
    """Reads what `reward_to_text` wrote."""
    fields = json.loads(text)
    return _KINDS[fields.pop("kind")](**fields)


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
    parent_pid, reward, tokenizer = int(sys.argv[1]), reward_from_text(sys.argv[2]), int(sys.argv[3])
    die_with_parent(parent_pid)
    decoder = TextDecoder(_description(tokenizer))
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # the function's output must not get between the messages,
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # and the function must not read them
    try:
        loaded = load_reward(reward)
    except ValueError as error:
        write_message(answers, {"fatal": str(error)})
        return
    write_message(
        answers, {"convention": loaded.convention, "batch": loaded.batch, "reads_extras": loaded.reads_extras}
    )
    while True:
        try:
            ungraded = read_request(requests)
        except EOFError:
            return
        try:
            texts = [decoder.decode(one.token_ids) for one in ungraded]
            responses = [
                Graded(text, len(one.token_ids), one.ground_truth, one.split, one.row, _extras_of(one))
                for text, one in zip(texts, ungraded, strict=True)
            ]
            write_message(answers, {"scores": loaded.grade(responses), "texts": texts})
        except BaseException as error:  # sys.exit() as well
            write_message(answers, _describe(error))


def _extras_of(one: Ungraded) -> RowExtras:
    return RowExtras.from_bytes(one.extras) if one.extras else NO_EXTRAS


def _description(descriptor: int) -> str:
    """Reads an open file from its beginning: all workers share the descriptor, and so its position."""
    try:
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode()
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    main()
