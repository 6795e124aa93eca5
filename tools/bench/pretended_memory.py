"""The counts and marks of pretend_device.py: what was counted, by which line, and where memory lies."""

from __future__ import annotations

import inspect
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

DEVICE = torch.device("cpu", 0)
HOST = torch.device("cpu")

BLOCKING_COPY = "blocking copy to the device"
TO_HOST = "copy to the host"


@dataclass(frozen=True)
class Moment:
    """The counts at a call of `Recorder.note`."""

    waits: int
    copies_to_device: int


@dataclass
class Tally:
    """Counts of what happened. A line is "file:number function", the innermost one of the sources that are watched."""

    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Times that the host waited for the device, by kind and line; blocking copies are among them."""
    bytes_to_device: Counter[str] = field(default_factory=Counter)
    copies_to_device: Counter[str] = field(default_factory=Counter)
    bytes_to_host: Counter[str] = field(default_factory=Counter)
    copies_to_host: Counter[str] = field(default_factory=Counter)
    """Copies by line, blocking or not."""
    kernels: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Operations on the device, views left out, by name and line."""
    host_operations: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Operations of torch on host memory, views included, by name and line."""
    moments: list[Moment] = field(default_factory=list)

    def waits_of(self, kind: str) -> int:
        return sum(times for (what, _), times in self.waits.items() if what == kind)


class Recorder:
    """Counts into `tally`, from any thread."""

    def __init__(self, *, sources: Sequence[str]) -> None:
        """
        Args:
            sources: the folders whose lines are named.
        """
        self.tally = Tally()
        self._sources = tuple(f"/{source}/" for source in sources)
        self._lock = threading.Lock()

    def restart(self) -> Tally:
        """Begins to count again from zero, and returns what was counted before."""
        done, self.tally = self.tally, Tally()
        return done

    def note(self) -> None:
        """Adds the counts so far to `Tally.moments`."""
        with self._lock:
            counts = (sum(self.tally.waits.values()), sum(self.tally.copies_to_device.values()))
            self.tally.moments.append(Moment(*counts))

    def wait(self, kind: str) -> None:
        with self._lock:
            self.tally.waits[kind, self._line()] += 1

    def copy_to_device(self, num_bytes: int, *, blocking: bool) -> None:
        line = self._line()
        with self._lock:
            self.tally.bytes_to_device[line] += num_bytes
            self.tally.copies_to_device[line] += 1
            if blocking:
                self.tally.waits[BLOCKING_COPY, line] += 1

    def copy_to_host(self, num_bytes: int, *, blocking: bool) -> None:
        line = self._line()
        with self._lock:
            self.tally.bytes_to_host[line] += num_bytes
            self.tally.copies_to_host[line] += 1
            if blocking:
                self.tally.waits[TO_HOST, line] += 1

    def operation(self, name: str, *, on_device: bool) -> None:
        with self._lock:
            counter = self.tally.kernels if on_device else self.tally.host_operations
            counter[name, self._line()] += 1

    def _line(self) -> str:
        frame = inspect.currentframe()
        while frame is not None:
            file = frame.f_code.co_filename
            for source in self._sources:
                if source in file:
                    return f"{file[file.rindex(source) + 1 :]}:{frame.f_lineno} {frame.f_code.co_name}"
            frame = frame.f_back
        return "elsewhere"


def on_device(tensor: Tensor) -> bool:
    """Returns True if the tensor lies on the pretended device."""
    return getattr(tensor.untyped_storage(), "pretended_on_device", False)


def is_pinned(tensor: Tensor) -> bool:
    """Returns True if the tensor lies in host memory that is pinned."""
    return getattr(tensor.untyped_storage(), "pretended_pinned", False)


def mark(tensor: Tensor, *, on_device: bool = False, pinned: bool = False) -> None:
    """Notes where the tensor's memory lies."""
    storage = tensor.untyped_storage()  # the same object for every view, as long as the memory lives
    storage.pretended_on_device, storage.pretended_pinned = on_device, pinned


def goes_straight(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Returns True if a copy to another memory needs no third one in between."""
    return dtype == tensor.dtype and tensor.is_contiguous()
