"""Gradients reduced during the backward pass: when each bucket starts, and that no bit of gradients or weights changes.

Two replicas add up two numbers, which has one result in whatever buckets they lie. So everything here is exact.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from megatron_vppo.algorithm.types import Response
from megatron_vppo.models.options import ModelOptions
from megatron_vppo.models.stage_input import StageInput
from megatron_vppo.parallel.checkpoint import load_checkpoint, save_checkpoint
from megatron_vppo.parallel.gradient_reduction import GradientReduction
from megatron_vppo.parallel.layout import Layout
from megatron_vppo.parallel.policy import MegatronPolicy
from tests.gloo import run_gloo
from tests.models.tiny import save_tiny_model, tiny_config, tiny_qwen3_config
from tests.parallel.case import Case
from tests.parallel.policy_rig import RESUMED_OPTIM, make_batch, make_policy, make_responses

MODELS = {
    "Qwen2.5-VL": tiny_config(tied=False, vocab=299, num_hidden_layers=5),
    "Qwen3-VL": tiny_qwen3_config(tied=True, vocab=301, taps=(0, 1), num_hidden_layers=5),
}
CASES = {
    "DP 2": Case(data=2),
    "DP 2, recomputed, frozen projector": Case(
        data=2, options=ModelOptions(recompute="full", frozen=frozenset({"projector"}))
    ),
    "CP 2": Case(context=2),
    "TP 2 x DP 2, images shared out": Case(
        tensor=2, data=2, options=ModelOptions(sequence_parallel=True, vision_split="images")
    ),
    "PP 2 x DP 2": Case(pipeline=2, data=2, options=ModelOptions(pipeline_layers=(2, 3))),
    "PP 2 x DP 2, interleaved": Case(
        pipeline=2, data=2, options=ModelOptions(virtual_stages=2, pipeline_layers=(2, 1, 1, 1))
    ),
}


def mini_batches() -> list[list[Response]]:
    """All rows; those without an image; all in another order, which gives other micro-batches the last place."""
    responses = make_responses()
    return [responses, [r for r in responses if not r.prompt.images], responses[::-1]]


@dataclass
class Watch:
    """A policy, and all that happens to its buckets."""

    policy: MegatronPolicy
    starts: list[tuple[int, bool, int]] = field(default_factory=list)
    """The reductions: bucket, True if it began in the backward pass, number of gradients that there were by then."""
    gradients: int = 0
    started_before_waiting: int = 0
    """The buckets whose reduction has begun when Megatron first waits for one."""
    shows_image: bool = False
    """True if the tower ran backward here in the last micro-batch."""
    tower_runs: int = 0
    """The runs of the tower that the last micro-batch reads."""
    _finishes: bool = False

    def __post_init__(self) -> None:
        trainable = self.policy.trainable
        self.buckets = [bucket for ddp in reversed(trainable.ddps) for bucket in ddp.bucket_groups]
        for number, bucket in enumerate(self.buckets):
            bucket.start_grad_sync = self._watched(number, bucket, bucket.start_grad_sync)
            for parameter in bucket.params:
                get_gradient_edge(parameter).node.register_hook(self._count)
        trainable.config.finalize_model_grads_func = self._finalize(trainable.config.finalize_model_grads_func)
        trainable.ddps[0].finish_grad_sync = self._finish(trainable.ddps[0].finish_grad_sync)
        first = trainable.stages[0]
        if first.vision is not None:
            first.register_forward_pre_hook(self._count_runs)
            # The gradient of what leaves the stage is the first of its backward pass.
            first.register_forward_hook(lambda *passed: self._note(passed[-1], False))
            first.vision.register_forward_hook(lambda *passed: self._note(passed[-1].merged_Mh, True))

    def update(self, responses: list[Response]) -> Seen:
        self.starts, self.gradients, self._finishes = [], 0, False
        self.policy.accumulate_gradients(make_batch(responses, "nll"))
        gradients = [
            parameter.main_grad.clone()
            for stage in self.policy.trainable.stages
            for parameter in stage.parameters()
            if parameter.requires_grad
        ]
        self.policy.trainable.step()
        weights = [tensor.clone() for _, tensor in self.policy.hf_weights()]
        return Seen(gradients, weights, list(self.starts), self.gradients)

    @property
    def complete_in_backward(self) -> int:
        """The number of buckets that have all gradients by the end of the last micro-batch's backward pass."""
        vision = self.policy.trainable.stages[0].vision
        if vision is None or (self.shows_image and self.tower_runs == 1):
            return len(self.buckets)
        tower = {parameter for parameter in vision.parameters() if parameter.requires_grad}
        return next((n for n, bucket in enumerate(self.buckets) if tower & bucket.params), len(self.buckets))

    def _count_runs(self, stage: nn.Module, passed: tuple[StageInput, Tensor]) -> None:
        self.tower_runs = len(passed[0].images) + len(passed[0].earlier)

    def _note(self, output: Tensor, shows_image: bool) -> None:
        output.register_hook(lambda _: setattr(self, "shows_image", shows_image))

    def _watched(self, number: int, bucket: Any, start: Any) -> Any:
        def watched(**kwargs: Any) -> None:
            if bucket.grad_reduce_handle is None:  # else Megatron asks once more, and nothing is done
                self.starts.append((number, not self._finishes, self.gradients))
            start(**kwargs)

        return watched

    def _count(self, *_: object) -> None:
        self.gradients += 1

    def _finalize(self, finalize: Any) -> Any:
        def watched(*args: Any, **kwargs: Any) -> None:
            self._finishes = True
            finalize(*args, **kwargs)

        return watched

    def _finish(self, finish: Any) -> Any:
        def watched(*args: Any, **kwargs: Any) -> None:
            self.started_before_waiting = len(self.starts)
            finish(*args, **kwargs)

        return watched


