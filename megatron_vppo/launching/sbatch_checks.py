"""Checks of what a user gives for a batch script: options of sbatch, and the seeds of a job array."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence

from megatron_vppo.config.ranges import LARGEST_INT


def check_options(options: Sequence[str]) -> None:
    """Refuses a further option that is none, and one that says again, or against it, what the script says itself."""
    for option in options:
        if not re.fullmatch(r"--?[A-Za-z].*", option):
            raise ValueError(f"--sbatch '{option}' is no option of sbatch; write it as in '--sbatch=--qos=high'")
        for name in _names_in(option):
            if name.startswith("--container"):
                raise ValueError(
                    f"--sbatch '{option}' would start the batch script itself in a container; set --container, which "
                    "is for the ranks"
                )
            if name in _SET_BY:
                raise ValueError(f"--sbatch '{option}' is set by {_SET_BY[name]}; set that one")


_SET_BY = {
    "--nodes": "--nodes", "-N": "--nodes", "--time": "--time", "-t": "--time", "--array": "--array-seeds",
    "-a": "--array-seeds", "--signal": "--grace-seconds", "--ntasks-per-node": "--gpus-per-node",
    "--gpus-per-node": "--gpus-per-node",
}  # fmt: skip
"""The options of sbatch that the script has, and those of `vppo slurm` by which."""


def _names_in(option: str) -> Iterator[str]:
    """Yields the names of a line of options: `-N` of `-N4`, and both of `--qos=high --nodes 3`."""
    try:
        words = shlex.split(option)
    except ValueError as error:
        raise ValueError(f"--sbatch '{option}' cannot be read: {error}") from error
    for word in words:
        if word.startswith("-"):
            yield word.partition("=")[0] if word.startswith("--") else word[:2]


def check_seeds(seeds: str, overrides: Sequence[str]) -> None:
    """Refuses an array that sbatch would not take, and settings that each run of an array has of its own."""
    one = r"\d+(-\d+(:[1-9]\d*)?)?"
    if not re.fullmatch(rf"{one}(,{one})*(%[1-9]\d*)?", seeds, flags=re.ASCII):
        raise ValueError(f"--array-seeds '{seeds}' is no list of seeds; write 1-3, or 1,5,9, or 1-9%2 for two at once")
    if max(int(number) for number in re.findall(r"\d+", seeds)) > LARGEST_INT:
        raise ValueError(f"--array-seeds '{seeds}' has a seed of more than {LARGEST_INT}; take smaller ones")
    if backwards := [span for span in re.findall(r"(\d+)-(\d+)", seeds) if int(span[0]) > int(span[1])]:
        raise ValueError(f"--array-seeds '{seeds}': {'-'.join(backwards[0])} runs backwards; write the smaller first")
    for override in overrides:
        if override.startswith("trainer.seed="):
            raise ValueError(f"--array-seeds {seeds} gives each run its trainer.seed; leave out '{override}'")
