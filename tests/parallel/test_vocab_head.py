"""The vocabulary head against whole-vocabulary float64 references, on one rank and on two gloo ranks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from megatron_vppo.parallel.vocab_head import VocabHead, check_targets
from tests.gloo import run_gloo

VOCAB_SIZE = 37  # odd: two ranks cannot share it evenly without padding
HIDDEN_SIZE = 8
NUM_TOKENS = 11
TEMPERATURE = 0.7


@dataclass(frozen=True)
class Problem:
    hidden_Nh: Tensor
    perturbed_hidden_Nh: Tensor
    weight_Vh: Tensor
    """Without padding."""
    targets_N: Tensor
    grad_logp_N: Tensor
    grad_entropy_N: Tensor


def make_problem(*, num_tokens: int = NUM_TOKENS, seed: int = 0) -> Problem:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    hidden_Nh = normal(num_tokens, HIDDEN_SIZE)
    return Problem(
        hidden_Nh=hidden_Nh,
        perturbed_hidden_Nh=hidden_Nh + 0.3 * normal(num_tokens, HIDDEN_SIZE),
        weight_Vh=normal(VOCAB_SIZE, HIDDEN_SIZE),
        targets_N=torch.randint(0, VOCAB_SIZE, (num_tokens,), generator=g),
        grad_logp_N=normal(num_tokens),
        grad_entropy_N=normal(num_tokens),
    )


def padded(weight_Vh: Tensor, num_rows: int) -> Tensor:
    """Padding rows hold large numbers: they must have no effect."""
    return torch.cat([weight_Vh, torch.full((num_rows - len(weight_Vh), HIDDEN_SIZE), 7.0, dtype=weight_Vh.dtype)])


def make_head(
    weight_Vh: Tensor, *, chunk_tokens: int = 4, temperature: float = TEMPERATURE, **others: Any
) -> VocabHead:
    """The whole vocabulary on one rank, unless said otherwise."""
    return VocabHead(weight_Vh, VOCAB_SIZE, temperature, chunk_tokens, **others)


def reference_logps(hidden_Nh: Tensor, weight_Vh: Tensor) -> Tensor:
    return torch.log_softmax(hidden_Nh @ weight_Vh.T / TEMPERATURE, dim=-1)


def reference(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, entropies, gradient of hidden states, gradient of the weight, all by autograd in float64."""
    hidden_Nh, weight_Vh = p.hidden_Nh.clone().requires_grad_(), p.weight_Vh.clone().requires_grad_()
    logp_NV = reference_logps(hidden_Nh, weight_Vh)
    logp_N = logp_NV.gather(1, p.targets_N[:, None])[:, 0]
    entropy_N = -(logp_NV.exp() * logp_NV).sum(1)
    (logp_N * p.grad_logp_N + entropy_N * p.grad_entropy_N).sum().backward()
    assert hidden_Nh.grad is not None and weight_Vh.grad is not None
    return logp_N.detach(), entropy_N.detach(), hidden_Nh.grad, weight_Vh.grad


def run_head(
    p: Problem, weight_Vh: Tensor, *, dtype: torch.dtype, chunk_tokens: int, **slice_of: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden_Nh = p.hidden_Nh.to(dtype, copy=True).requires_grad_()
    weight_Vh = weight_Vh.to(dtype, copy=True).requires_grad_()
    head = make_head(weight_Vh, chunk_tokens=chunk_tokens, **slice_of)
    logp_N, entropy_N = head.token_logps(hidden_Nh, p.targets_N, with_entropy=True)
    ((logp_N * p.grad_logp_N).sum() + (entropy_N * p.grad_entropy_N).sum()).backward()
    return logp_N.detach(), entropy_N.detach(), hidden_Nh.grad, weight_Vh.grad


def assert_near(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], *, atol: float) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e.double(), rtol=atol, atol=atol)