@dataclass(frozen=True)
class Seen:
    """One update."""

    gradients: list[Tensor]
    """This rank's; with the distributed optimizer those of its shards are summed, the others are not."""
    weights: list[Tensor]
    starts: list[tuple[int, bool, int]]
    total: int
    """The gradients that autograd made, in all micro-batches."""


def _rank(rank: int, world: int, case: Case, folders: dict[str, Path], scratch: Path) -> set[bool]:
    """Returns if the last micro-batches showed images on this rank."""
    layout, shown = case.open(), set()
    for model, folder in folders.items():
        for distributed in (True, False):
            where = f"{model}, {'distributed' if distributed else 'ordinary'} optimizer"
            shown |= _compare(folder, layout, case, scratch / where, distributed=distributed, where=where)
    return shown


def _compare(folder: Path, layout: Layout, case: Case, scratch: Path, *, distributed: bool, where: str) -> set[bool]:
    def policy(*, overlap: bool) -> MegatronPolicy:
        optim = dataclasses.replace(RESUMED_OPTIM, use_distributed_optimizer=distributed, overlap_grad_reduce=overlap)
        return make_policy(folder, layout, rows=1, optim=optim, options=case.options)

    after, during = Watch(policy(overlap=False)), Watch(policy(overlap=True))
    assert len(after.buckets) <= 2 * len(case.options.pipeline_layers or (0,)), "one, and one of a tied weight"
    shown = set()
    for responses in mini_batches():
        left, right = after.update(responses), during.update(responses)
        assert all(not in_backward for _, in_backward, _ in left.starts), where
        # Each bucket once, in their order, and as many as can be before the backward pass ends.
        assert [number for number, _, _ in right.starts] == list(range(len(during.buckets))), where
        assert (after.started_before_waiting, during.started_before_waiting) == (0, len(during.buckets)), where
        early = [in_backward for _, in_backward, _ in right.starts]
        complete = during.complete_in_backward
        assert early == [True] * complete + [False] * (len(early) - complete), where
        if layout.is_first_stage:
            assert len(during.buckets) > 3, where
            _, _, gradients = right.starts[0]
            assert gradients < right.total, f"{where}: the first reduction waits for the last gradient"
        if not distributed:
            assert all(torch.equal(a, b) for a, b in zip(left.gradients, right.gradients, strict=True)), where
        assert all(torch.equal(a, b) for a, b in zip(left.weights, right.weights, strict=True)), where
        shown.add(during.shows_image)
    _resumed_without_overlap(during, policy(overlap=False), layout, scratch, where=where)
    return shown


