"""The weights of a Hugging Face folder, read part by part with plain reads.

Nothing is mapped into memory and nothing is executed: a safetensors file is a JSON header and raw bytes, and no other
kind of file is looked at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vppo.models.weight_map import Entry, Shape

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""What weights may be stored as, by safetensors' names."""
HEADER_BYTES = 100 << 20
"""More than any header has; a file that is no safetensors file begins with a number as good as random."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file. `x[a:b]`, `x[:, a:b]` and `x[:]` read the rows they need, as a tensor of their own."""

    path: Path
    name: str
    """In the file."""
    dtype: torch.dtype
    shape: Shape
    start: int
    """Byte of the file at which it begins."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, index: slice | tuple[slice, slice]) -> Tensor:
        rows, columns = index if isinstance(index, tuple) else (index, None)
        low, high, step = rows.indices(self.shape[0])
        assert step == 1
        block = self._read_rows(low, max(low, high))
        return block if columns is None else block[:, columns]

    def _read_rows(self, low: int, high: int) -> Tensor:
        block = torch.empty((high - low, *self.shape[1:]), dtype=self.dtype)
        if block.numel() == 0:
            return block
        target = raw_bytes(block)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start + low * (self.nbytes // self.shape[0]))
            done = 0
            while done < len(target):
                read = file.readinto(target[done:])
                if not read:
                    raise ValueError(f"{self.path} ends within {self.name}; download it again")
                done += read
        return block


class HfFolder:
    """Which tensors a folder holds and where: `model.safetensors`, or the shards that an index names."""

    def __init__(self, folder: Path, canonical_name: Callable[[str], str]) -> None:
        """
        Args:
            canonical_name: the released checkpoint's name of a tensor, from the one in the file.

        Raises:
            ValueError: files are missing or cut off, are no safetensors files, or do not hold what the index says.
        """
        self.folder = folder
        self._tensors: dict[str, LazyTensor] = {}
        index = folder / INDEX
        if index.is_file():
            tensors = _of_index(index)
        elif (folder / SINGLE).is_file():
            tensors = read_header(folder / SINGLE)
        else:
            raise ValueError(f"{folder} holds neither {SINGLE} nor {INDEX}; give a folder in Hugging Face's format")
        for tensor in tensors:
            name = canonical_name(tensor.name)
            if name in self._tensors:
                other = self._tensors[name]
                raise ValueError(f"{name} comes twice: {other.name} in {other.path} and {tensor.name} in {tensor.path}")
            self._tensors[name] = tensor

    def check_names(self, entries: Iterable[Entry], ignored: Collection[str]) -> None:
        """Raises ValueError unless the folder holds exactly the tensors of the model, those `ignored` aside."""
        known = {name for entry in entries for name in entry.hf_names}
        missing = sorted(known - self._tensors.keys())
        unknown = sorted(self._tensors.keys() - known - set(ignored))
        if missing:
            raise ValueError(f"{self.folder} lacks {len(missing)} tensors of the model, first {missing[:5]}")
        if unknown:
            files = sorted({self._tensors[name].path.name for name in unknown})
            raise ValueError(
                f"{self.folder} has {len(unknown)} tensors that the model does not know, first {unknown[:5]} in "
                f"{files}; does config.json belong to these weights?"
            )

    def tensors(self, entry: Entry) -> tuple[LazyTensor, ...]:
        """What makes one parameter, in the order that its kind takes.

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
    """The memory of a contiguous tensor on the CPU."""
    array: Any = tensor.view(torch.uint8).numpy()
    return memoryview(array).cast("B")


def has_hf_weights(folder: Path) -> bool:
    return (folder / INDEX).is_file() or (folder / SINGLE).is_file()


def read_header(path: Path) -> list[LazyTensor]:
    """The tensors of a safetensors file, in the order of their bytes.

    Raises:
        ValueError: not such a file, or one that was cut off, or a tensor of a kind that weights are not stored as.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(HEADER_BYTES, size - 8):
            raise ValueError(f"{path} is not a safetensors file, or was cut off; download it again")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path} is not a safetensors file: its header is no JSON") from error
    header.pop("__metadata__", None)
    tensors = [_described(path, name, described, data=8 + length) for name, described in header.items()]
    for tensor in tensors:
        if tensor.start + tensor.nbytes > size:
            raise ValueError(
                f"{path} has {size} bytes, {tensor.name} ends at {tensor.start + tensor.nbytes}; download it again"
            )
    return sorted(tensors, key=lambda tensor: tensor.start)


def _described(path: Path, name: str, described: dict[str, Any], *, data: int) -> LazyTensor:
    if described["dtype"] not in DTYPES:
        raise ValueError(
            f"{name} in {path} is stored as {described['dtype']}; weights must be one of {', '.join(DTYPES)}"
        )
    begin, end = described["data_offsets"]
    tensor = LazyTensor(path, name, DTYPES[described["dtype"]], tuple(described["shape"]), data + begin)
    if end - begin != tensor.nbytes:
        raise ValueError(f"{name} in {path} has {end - begin} bytes, its shape {tensor.shape} needs {tensor.nbytes}")
    return tensor


def _of_index(index: Path) -> list[LazyTensor]:
    """What the files named by an index hold, compared with what it says that they hold."""
    listed: dict[str, str] = json.loads(index.read_text())["weight_map"]
    files = {index.parent / file: None for file in listed.values()}
    absent = sorted(str(path) for path in files if not path.is_file())
    if absent:
        raise ValueError(f"{index} names files that are not there: {absent}; download them again")
    tensors = [tensor for path in files for tensor in read_header(path)]
    held = {(tensor.name, tensor.path.name) for tensor in tensors}
    lacking = sorted((name, file) for name, file in listed.items() if (name, file) not in held)
    if lacking:
        raise ValueError(f"{index} says that {lacking[0][0]} is in {lacking[0][1]}, which does not hold it")
    return tensors