@pytest.mark.parametrize("chunk_tokens", [1, 4, NUM_TOKENS, 1000])
def test_one_rank_equals_autograd(chunk_tokens: int) -> None:
    p = make_problem()
    actual = run_head(p, p.weight_Vh, dtype=torch.float64, chunk_tokens=chunk_tokens)
    assert_near(actual, reference(p), atol=1e-12)


def test_float32_stays_near_float64() -> None:
    p = make_problem()
    actual = run_head(p, p.weight_Vh, dtype=torch.float32, chunk_tokens=4)
    assert all(a.dtype == torch.float32 for a in actual)
    assert_near(actual, reference(p), atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradient_is_added_where_the_optimizer_sums(dtype: torch.dtype) -> None:
    """Two micro-batches into one float32 sum, as into Megatron's main_grad: autograd does not reach the weight, where
    Megatron's hook would ask for a gradient."""
    p = make_problem()
    hidden_Nh = p.hidden_Nh.to(dtype, copy=True).requires_grad_()
    weight_Vh = padded(p.weight_Vh, 40).to(dtype).requires_grad_()
    leaf, reached = get_gradient_edge(weight_Vh).node, []
    leaf.register_hook(lambda *_: reached.append(True))
    sum_Vh = torch.ones(40, HIDDEN_SIZE)
    head = make_head(weight_Vh, weight_grad_Vh=sum_Vh)
    for half in (slice(0, 6), slice(6, NUM_TOKENS)):
        logp_N, entropy_N = head.token_logps(hidden_Nh[half], p.targets_N[half], with_entropy=True)
        ((logp_N * p.grad_logp_N[half]).sum() + (entropy_N * p.grad_entropy_N[half]).sum()).backward()
    assert weight_Vh.grad is None and not reached
    exact = dataclasses.replace(
        p, hidden_Nh=hidden_Nh.detach().double(), weight_Vh=weight_Vh.detach()[:VOCAB_SIZE].double()
    )
    expected_Vh = 1 + padded(reference(exact)[3], 40)
    expected_Vh[VOCAB_SIZE:] = 1
    tolerance = 5e-6 if dtype == torch.float32 else 0.1  # the gradient of the logits has three digits
    torch.testing.assert_close(sum_Vh.double(), expected_Vh, rtol=tolerance, atol=tolerance)


def test_gradcheck() -> None:
    p = make_problem(num_tokens=5)

    def outputs(hidden_Nh: Tensor, weight_Vh: Tensor) -> tuple[Tensor, Tensor]:
        head = make_head(weight_Vh, chunk_tokens=2)
        logp_N, entropy_N = head.token_logps(hidden_Nh, p.targets_N, with_entropy=True)
        assert entropy_N is not None
        return logp_N, entropy_N

    assert torch.autograd.gradcheck(outputs, (p.hidden_Nh.requires_grad_(), p.weight_Vh.requires_grad_()))


def test_padded_rows_have_no_probability_and_no_gradient() -> None:
    p = make_problem()
    logp_N, entropy_N, grad_hidden, grad_weight = run_head(
        p, padded(p.weight_Vh, 48), dtype=torch.float64, chunk_tokens=4
    )
    expected = reference(p)
    assert_near((logp_N, entropy_N, grad_hidden, grad_weight[:VOCAB_SIZE]), expected, atol=1e-12)
    assert torch.equal(grad_weight[VOCAB_SIZE:], torch.zeros(48 - VOCAB_SIZE, HIDDEN_SIZE, dtype=torch.float64))


def test_bfloat16_softmax_runs_in_float32() -> None:
    """Only the matrix product is in bfloat16: the log-softmax of those very logits is exact to float32."""
    p = make_problem()
    hidden_Nh, weight_Vh = p.hidden_Nh.bfloat16().requires_grad_(), p.weight_Vh.bfloat16().requires_grad_()
    logp_N, entropy_N = make_head(weight_Vh).token_logps(hidden_Nh, p.targets_N, with_entropy=True)
    logits_NV = (hidden_Nh.detach() @ weight_Vh.detach().T).double() / TEMPERATURE
    logp_NV = logits_NV.log_softmax(-1)
    assert logp_N.dtype == torch.float32 and entropy_N is not None
    assert_near(
        (logp_N, entropy_N),
        (logp_NV.gather(1, p.targets_N[:, None])[:, 0], -(logp_NV.exp() * logp_NV).sum(1)),
        atol=2e-6,
    )
    (logp_N * p.grad_logp_N).sum().backward()
    assert hidden_Nh.grad is not None and hidden_Nh.grad.dtype == torch.bfloat16
    assert weight_Vh.grad is not None and weight_Vh.grad.dtype == torch.bfloat16


def test_large_logits_do_not_overflow() -> None:
    p = make_problem()
    scaled = Problem(
        p.hidden_Nh * 100, p.perturbed_hidden_Nh, p.weight_Vh, p.targets_N, p.grad_logp_N, p.grad_entropy_N
    )
    logp_N, entropy_N, grad_hidden, grad_weight = run_head(
        scaled, scaled.weight_Vh, dtype=torch.float64, chunk_tokens=4
    )
    assert logp_N.min() < -500
    assert_near((logp_N, entropy_N, grad_hidden, grad_weight), reference(scaled), atol=1e-10)


def test_frozen_sides_get_no_gradient() -> None:
    p = make_problem()
    hidden_Nh, weight_Vh = p.hidden_Nh.clone().requires_grad_(), p.weight_Vh.clone()
    logp_N, entropy_N = make_head(weight_Vh).token_logps(hidden_Nh, p.targets_N, with_entropy=False)
    (logp_N * p.grad_logp_N).sum().backward()
    assert entropy_N is None and weight_Vh.grad is None and hidden_Nh.grad is not None
    hidden_Nh, weight_Vh = p.hidden_Nh.clone(), p.weight_Vh.clone().requires_grad_()
    logp_N, _ = make_head(weight_Vh).token_logps(hidden_Nh, p.targets_N, with_entropy=False)
    (logp_N * p.grad_logp_N).sum().backward()
    assert hidden_Nh.grad is None and weight_Vh.grad is not None


@pytest.mark.parametrize(
    ("vocab_start", "rows", "banned", "local", "owned"),
    [
        (0, 4, [3], [3, 0, 0, 0, 0], [True, False, False, False, False]),
        (4, 4, [0, 3], [0, 0, 3, 0, 0], [False, True, True, False, False]),
        (8, 2, [0], [0, 0, 0, 0, 1], [False, False, False, True, True]),
        (12, 0, [], [0, 0, 0, 0, 0], [False] * 5),
    ],
)
def test_a_slice_by_hand(vocab_start: int, rows: int, banned: list[int], local: list[int], owned: list[bool]) -> None:
    """Ten tokens on four ranks of four rows; the third has two rows of padding, the last nothing else."""
    weight_Vh = torch.arange(8.0).reshape(4, 2)
    head = VocabHead(weight_Vh, 10, TEMPERATURE, 4, vocab_start=vocab_start, banned_ids=(3, 4, 7, 8))
    assert torch.equal(head.rows_Vh, weight_Vh[:rows])
    assert head.banned_rows.tolist() == banned
    local_N, owned_N = head.local_targets(torch.tensor([3, 4, 7, 8, 9]))
    assert local_N.tolist() == local and owned_N.tolist() == owned


def test_no_positions() -> None:
    """A data-parallel rank may hold no response token in a micro-batch."""
    p = make_problem(num_tokens=0)
    logp_N, entropy_N, grad_hidden, grad_weight = run_head(p, p.weight_Vh, dtype=torch.float32, chunk_tokens=4)
    assert logp_N.shape == entropy_N.shape == (0,)
    assert grad_hidden.shape == (0, HIDDEN_SIZE) and not grad_weight.any()


@pytest.mark.parametrize("kind", ["forward", "backward", "two_view"])
def test_no_more_than_chunk_tokens_rows_of_logits(kind: str) -> None:
    """Watches every matrix product of the head: none makes more than chunk_tokens rows of vocabulary width."""

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            is_logits = isinstance(out, Tensor) and out.dim() == 2 and out.shape[1] == VOCAB_SIZE
            if is_logits and out.data_ptr() != weight_Vh.data_ptr():  # that is the weight, transposed
                Watch.rows = max(Watch.rows, out.shape[0])
            return out

    p = make_problem(num_tokens=50)
    hidden_Nh = p.hidden_Nh.clone().requires_grad_()
    weight_Vh = p.weight_Vh.clone()
    if kind == "two_view":
        with Watch():
            make_head(weight_Vh, chunk_tokens=24).two_views(hidden_Nh, p.perturbed_hidden_Nh, p.targets_N, kind="jsd")
        assert Watch.rows == 12  # half for each view
        Watch.rows = 0
        with Watch():
            make_head(weight_Vh, chunk_tokens=1).two_views(hidden_Nh, p.perturbed_hidden_Nh, p.targets_N, kind="jsd")
        assert Watch.rows == 1
        return
    head = make_head(weight_Vh, chunk_tokens=12)
    if kind == "forward":
        with Watch():
            head.token_logps(hidden_Nh, p.targets_N, with_entropy=True)
    else:
        logp_N, entropy_N = head.token_logps(hidden_Nh, p.targets_N, with_entropy=True)
        with Watch():
            torch.autograd.backward((logp_N, entropy_N), (p.grad_logp_N, p.grad_entropy_N))
    assert Watch.rows == 12


def reference_divergence(p: Problem, kind: str) -> Tensor:
    a_NV, b_NV = reference_logps(p.hidden_Nh, p.weight_Vh), reference_logps(p.perturbed_hidden_Nh, p.weight_Vh)
    return divergence_of(a_NV, b_NV, kind)


def divergence_of(a_NV: Tensor, b_NV: Tensor, kind: str) -> Tensor:
    if kind == "kl_full":
        return (a_NV.exp() * (a_NV - b_NV)).sum(1)
    if kind == "top1_drop":
        top_N1 = a_NV.argmax(1, keepdim=True)
        return (a_NV.gather(1, top_N1).exp() - b_NV.gather(1, top_N1).exp())[:, 0]
    m_NV = ((a_NV.exp() + b_NV.exp()) / 2).log()
    return 0.5 * ((a_NV.exp() * (a_NV - m_NV)).sum(1) + (b_NV.exp() * (b_NV - m_NV)).sum(1))


@pytest.mark.parametrize("kind", ["kl_full", "jsd", "top1_drop"])
@pytest.mark.parametrize("chunk_tokens", [1, 6, 1000])
def test_two_view_divergence_equals_definition(kind: str, chunk_tokens: int) -> None:
    p = make_problem()
    expected_N = reference_divergence(p, kind)
    assert expected_N.abs().min() > 1e-3
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        head = make_head(padded(p.weight_Vh, 40).to(dtype), chunk_tokens=chunk_tokens)
        views = (p.hidden_Nh.to(dtype), p.perturbed_hidden_Nh.to(dtype))
        actual_N = head.two_views(*views, p.targets_N, kind=kind).divergence_N
        assert actual_N.dtype == dtype
        torch.testing.assert_close(actual_N.double(), expected_N, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["kl_full", "jsd", "top1_drop"])
def test_two_views_in_one_pass_equal_the_definitions(kind: str) -> None:
    """With a ragged last chunk, and with banned tokens, which are no targets."""
    p = make_problem()
    banned = [v for v in range(VOCAB_SIZE) if v not in p.targets_N][:3]
    p = dataclasses.replace(p, weight_Vh=p.weight_Vh.index_fill(0, torch.tensor(banned), 9.0))  # of no effect
    head = make_head(padded(p.weight_Vh, 40), chunk_tokens=8, banned_ids=tuple(banned))
    scores = head.two_views(p.hidden_Nh, p.perturbed_hidden_Nh, p.targets_N, kind=kind)
    ban_V = torch.zeros(VOCAB_SIZE).index_fill_(0, torch.tensor(banned), -1e9)
    a_NV, b_NV = (
        (view_Nh @ p.weight_Vh.T / TEMPERATURE + ban_V).log_softmax(-1)
        for view_Nh in (p.hidden_Nh, p.perturbed_hidden_Nh)
    )
    at, kept = p.targets_N[:, None], [v for v in range(VOCAB_SIZE) if v not in banned]
    expected = (
        a_NV.gather(1, at)[:, 0],
        -(a_NV.exp() * a_NV).sum(1),
        b_NV.gather(1, at)[:, 0],
        divergence_of(a_NV[:, kept], b_NV[:, kept], kind),
        -(b_NV.exp() * b_NV).sum(1),
    )
    actual = (
        scores.logp_N, scores.entropy_N, scores.perturbed_logp_N, scores.divergence_N, scores.perturbed_entropy_N
    )  # fmt: skip
    assert_near(actual, expected, atol=1e-12)


@pytest.mark.parametrize("kind", ["kl_full", "jsd"])
def test_small_divergences_keep_their_digits_in_float32(kind: str) -> None:
    """Views that differ by 1e-4 diverge by about 1e-8, far below what a plain float32 sum resolves."""
    p = make_problem()
    hidden_Nh = p.hidden_Nh.float()
    perturbed_hidden_Nh = hidden_Nh + 2e-3 * (p.perturbed_hidden_Nh - p.hidden_Nh).float()
    exact = Problem(
        hidden_Nh.double(),
        perturbed_hidden_Nh.double(),
        p.weight_Vh.float().double(),
        p.targets_N,
        p.grad_logp_N,
        p.grad_entropy_N,
    )
    expected_N = reference_divergence(exact, kind)
    assert expected_N.max() < 1e-5
    head = make_head(p.weight_Vh.float(), chunk_tokens=6)
    actual_N = head.two_views(hidden_Nh, perturbed_hidden_Nh, p.targets_N, kind=kind).divergence_N
    torch.testing.assert_close(actual_N.double(), expected_N, rtol=5e-3, atol=0)
    assert head.two_views(hidden_Nh, hidden_Nh, p.targets_N, kind=kind).divergence_N.abs().max() < 1e-12


@dataclass(frozen=True)
class Placement:
    """Vocabulary rows per rank; the last rank or ranks hold padding."""

    rows_per_rank: int


Results = tuple[Tensor, ...]


def head_on_rank(rank: int, world_size: int, placement: Placement, dtypes: list[torch.dtype]) -> list[Results]:
    p = make_problem()
    rows = placement.rows_per_rank
    mine_Vh = padded(p.weight_Vh, rows * world_size)[rank * rows : (rank + 1) * rows]
    where = {"group": torch.distributed.group.WORLD, "vocab_start": rank * rows}
    results = []
    for dtype in dtypes:
        head = make_head(mine_Vh.to(dtype), **where)
        views = (p.hidden_Nh.to(dtype), p.perturbed_hidden_Nh.to(dtype), p.targets_N)
        kl, jsd, drop = (head.two_views(*views, kind=kind) for kind in ("kl_full", "jsd", "top1_drop"))
        run = run_head(p, mine_Vh, dtype=dtype, chunk_tokens=4, **where)
        divergences = (kl.divergence_N, jsd.divergence_N, drop.divergence_N)
        results.append((*run, *divergences, jsd.entropy_N, jsd.perturbed_logp_N, jsd.perturbed_entropy_N))
    return results


@pytest.mark.distributed
@pytest.mark.parametrize(
    "placement", [Placement(19), Placement(40)], ids=["last rank part padding", "last rank all padding"]
)
def test_two_ranks_equal_one(placement: Placement) -> None:
    p = make_problem()
    perturbed = reference(dataclasses.replace(p, hidden_Nh=p.perturbed_hidden_Nh))[:2]
    divergences = (reference_divergence(p, kind) for kind in ("kl_full", "jsd", "top1_drop"))
    exact = (*divergences, reference(p)[1], *perturbed)
    dtypes = [torch.float64, torch.float32, torch.bfloat16]
    by_rank = run_gloo(head_on_rank, 2, placement, dtypes)
    # bfloat16 is held against float64 only loosely: the matrix product itself has three digits.
    for i, tolerance in enumerate((1e-12, 5e-6, 0.1)):
        one = run_head(p, p.weight_Vh, dtype=dtypes[i], chunk_tokens=NUM_TOKENS)
        for logp_N, entropy_N, grad_hidden_Nh, _, *two_views in (rank[i] for rank in by_rank):
            assert_near((logp_N, entropy_N, grad_hidden_Nh), one[:3], atol=tolerance)
            assert_near(tuple(two_views), exact, atol=tolerance)
        grad_weight_Vh = torch.cat([rank[i][3] for rank in by_rank])
        assert_near((grad_weight_Vh[:VOCAB_SIZE],), (one[3],), atol=tolerance)
        assert not grad_weight_Vh[VOCAB_SIZE:].any()
        # Every rank of the group goes on with the same numbers, to the bit.
        for k in (0, 1, 2, *range(4, 10)):
            assert torch.equal(by_rank[0][i][k], by_rank[1][i][k])


@pytest.mark.parametrize("token", [-1, VOCAB_SIZE])
def test_targets_outside_of_the_vocabulary_are_refused(token: int) -> None:
    check_targets([0, VOCAB_SIZE - 1], vocab_size=VOCAB_SIZE, banned_ids=())
    with pytest.raises(ValueError, match="1 of 3 target tokens lie outside the vocabulary of 37"):
        check_targets([0, token, 5], vocab_size=VOCAB_SIZE, banned_ids=())


def test_banned_targets_are_refused() -> None:
    check_targets([3, 4], vocab_size=VOCAB_SIZE, banned_ids=(5,))
    with pytest.raises(ValueError, match=r"2 of 3 target tokens are banned: \(5,\)"):
        check_targets([5, 4, 5], vocab_size=VOCAB_SIZE, banned_ids=(5,))


def test_wrong_arguments_are_named() -> None:
    p = make_problem()
    head = make_head(p.weight_Vh)
    for hidden_Nh, weight_Vh in (
        (p.hidden_Nh, p.weight_Vh.T),
        (p.hidden_Nh[..., None], p.weight_Vh),
        (p.hidden_Nh, p.weight_Vh[..., None]),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            make_head(weight_Vh).token_logps(hidden_Nh, p.targets_N, with_entropy=False)
    with pytest.raises(ValueError, match="temperature is 0"):
        make_head(p.weight_Vh, temperature=0.0)
    with pytest.raises(ValueError, match="kl_topM"):
        head.two_views(p.hidden_Nh, p.hidden_Nh, p.targets_N, kind="kl_topM")
    with pytest.raises(ValueError, match=r"weight_grad_Vh is \[37, 8\] of torch.float32; it must be \[37, 8\] of"):
        make_head(p.weight_Vh, weight_grad_Vh=p.weight_Vh.float())
    with pytest.raises(ValueError, match="the two views have shapes"):
        head.two_views(p.hidden_Nh, p.hidden_Nh[1:], p.targets_N, kind="jsd")


def fail_on_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("planted failure")
    torch.distributed.barrier()


@pytest.mark.distributed
def test_a_failing_rank_is_reported() -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 failed first[\s\S]*planted failure"):
        run_gloo(fail_on_rank_1, 2)
