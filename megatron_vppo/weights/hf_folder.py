"""The safetensors files of a Hugging Face folder, read and written by rows.

Nothing is mapped into memory and nothing is executed: a safetensors file is a JSON header and raw bytes, and files of
other kinds are not opened.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vppo.weights.entries import Entry
from megatron_vppo.weights.finite import cast_weights, check_finite
from megatron_vppo.weights.kinds import Shape

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""The dtypes that weights may be stored in, by safetensors' names."""
COMPARED_BYTES = 16 << 20
"""The bytes of a tensor that are compared at a time."""
_COMPUTED = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")
"""The ends of names that older versions of transformers saved. Newer ones, vLLM and we compute what they held."""
_LFS_POINTER = b"version https://git-lfs.github.com"
HEADER_BYTES = 100 << 20
"""More than any header has. A file of another format begins with a number that is as good as random."""


@dataclass(frozen=True)
class FileTensor:
    """A tensor in a safetensors file. `x[a:b]`, `x[:, a:b]` and `x[:]` read the rows they need, as a new tensor.

    Raises ValueError if the file ends too early, or if what is read holds NaN or infinity.
    """

    path: Path
    name: str
    """The name in the file."""
    dtype: torch.dtype
    shape: Shape
    start: int
    """The byte of the file at which it begins."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def row_ranges(self, num_bytes: int, low: int = 0, high: int | None = None) -> Iterator[tuple[int, int]]:
        """Divides the rows `low` to `high` (None: all) into ranges of at most `num_bytes`, or of one row."""
        high = self.shape[0] if high is None else high
        step = max(1, num_bytes * self.shape[0] // max(1, self.nbytes))
        for row in range(low, high, step):
            yield row, min(row + step, high)

    def write_rows(self, row: int, values: Tensor) -> None:
        """Writes rows from `row` on, cast to the tensor's dtype. The file is as long as it will be."""
        data = raw_bytes(cast_weights(values, self.dtype, name=self.name).contiguous())
        at = self.start + row * self._row_bytes
        descriptor = os.open(self.path, os.O_WRONLY)
        try:
            while data:
                written = os.pwrite(descriptor, data, at)
                data, at = data[written:], at + written
        finally:
            os.close(descriptor)

    def __getitem__(self, index: slice | tuple[slice, slice]) -> Tensor:
        rows, columns = index if isinstance(index, tuple) else (index, None)
        low, high, step = rows.indices(self.shape[0])
        assert step == 1
        block = self._read_rows(low, max(low, high))
        return block if columns is None else block[:, columns]

    @property
    def _row_bytes(self) -> int:
        return self.nbytes // self.shape[0]

    def _read_rows(self, low: int, high: int) -> Tensor:
        block = torch.empty((high - low, *self.shape[1:]), dtype=self.dtype)
        if block.numel() == 0:
            return block
        target = raw_bytes(block)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start + low * self._row_bytes)
            done = 0
            while done < len(target):
                read = file.readinto(target[done:])
                if not read:
                    raise ValueError(f"{self.path} ends within {self.name}; download it again")
                done += read
        check_finite(block, name=self.name, where=self.path)
        return block


class HfFolder:
    """The tensors of a folder: those of `model.safetensors`, or of the files that an index names."""

    def __init__(self, folder: Path, to_released_name: Callable[[str], str]) -> None:
        """
        Args:
            to_released_name: translates the name of a tensor in a file to that of the released checkpoint.

        Raises:
            ValueError: files are missing or cut off, are not safetensors files, or do not hold what the index says; or
                there are two sets of weights.
        """
        self.folder = folder
        self._tensors: dict[str, FileTensor] = {}
        index = folder / INDEX
        if index.is_file():
            tensors = _read_index(index)
            if (folder / SINGLE).is_file() and all(tensor.path != folder / SINGLE for tensor in tensors):
                raise ValueError(
                    f"{folder} holds both {SINGLE} and {INDEX}, which names other files: transformers reads the first "
                    "and vLLM the second; remove one"
                )
        elif (folder / SINGLE).is_file():
            tensors = read_header(folder / SINGLE)
        else:
            raise ValueError(f"{folder} holds neither {SINGLE} nor {INDEX}; give a folder in Hugging Face's format")
        for tensor in tensors:
            if tensor.name.endswith(_COMPUTED):
                continue
            name = to_released_name(tensor.name)
            if name in self._tensors:
                other = self._tensors[name]
                raise ValueError(f"{name} comes twice: {other.name} in {other.path} and {tensor.name} in {tensor.path}")
            self._tensors[name] = tensor

    def check(self, entries: Iterable[Entry], copies: Mapping[str, str]) -> tuple[str, ...]:
        """Checks that the folder holds exactly the tensors of the model, and perhaps copies of some, with equal values.

        Args and Returns: see `check_names`.

        Raises:
            ValueError: tensors are missing or unknown, or a copy has other values than its original.
        """
        stored = self.check_names(entries, copies)
        for name in stored:
            self._check_copy(self._tensors[name], self._tensors[copies[name]])
        return stored

    def check_names(self, entries: Iterable[Entry], copies: Mapping[str, str]) -> tuple[str, ...]:
        """Checks the names of the tensors, without reading any.

        Args:
            copies: the tensors that the model takes from another one: their names, each with that one's name.

        Returns:
            The names of the copies that the folder holds.

        Raises:
            ValueError: tensors are missing or unknown.
        """
        known = {name for entry in entries for name in entry.hf_names}
        missing = sorted(known - self._tensors.keys())
        unknown = sorted(self._tensors.keys() - known - copies.keys())
        files = sorted({self._tensors[name].path.name for name in unknown})
        config = f"does {self.folder / 'config.json'} belong to these weights?"
        if missing and unknown:
            raise ValueError(
                f"{self.folder} does not hold the model's weights: {len(missing)} tensors are missing, first "
                f"{missing[0]}, and {len(unknown)} are not the model's, first {unknown[0]} in "
                f"{self._tensors[unknown[0]].path.name}; {config}"
            )
        if missing:
            raise ValueError(f"{self.folder} lacks {len(missing)} tensors of the model, first {missing[:5]}; {config}")
        if unknown:
            raise ValueError(
                f"{self.folder} has {len(unknown)} tensors that the model does not know, first {unknown[:5]} in "
                f"{files}; {config}"
            )
        return tuple(name for name in copies if name in self._tensors)

    @staticmethod
    def _check_copy(copy: FileTensor, original: FileTensor) -> None:
        if copy.shape != original.shape or any(
            not torch.equal(copy[low:high], original[low:high].to(copy.dtype))
            for low, high in original.row_ranges(COMPARED_BYTES)
        ):
            raise ValueError(
                f"{copy.name} in {copy.path} differs from {original.name}, which config.json ties it to; set "
                "tie_word_embeddings to false there, or remove the tensor"
            )

    def tensors(self, entry: Entry) -> tuple[FileTensor, ...]:
        """Returns the tensors that make one parameter, in the order that its kind takes.

        Raises:
            ValueError: a tensor has another shape than the configuration says.
        """
        found = tuple(self._tensors[name] for name in entry.hf_names)
        for tensor, shape in zip(found, entry.kind.hf_shapes(), strict=True):
            if tensor.shape != shape:
                raise ValueError(
                    f"{tensor.name} in {tensor.path} has shape {tensor.shape}, the configuration says {shape}"
                )
        return found


