"""Shares of context-parallel ranks, and the padding that makes sequences divide."""

from __future__ import annotations

import pytest
import torch

from megatron_vppo.models.layers.context_parallel import padded_packing, tokens_of_rank
from megatron_vppo.models.layers.packing import Packing


def test_context_parallel_shares_are_balanced() -> None:
    lengths = (16, 64, 8)
    shares = [tokens_of_rank(Packing(lengths), rank=rank, size=4) for rank in range(4)]
    assert torch.cat(shares).sort().values.tolist() == list(range(88))
    starts = torch.tensor([0] * 16 + [16] * 64 + [80] * 8)
    keys_met = {int((share - starts[share] + 1).sum()) for share in shares}
    assert len(keys_met) == 1
    with pytest.raises(ValueError, match="multiples of 8"):
        tokens_of_rank(Packing((16, 12)), rank=0, size=4)


@pytest.mark.parametrize("tensor, context", [(1, 1), (4, 1), (1, 2), (8, 2), (3, 4)])
@pytest.mark.parametrize("alignment", [16, 128])
def test_padding_for_fp8(tensor: int, context: int, alignment: int) -> None:
    lengths = [7, 16, 1, 30]
    packing = padded_packing(lengths, tensor=tensor, context=context, alignment=alignment)
    padded = packing.lengths
    assert packing.ends_in_filler == (len(padded) > len(lengths))
    assert sum(padded) % (tensor * context * alignment) == 0, "as much for every rank, and aligned"
    assert sum(padded) >= sum(lengths)
    if context > 1:
        alone = padded_packing(lengths, tensor=tensor, context=context).lengths
        assert padded[: len(lengths)] == alone, "the cut of a sequence does not depend on the others"
        assert all(length % (2 * context) == 0 for length in padded)
    again = padded_packing(padded, tensor=tensor, context=context, alignment=alignment)
    assert again == Packing(padded)


@pytest.mark.parametrize("tensor, context", [(1, 1), (4, 1), (1, 2), (8, 2), (3, 4)])
def test_padding_divides_over_ranks(tensor: int, context: int) -> None:
    lengths = [7, 16, 1, 30]
    padded = padded_packing(lengths, tensor=tensor, context=context).lengths
    if context > 1:
        views = padded_packing([*lengths, *lengths], tensor=tensor, context=context).lengths
        assert views == padded * 2, "both views of a row are cut at the same places"
    assert all(now >= before for now, before in zip(padded, lengths, strict=True))
    assert context == 1 or all(now % (2 * context) == 0 for now in padded)
    assert sum(padded) % (tensor * context) == 0
    assert sum(padded) - sum(lengths) < (len(lengths) * 2 * context * tensor if context > 1 else tensor)
    assert padded_packing(padded, tensor=tensor, context=context) == Packing(padded)
