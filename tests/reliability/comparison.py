"""The comparison of a disturbed run with an undisturbed one."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.proofs.runs import exported
from tests.reliability.settings import last_step, numbers_of


def differing_numbers(run: Path, expected: Path) -> list[str]:
    """Lists what differs in two runs: exported weights, metrics but times, records."""
    found, step = [], last_step(expected)
    here, there = exported(run, step), exported(expected, step)
    names = [name for name in there if name not in here or not torch.equal(here[name], there[name])]
    if names or here.keys() != there.keys():
        found.append(f"{len(names)} of {len(there)} weights differ, {names[:1]}")
    if numbers_of(run) != numbers_of(expected):
        found.append("metrics differ, or steps have no line or two")
    for record in sorted((expected / "rollouts").iterdir()):
        path = run / "rollouts" / record.name
        if not path.is_file() or path.read_bytes() != record.read_bytes():
            found.append(f"{record.name} differs")
    return found
