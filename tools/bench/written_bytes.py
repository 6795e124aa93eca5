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
    """Counts the bytes of every result that is no view and has memory."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket.__name__ not in _WRITES_NOTHING:
            made = [leaf for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]
            self.bytes += sum(leaf.nbytes for leaf in made if not (leaf.is_meta or isinstance(leaf, Scattered)))
        return results
