"""The process that writes the records of a step, or of a validation, while the run goes on.

It is a process, because making JSON holds the interpreter's lock. It takes one step at a time from its stdin, pickled,
and answers each on its stdout, with None or with the exception. It ends with the trainer, however that ends; a file
that it had not finished is then not there (system/whole.py).
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import traceback
from pathlib import Path
from typing import BinaryIO, TypeAlias, cast

from megatron_vppo.observability.step_records import StepRecords
from megatron_vppo.observability.validations import ValidationRecords
from megatron_vppo.system.processes import child_environment, die_with_parent

_MODULE = "megatron_vppo.observability.record_writer"
Records: TypeAlias = StepRecords | ValidationRecords


class RecordWriter:
    """Writes <run>/rollouts/step_N.jsonl.zst and <run>/validation/... in a process of its own, one file at a time."""

    def __init__(self, run_dir: Path) -> None:
        """Starts the process."""
        self._run_dir = run_dir.absolute()
        self._path: Path | None = None
        """The file that is being written."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", _MODULE, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**child_environment(), "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C in the terminal is for the trainer
        )
        self.pid = self._process.pid
        self._requests = cast(BinaryIO, self._process.stdin)
        self._answers = cast(BinaryIO, self._process.stdout)

    def write(self, step: int, records: Records) -> None:
        """Hands over the records of a step, once those that were handed over before are on the disk.

        Raises as `wait` does, about those before.
        """
        self.wait()
        self._path = records.files.path(self._run_dir, step)
        with contextlib.suppress(BrokenPipeError):  # it has ended; `wait` says so
            pickle.dump((self._run_dir, step, records), self._requests, protocol=5)
            self._requests.flush()

    def wait(self) -> None:
        """Returns when all records that were handed over are on the disk.

        Raises:
            OSError: a file could not be written; it has the file's name.
            RuntimeError: the process failed or was ended.
        """
        if self._path is None:
            return
        path, self._path = self._path, None
        try:
            error = pickle.load(self._answers)
        except EOFError:
            error = RuntimeError(
                f"{path} was not written: its process ended (exit code "
                f"{self._process.wait()}); -9 often means that the host ran out of memory"
            )
        if error is not None:
            raise error

    def close(self) -> None:
        """Waits for the records and ends the process; harmless when repeated. Raises as `wait` does."""
        try:
            self.wait()
        finally:
            self._process.kill()
            self._process.wait()
            for pipe in (self._requests, self._answers):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def main() -> None:
    """Runs the process: writes what comes until the trainer closes the pipe."""
    die_with_parent(int(sys.argv[1]))
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that is printed gets between the answers
    while True:
        try:
            run_dir, step, records = pickle.load(requests)
        except EOFError:
            return
        pickle.dump(_failure(run_dir, step, records), answers)
        answers.flush()
        del records


def _failure(run_dir: Path, step: int, records: Records) -> Exception | None:
    """Writes the records of a step. Returns the error, as it can be sent to the trainer."""
    try:
        records.write(run_dir, step)
    except OSError as error:
        return error
    except Exception:
        return RuntimeError(f"{records.files.path(run_dir, step)} was not written:\n{traceback.format_exc()}")
    return None


if __name__ == "__main__":
    main()
