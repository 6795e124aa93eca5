"""The text of an error for the user, and which errors are theirs to mend."""

from __future__ import annotations

import errno
import io
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_vppo.cli.errors import error_text, is_mistake, show


@pytest.mark.parametrize(
    "error, mistake, text",
    [
        (ValueError("rollout.n=3: too few"), True, "rollout.n=3: too few"),
        (ValueError(), True, "ValueError"),
        (RuntimeError("the rollout engine ended"), False, "the rollout engine ended"),
        (torch.OutOfMemoryError("CUDA out of memory."), False, "OutOfMemoryError: CUDA out of memory."),
        (KeyError("mrope_section"), False, "KeyError: 'mrope_section'"),
        (MemoryError(), False, "MemoryError"),
        (KeyboardInterrupt(), False, "KeyboardInterrupt"),
        (FileNotFoundError("no configuration file x"), True, "no configuration file x"),
        (OSError(errno.ENOSPC, "No space left on device"), True, "No space left on device"),
        (OSError(errno.ENOSPC, "No space left on device", "/full/x"), True, "/full/x: No space left on device"),
        (OSError("Can't load tokenizer for 'x'"), True, "Can't load tokenizer for 'x'"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), False, "Broken pipe"),
        (TimeoutError("too late"), False, "TimeoutError: too late"),
    ],
)
def test_text_of_an_error(error: BaseException, mistake: bool, text: str) -> None:
    assert (is_mistake(error), error_text(error)) == (mistake, text)


class Wordless(ValueError):
    """An exception that cannot say what it is, such as one whose attributes were never set."""

    def __str__(self) -> str:
        raise AttributeError("text")


class Mute(Exception):
    def __str__(self) -> str:
        return None  # type: ignore[return-value]


@pytest.mark.parametrize("error", [Wordless(), Mute(), RuntimeError(Wordless())])
def test_an_error_whose_text_cannot_be_made_has_its_type(error: Exception) -> None:
    assert error_text(error) == type(error).__name__


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught:
        tmp_path.read_text()
    assert is_mistake(caught.value) and error_text(caught.value) == f"{tmp_path}: Is a directory"


def test_frames_of_native_code_are_left_to_the_log() -> None:
    """A message of NCCL's process group, which quotes one of the store with its C++ frames."""
    message = (
        "[1] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d key-value store by key '0', "
        "but store->get('0') got error: Connection reset by peer"
    )
    frames = (
        "Exception raised from recvBytes at ../torch/csrc/distributed/c10d/Utils.hpp:670 (most recent call first):\n"
        "frame #0: c10::Error::Error(c10::SourceLocation, std::string) + 0x57 (0x7f in libc10.so)\n"
    )
    assert error_text(dist.DistBackendError(f"{message}\n{frames}")) == f"DistBackendError: {message}"


def test_a_message_takes_the_place_of_a_live_line() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, file = Terminal(), io.StringIO()
    show("gone", terminal)
    show("gone", file)
    assert terminal.getvalue() == "\r\x1b[Kvppo: gone\n"
    assert file.getvalue() == "vppo: gone\n"
