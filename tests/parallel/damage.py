"""Ways to damage a saved checkpoint, each with what has to be said about it.

Files are cut, emptied and written over as a full disk, a lost machine or a copy that broke off would leave them. What
may be written where is taken from the files themselves, with `pickle` and `json` alone.
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import Metadata

from megatron_vppo.parallel.checkpoint import save_checkpoint
from megatron_vppo.parallel.layout import Layout
from megatron_vppo.parallel.policy import MegatronPolicy
from tests.parallel.policy_rig import make_batch, make_responses

Spoil = Callable[[Path], object]
"""A function that damages a folder `global_step_N`."""

NORM = "language.decoder.final_layernorm.weight"
RNG = "rng/shard_0_1"
MOMENT = f"optimizer.state.exp_avg_sq.{NORM}"
MAIN = f"optimizer.state.fp32_param.{NORM}"


def largest(source: Path) -> Path:
    return max((source / "dist_ckpt").glob("*.distcp"), key=lambda path: path.stat().st_size)


def overwrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def in_dist_ckpt(name: str, change: Callable[[bytes], bytes]) -> Spoil:
    return lambda source: overwrite(source / "dist_ckpt" / name, change)


def in_largest(change: Callable[[bytes], bytes]) -> Spoil:
    return lambda source: overwrite(largest(source), change)


def without(name: str) -> Spoil:
    return lambda source: (source / name).unlink()


def folder_instead_of_largest(source: Path) -> None:
    path = largest(source)
    path.unlink()
    path.mkdir()


def state(text: bytes) -> Spoil:
    return lambda source: (source / "trainer_state.json").write_bytes(text)


def state_with(**changes: object) -> Spoil:
    """Changes fields of the state; `...` leaves one out."""

    def spoil(source: Path) -> None:
        path = source / "trainer_state.json"
        changed = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({name: value for name, value in changed.items() if value is not ...}))

    return spoil


def data_with(**changes: object) -> Spoil:
    """Changes fields of the place in the data; `...` leaves one out."""

    def spoil(source: Path) -> None:
        data = {**json.loads((source / "trainer_state.json").read_text())["data"], **changes}
        state_with(data={name: value for name, value in data.items() if value is not ...})(source)

    return spoil


def saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def description(source: Path) -> Metadata:
    found: Metadata = pickle.loads((source / "dist_ckpt" / ".metadata").read_bytes())
    return found


def description_with(change: Callable[[Metadata], object]) -> Spoil:
    def spoil(source: Path) -> None:
        metadata = description(source)
        change(metadata)
        (source / "dist_ckpt" / ".metadata").write_bytes(pickle.dumps(metadata))

    return spoil


def lose_the_place(metadata: Metadata) -> None:
    del metadata.storage_data[next(index for index in metadata.storage_data if index.fqn == NORM)]


def lose_the_pieces(metadata: Metadata) -> None:
    stored: Any = metadata.state_dict_metadata[NORM]
    stored.chunks.clear()


def in_record(key: str, change: Callable[[bytes], bytes], *, which: int = 0) -> Spoil:
    """Changes one of the records of a key, without changing its length."""

    def spoil(source: Path) -> None:
        places = description(source).storage_data
        found = [index for index in places if index.fqn == key]
        info = places[found[which]]
        end = info.offset + info.length

        def rewrite(data: bytes) -> bytes:
            record = change(data[info.offset : end])
            assert len(record) == info.length
            return data[: info.offset] + record + data[end:]

        overwrite(source / "dist_ckpt" / info.relative_path, rewrite)

    return spoil


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def flip_a_value(record: bytes) -> bytes:
    """Changes a bit of a tensor's first value."""
    values = torch.load(io.BytesIO(record), weights_only=True).view(torch.uint8).numpy().tobytes()
    return flip(record, record.index(values))


def with_value(value: float, key: str, *, which: int = 0) -> Spoil:
    """Stores a record again whose first value is another: whole, with the right checksums."""

    def change(record: bytes) -> bytes:
        tensor = torch.load(io.BytesIO(record), weights_only=True)
        tensor.view(-1)[0] = value
        return saved(tensor)

    return in_record(key, change, which=which)