def raw_bytes(tensor: Tensor) -> memoryview:
    """Gives access to the memory of a contiguous tensor on the CPU."""
    array: Any = tensor.view(torch.uint8).numpy()
    return memoryview(array).cast("B")


def how_to_mend(path: Path) -> str:
    """Says what helps against a file that is not what its name says."""
    with path.open("rb") as file:
        is_pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
    return "it is a pointer of Git LFS: run `git lfs pull` in the folder" if is_pointer else "download it again"


def has_hf_weights(folder: Path) -> bool:
    """Returns True if the folder holds safetensors files that transformers would load."""
    return (folder / INDEX).is_file() or (folder / SINGLE).is_file()


def shard_name(number: int, count: int) -> str:
    """Names one of `count` files, from 1 on, as loaders expect it; one alone is `model.safetensors`."""
    return SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, files: Mapping[str, str], *, total_bytes: int) -> None:
    """Writes the index of a folder of several files.

    Args:
        files: the name of each tensor's file.
    """
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(files)}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def read_header(path: Path) -> list[FileTensor]:
    """Reads the names, dtypes, shapes and positions of a safetensors file, in the order of the bytes.

    Raises:
        ValueError: it is not such a file, or was cut off, or holds a dtype that weights are not stored in.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(HEADER_BYTES, size - 8):
            raise ValueError(f"{path} is not a safetensors file, or was cut off; {how_to_mend(path)}")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a safetensors file: its header is not JSON") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} is not a safetensors file: its header is not a table of tensors")
    header.pop("__metadata__", None)
    tensors = [_described(path, name, described, data=8 + length) for name, described in header.items()]
    for tensor in tensors:
        if tensor.start + tensor.nbytes > size:
            raise ValueError(
                f"{path} has {size} bytes, {tensor.name} ends at {tensor.start + tensor.nbytes}; download it again"
            )
    return sorted(tensors, key=lambda tensor: tensor.start)


def _described(path: Path, name: str, described: Any, *, data: int) -> FileTensor:
    match described:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise ValueError(f"{path} is damaged: it describes {name} as {described}; download it again")
    if dtype not in DTYPES:
        raise ValueError(f"{name} in {path} is stored as {dtype}; weights must be one of {', '.join(DTYPES)}")
    if begin < 0 or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"{path} is damaged: it describes {name} as {described}; download it again")
    tensor = FileTensor(path, name, DTYPES[dtype], tuple(shape), data + begin)
    if end - begin != tensor.nbytes:
        raise ValueError(f"{name} in {path} has {end - begin} bytes, its shape {tensor.shape} needs {tensor.nbytes}")
    return tensor


def _read_index(index: Path) -> list[FileTensor]:
    """Reads the headers of all files that an index names, and checks that they hold what it says."""
    try:
        described = json.loads(index.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{index} is not JSON ({error}); download it again") from error
    listed = described.get("weight_map") if isinstance(described, dict) else None
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise ValueError(f"{index} has no weight_map that gives each tensor's file; download it again")
    files = {index.parent / file: None for file in listed.values()}
    absent = sorted(str(path) for path in files if not path.is_file())
    if absent:
        raise ValueError(f"{index} names files that are not there: {absent}; download them again")
    tensors = [tensor for path in files for tensor in read_header(path)]
    held = {(tensor.name, tensor.path) for tensor in tensors}
    lacking = sorted((name, file) for name, file in listed.items() if (name, index.parent / file) not in held)
    if lacking:
        raise ValueError(f"{index} says that {lacking[0][0]} is in {lacking[0][1]}, which does not hold it")
    return tensors
