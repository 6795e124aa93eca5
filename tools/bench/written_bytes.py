"""A count of the bytes that torch's operations write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_vppo.rollout.transfer.scattered import Scattered

_WRITES_NOTHING = {"empty", "empty_like", "new_empty", "empty_strided", "detach", "_unsafe_view"}


class WrittenBytes(TorchDispatchMode):
    """Counts the bytes of every result that is no view and has memory.

    A copy of a tensor onto itself is left out: torch returns at once, whatever the device (`copy_impl` in
    aten/src/ATen/native/Copy.cpp). vLLM copies biases so at the end of a layer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.filled_bytes = 0
        """Those of them that `fill_` sets to one number."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in _WRITES_NOTHING and not (name == "copy_" and _is_onto_itself(*args[:2])):
            made = [leaf for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]
            written = sum(leaf.nbytes for leaf in made if not (leaf.is_meta or isinstance(leaf, Scattered)))
            self.bytes += written
            self.filled_bytes += written * (name == "fill_")
        return results


def _is_onto_itself(target: Tensor, source: Tensor) -> bool:
    """Returns True for two views of the same memory with the same sizes, strides and dtype."""
    if target.is_meta or isinstance(source, Scattered):
        return False
    first, second = (
        (one.untyped_storage().data_ptr(), one.storage_offset(), one.shape, one.stride(), one.dtype)
        for one in (target, source)
    )
    return first == second
