"""Lets `import torchvision` succeed with a torch build that torchvision's compiled operators were not made for.

Why: vLLM's and transformers' Qwen-VL code needs torchvision's transforms, which are plain Python, and never its
compiled operators. The public wheels of torchvision are CUDA builds, whose `_C` library does not load with a CPU torch.
torchvision itself tolerates that, except in two modules. They register kernels for operators that are then missing, and
so make the whole import fail.

What: a finder that gives those two modules an empty body, if torchvision has just found that its `_C` does not load.
torchvision's `__init__` finds that out in `torchvision.extension`, which it imports before either of them. If `_C`
loads, the finder does nothing.

Where: install.sh copies this file into site-packages with a `.pth` file that imports it, and only where it is needed.
A `.pth` file is read by every interpreter of the environment, vLLM's child processes included; a vLLM plugin would
come too late. It imports nothing that a starting interpreter has not loaded already.

Versions: tried with torchvision 0.28 (torch 2.13); the two module names are those of 0.28.
"""

import sys
from importlib.machinery import ModuleSpec

REGISTRATION_MODULES = ("torchvision._autograd_registrations", "torchvision._meta_registrations")


class EmptyRegistrations:
    """Finder and loader in one, for `sys.meta_path`."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in REGISTRATION_MODULES:
            return None
        extension = sys.modules.get("torchvision.extension")
        if extension is None or extension._has_ops():
            return None
        return ModuleSpec(name, EmptyRegistrations, origin=f"empty: torchvision's _C does not load ({__file__})")

    @staticmethod
    def create_module(spec):
        return None  # an ordinary module object

    @staticmethod
    def exec_module(module):
        """Registers nothing: there are no compiled operators to register kernels for."""


sys.meta_path.insert(0, EmptyRegistrations)