def _resumed_without_overlap(
    during: Watch, resumed: MegatronPolicy, layout: Layout, scratch: Path, *, where: str
) -> None:
    """A checkpoint does not show in which buckets gradients lay."""
    save_checkpoint(scratch, step=1, trainable=during.policy.trainable, layout=layout, state={}, keep=1)
    load_checkpoint(scratch, step=1, trainable=resumed.trainable, layout=layout)
    left, right = (watch.update(make_responses()).weights for watch in (during, Watch(resumed)))
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True)), where


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp("model") for name in MODELS}
    for name, folder in made.items():
        save_tiny_model(folder, MODELS[name])
    return made


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "DP 2" else [pytest.mark.extended]) for name in CASES]
)
def test_no_bit_changes(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    shown = run_gloo(_rank, CASES[name].ranks, CASES[name], folders, tmp_path, timeout_seconds=500)
    assert {True, False} in shown, "last micro-batches with an image and without one"


# --- Two stages of two layers, and nothing else -----------------------------------------------------------------------


class TwoLayers(nn.Module):
    """Layers of different sizes, each a bucket, of which a rank may leave out some."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 2, bias=False), nn.Linear(width + 1, 2, bias=False)


def _reduced() -> tuple[GradientReduction, list[DistributedDataParallel]]:
    layout = Case(data=2).open()
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, use_cpu_initialization=True, calculate_per_token_loss=True
    )
    ddps = [
        DistributedDataParallel(
            config=config,
            ddp_config=DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=True, bucket_size=1),
            module=TwoLayers(width),
            pg_collection=layout.groups,
        )
        for width in (3, 30)
    ]
    return GradientReduction(ddps, head_weight=None, tower=[ddps[-1].module.second.weight]), ddps


def _add(layer: nn.Linear, gradient: float) -> None:
    """Runs a layer forward and backward; every value of its weight gets this gradient."""
    layer(torch.full((layer.in_features,), gradient)).sum().backward()


LEFT_OUT = (
    ((0, 1, 2, 3), ()),
    ((), (0, 1, 2, 3)),
    ((0, 1), (2, 3)),
    ((0, 2), (1, 3)),
    ((1,), (2,)),
    ((), ()),
)
"""The layers of which either rank has no gradient, mini-batch by mini-batch: 0 and 1 of the first stage, 2 and 3 of the
second."""


def _some_layers(rank: int, world: int) -> list[list[float]]:
    """The sum of each layer's gradient, mini-batch by mini-batch."""
    reduction, ddps = _reduced()
    layers = [layer for ddp in ddps for layer in (ddp.module.first, ddp.module.second)]
    found = []
    for left_out in LEFT_OUT:
        for ddp in ddps:
            ddp.zero_grad_buffer()
        with reduction.of_mini_batch(tower_again=False):
            with reduction.not_last():
                _add(layers[0], 1.0)
            for number in reversed(range(4)):
                if number not in left_out[rank]:
                    _add(layers[number], 10.0 * (1 + rank))
            reduction.start_rest()
            for ddp in ddps:
                ddp.finish_grad_sync()
        found.append([float(layer.weight.main_grad.unique()) for layer in layers])
    parallel_state.destroy_model_parallel()
    return found


@pytest.mark.distributed
def test_ranks_that_complete_different_buckets() -> None:
    """They start them in one order. In different ones, sums of different sizes would meet."""
    expected = [
        [
            2.0 * (number == 0) + sum(10.0 * (1 + rank) for rank in (0, 1) if number not in left_out[rank])
            for number in range(4)
        ]
        for left_out in LEFT_OUT
    ]
    assert run_gloo(_some_layers, 2, timeout_seconds=60) == [expected] * 2


def _too_late(rank: int, world: int) -> str:
    reduction, ddps = _reduced()
    first_bucket = ddps[-1].module.second
    with reduction.of_mini_batch(tower_again=False):
        _add(first_bucket, 1.0)
        with pytest.raises(AssertionError) as error:
            _add(first_bucket, 1.0)
        reduction.start_rest()
        for ddp in ddps:
            ddp.finish_grad_sync()
    parallel_state.destroy_model_parallel()
    return str(error.value)


@pytest.mark.distributed
def test_a_gradient_that_comes_too_late_ends_the_run() -> None:
    """It would be added to a sum that other ranks are reading."""
    message = "a gradient came after the reduction of its bucket, 0, had begun"
    assert run_gloo(_too_late, 2, timeout_seconds=60) == [message] * 2


def _tower_again(rank: int, world: int) -> tuple[bool, float]:
    """Returns if the reduction of the tower's weight began with its first gradient, and the sum of all."""
    reduction, ddps = _reduced()
    tower = ddps[-1].module.second
    with reduction.of_mini_batch(tower_again=True):
        _add(tower, 1.0)
        began = ddps[-1].bucket_groups[0].grad_reduce_handle is not None
        _add(tower, 10.0)
        reduction.start_rest()
        for ddp in ddps:
            ddp.finish_grad_sync()
    parallel_state.destroy_model_parallel()
    return began, float(tower.weight.main_grad.unique())


@pytest.mark.distributed
def test_a_tower_that_runs_backward_twice_is_reduced_at_the_end() -> None:
    assert run_gloo(_tower_again, 2, timeout_seconds=60) == [(False, 22.0)] * 2