FILES: dict[str, tuple[Spoil, str]] = {
    "empty": (in_largest(lambda data: b""), r"__0_\d\.distcp has 0 bytes instead of \d+; the checkpoint is incomplete"),
    "cut": (in_largest(lambda data: data[:-1]), r"__0_\d\.distcp has \d+ bytes instead of \d+; the checkpoint is inc"),
    "missing": (lambda source: largest(source).unlink(), r"__0_\d\.distcp is missing; the checkpoint is incomplete"),
    "a folder": (folder_instead_of_largest, r"__0_\d\.distcp cannot be read: Is a directory"),
    "zeros at its end": (
        in_largest(lambda data: data[:-2000] + bytes(2000)),
        r"\S+ in \S+__0_\d\.distcp cannot be read",
    ),
    "zeros": (in_largest(lambda data: bytes(len(data))), r"\S+ in \S+__0_\d\.distcp cannot be read: File is not a zip"),
    "zeros at its beginning": (in_largest(lambda data: bytes(400) + data[400:]), r"\S+ in \S+__0_\d\.distcp cannot be"),
    "generators": (
        in_record(RNG, lambda record: flip(record, len(record) // 2)),
        rf"{RNG} in \S+__0_\d\.distcp cannot be read: Bad CRC-32",
    ),
    "a weight": (in_record(NORM, flip_a_value), rf"{NORM} in \S+__0_\d\.distcp cannot be read: Bad CRC-32"),
    "a moment": (in_record(MOMENT, flip_a_value), rf"{MOMENT} in \S+__0_\d\.distcp cannot be read: Bad CRC-32"),
}
"""Files of tensors, by what was done to them."""

DESCRIPTIONS: dict[str, tuple[Spoil, str]] = {
    ".metadata missing": (without("dist_ckpt/.metadata"), r"dist_ckpt lacks \.metadata: the checkpoint is incomplete"),
    ".metadata empty": (in_dist_ckpt(".metadata", lambda data: b""), r"\.metadata is not the description .*Ran out of"),
    ".metadata cut": (
        in_dist_ckpt(".metadata", lambda data: data[:-999]),
        r"\.metadata is not the description of",
    ),
    ".metadata garbage": (in_dist_ckpt(".metadata", lambda data: b"\x80what"), r"\.metadata is not the description of"),
    ".metadata another pickle": (
        in_dist_ckpt(".metadata", lambda data: pickle.dumps({"a": 1})),
        r"\.metadata is not the description of a checkpoint",
    ),
    ".metadata without a place": (
        description_with(lose_the_place),
        rf"\.metadata is damaged: it does not say where {NORM} is",
    ),
    ".metadata without pieces": (
        description_with(lose_the_pieces),
        rf"\.metadata is damaged: it has 0 of the 64 values of {NORM}",
    ),
    "metadata.json missing": (without("dist_ckpt/metadata.json"), r"dist_ckpt lacks metadata\.json: it is not a dist"),
    "metadata.json empty": (in_dist_ckpt("metadata.json", lambda data: b""), r"metadata\.json is not that of a distr"),
    "metadata.json garbage": (in_dist_ckpt("metadata.json", lambda data: b"\xff{"), r"metadata\.json is not that of a"),
    "metadata.json deep": (
        in_dist_ckpt("metadata.json", lambda data: b"[" * 100_000),
        r"metadata\.json is not that of",
    ),
    "metadata.json strange": (
        in_dist_ckpt("metadata.json", lambda data: data.replace(b"common_backend_version", b"common_bbckend_version")),
        r"metadata\.json is not that of a distributed checkpoint",
    ),
    "common.pt missing": (without("dist_ckpt/common.pt"), r"common\.pt is missing; the checkpoint is incomplete"),
    "common.pt empty": (in_dist_ckpt("common.pt", lambda data: b""), r"common\.pt is damaged: EOFError"),
    "common.pt garbage": (
        in_dist_ckpt("common.pt", lambda data: b"garbage"),
        r"common\.pt is damaged: Unpickl",
    ),
    "common.pt a list": (in_dist_ckpt("common.pt", lambda data: saved([1])), r"common\.pt holds list, not a table"),
    "dist_ckpt missing": (lambda source: shutil.rmtree(source / "dist_ckpt"), r"dist_ckpt lacks metadata\.json"),
}
"""Files that describe those of tensors."""

STATES: dict[str, tuple[Spoil, str]] = {
    "missing": (without("trainer_state.json"), r"trainer_state\.json is missing; the checkpoint is incomplete"),
    "empty": (state(b""), r"trainer_state\.json is not JSON \(Expecting value"),
    "a brace": (state(b"{"), r"trainer_state\.json is not JSON \(Expecting property name"),
    "bytes": (state(b"\xff\x00"), r"trainer_state\.json is not JSON \("),
    "deep": (state(b"[" * 100_000), r"trainer_state\.json is not JSON \("),
    "a list": (state(b"[]"), r"trainer_state\.json is damaged: it holds list, not a JSON object"),
    "no step": (state_with(step=...), r"trainer_state\.json is damaged: it lacks step"),
    "another step": (state_with(step=11), r"trainer_state\.json is that of step 11, its folder that of step 4"),
    "a step in words": (state_with(step="4"), r"trainer_state\.json is damaged: it has step='4': Input should be a va"),
    "no size": (state_with(tensor_model_parallel_size=...), r"json is damaged: it lacks tensor_model_parallel_size"),
    "a size in words": (
        state_with(tensor_model_parallel_size="1"),
        r"json is damaged: it has tensor_model_parallel_size='1': Input should be a valid integer",
    ),
    "layers in words": (
        state_with(pipeline_layers=["3"]),
        r"json is damaged: it has pipeline_layers\.0='3': Input should be a valid integer",
    ),
    "no backend": (state_with(backend=...), r"trainer_state\.json is damaged: it lacks backend"),
    "another form": (
        state_with(optimizer="?"),
        r"json is damaged: it has optimizer='\?': Input should be 'by par",
    ),
    "half an update": (
        state_with(optimizer_updates=0.5),
        r"json is damaged: it has optimizer_updates=0\.5: Input should",
    ),
    "from nowhere": (
        state_with(started_from=3),
        r"json is damaged: it has started_from=3: Input should be a valid",
    ),
}
"""trainer_state.json."""

POSITIONS: dict[str, tuple[Spoil, str]] = {
    "no place": (
        state_with(data=...),
        r"trainer_state\.json is damaged: 'data' in it holds NoneType, not a JSON object",
    ),
    "no epoch": (data_with(epoch=...), r"trainer_state\.json is damaged: 'data' in it lacks epoch"),
    "a negative offset": (
        data_with(offset=-1),
        r"json is damaged: 'data' in it has offset=-1: Input should be gr",
    ),
    "a seed in words": (data_with(seed="1"), r"json is damaged: 'data' in it has seed='1': Input should be a valid"),
    "shuffled by 1": (data_with(shuffle=1), r"json is damaged: 'data' in it has shuffle=1: Input should be a valid bo"),
}
"""The place in the data, in trainer_state.json."""

STEPS = (2, 4)
"""The steps that `save_run` saves."""
PLACE = {"epoch": 0, "offset": 8, "seed": 1, "shuffle": True, "num_prompts": 9}
"""The place in the data that `save_run` saves."""


def save_run(checkpoints: Path, policy: MegatronPolicy, layout: Layout) -> None:
    """Saves the checkpoints of a run. The optimizer has moments, and the fp32 weights of its own if it keeps any."""
    policy.update(make_batch(make_responses(), "nll"))
    for step in STEPS:
        save_checkpoint(
            checkpoints, step=step, trainable=policy.trainable, layout=layout, state={"data": PLACE}, keep=2
        )
