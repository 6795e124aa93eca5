"""Torch's class of causal masks, usable where operations are counted.

`causal_lower_right` makes a tensor of a class of its own, which fails within a dispatch mode.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

from torch.nn.attention.bias import CausalBias
from torch.utils._python_dispatch import _disable_current_modes


def made_outside_of_modes() -> AbstractContextManager[Any]:
    """Lets causal masks be made within dispatch modes, which do not see it."""
    make = CausalBias.__new__

    def outside(cls: type[CausalBias], *shape: Any) -> CausalBias:
        with _disable_current_modes():
            return make(cls, *shape)

    return patch.object(CausalBias, "__new__", outside)
