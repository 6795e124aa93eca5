"""FLOPs that scoring and update execute, counted, against the least that they need with a prompt run once per group.

The floor comes from the sizes of the model (`models/flops.py`, itself tested against torch's count of
transformers): a prompt and its images once for each way that they are shown, every response once, causal attention at
half the square.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from bench.counted_flops import count_flops
from torch import Tensor
from transformers import Qwen2_5_VLConfig

from megatron_vppo.algorithm.patches import Patches, PatchValues
from megatron_vppo.algorithm.types import ImageRef, LossSpec, PerturbKey, Prompt, Response, TrainBatch
from megatron_vppo.config.choices import PerturbUnit
from megatron_vppo.models.flops import ModelCost, model_cost
from megatron_vppo.models.vision.tower import TowerPlan, VisionFeatures
from megatron_vppo.parallel.layout import Layout, single_rank
from megatron_vppo.parallel.policy import MegatronPolicy
from megatron_vppo.parallel.schedule import PolicySettings
from megatron_vppo.parallel.training import make_trainable
from megatron_vppo.planning.step_flops import BACKWARD, HEAD_AGAIN
from tests.gloo import run_gloo
from tests.models.tiny import IMAGE, PATCH_VALUES, save_tiny_model, tiny_config
from tests.parallel.case import Case
from tests.parallel.policy_rig import OPTIM, make_stages

BAR = 1.05
GRID, IMAGE_TOKENS, WORDS = (1, 24, 28), 168, 24
LENGTHS = (72, 64, 55, 50, 44, 37, 30, 24)
"""Tokens of the responses of a group of eight."""
GROUPS = 2


class Zeros:
    values = PatchValues(torch.zeros(3, 256), frames=2)

    def patches(self, ref: ImageRef, perturb: PerturbKey | None) -> Patches:
        return Patches(torch.zeros(GRID[1] * GRID[2], 3 * 14 * 14, dtype=torch.uint8))


def responses() -> list[Response]:
    prompt_ids = (*(IMAGE,) * IMAGE_TOKENS, *(7,) * WORDS)
    made = []
    for group in range(GROUPS):
        prompt = Prompt("train", group, "", "", prompt_ids, (), (ImageRef("train", group, 0),), (GRID,))
        made += [Response(prompt, group, n, (8,) * length, (0.0,) * length, "stop", 0)
                 for n, length in enumerate(LENGTHS)]  # fmt: skip
    return made


def batch_of(rows: list[Response]) -> TrainBatch:
    ones_BT = torch.ones(len(rows), max(LENGTHS))
    return TrainBatch(
        responses=tuple(rows), old_logp_BT=-ones_BT, advantage_BT=ones_BT, pg_weight_BT=ones_BT,
        entropy_weight_BT=0 * ones_BT, response_mask_BT=ones_BT,
        loss=LossSpec(
            clip_ratio_low=0.2, clip_ratio_high=0.2, clip_ratio_dual=3.0, entropy_kind="nll",
            kl_kind="k3", policy_loss="clip", sapo_tau_positive=1.0, sapo_tau_negative=1.05,
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which attention is a small part, as in one that is released."""
    made = tmp_path_factory.mktemp("model")
    save_tiny_model(made, config())
    return made


def config() -> Qwen2_5_VLConfig:
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 8}
    made = tiny_config(tied=False, vocab=300, **sizes)
    made.vision_config.out_hidden_size = sizes["hidden_size"]
    return made


@pytest.fixture
def layout() -> Iterator[Layout]:
    with single_rank() as made:
        yield made


def make_policy(
    folder: Path, layout: Layout, *, per: PerturbUnit, shared: bool, rows_each: int = len(LENGTHS)
) -> MegatronPolicy:
    """Micro-batches are one group each."""
    settings = PolicySettings(
        temperature=1.0, banned_ids=(), rows_per_update=rows_each, rows_per_experience=rows_each,
        head_chunk_tokens=4096, perturb_per=per, shared_prefix=shared,
    )  # fmt: skip
    trainable = make_trainable(make_stages(folder, layout), layout=layout, settings=OPTIM, dtype=torch.float32)
    return MegatronPolicy(trainable, hf_config=config(), layout=layout, settings=settings, pixels=Zeros())


def group_floor(cost: ModelCost, *, shared: bool) -> float:
    """The forward FLOPs of a group's rows in one view, image and head left out."""
    prompt = IMAGE_TOKENS + WORDS
    if shared:
        return cost.sequence(prompt) + sum(cost.continuation(prompt, n - 1) for n in LENGTHS)
    return sum(cost.sequence(prompt + n - 1) for n in LENGTHS)


def scoring_floor(per: PerturbUnit, views_of_image: int) -> float:
    cost = model_cost(config())
    language = group_floor(cost, shared=True) + group_floor(cost, shared=per == "image")
    return language + 2 * sum(LENGTHS) * cost.per_head_position + views_of_image * cost.image(GRID[1] * GRID[2])


def update_floor() -> float:
    cost = model_cost(config())
    head, patches = sum(LENGTHS) * cost.per_head_position, GRID[1] * GRID[2]
    whole = (1 + BACKWARD) * (group_floor(cost, shared=True) + head + cost.image(patches)) + HEAD_AGAIN * head
    return whole - first_product()  # pixels need no gradient: two parts instead of three


def first_product() -> int:
    """Counts one part of the tower's first product, for one image."""
    return GRID[1] * GRID[2] * 2 * PATCH_VALUES * config().vision_config.hidden_size


@pytest.mark.parametrize(("per", "views_of_image"), [("image", 2), ("row", 1 + len(LENGTHS))])
def test_scoring_executes_little_more_than_the_floor(
    per: PerturbUnit, views_of_image: int, folder: Path, layout: Layout
) -> None:
    """With a perturbation for each response, their views share nothing and the floor has whole rows."""
    rows = responses()
    floor = scoring_floor(per, views_of_image)
    policy = make_policy(folder, layout, per=per, shared=True)
    executed = count_flops(lambda: policy.score(rows, step=1, views="both"))
    assert GROUPS * floor < executed <= BAR * GROUPS * floor
    apart = make_policy(folder, layout, per=per, shared=False)
    assert count_flops(lambda: apart.score(rows, step=1, views="both")) > (1.3 if per == "row" else 2) * executed


def test_the_second_view_costs_a_quarter_of_a_training(folder: Path, layout: Layout) -> None:
    """Scoring and update of VPPO over those of DAPO, with one perturbation for a group; 1.25 if nothing is wasted."""
    rows = responses()
    policy = make_policy(folder, layout, per="image", shared=True)
    one = count_flops(lambda: policy.score(rows, step=1, views="original"))
    both = count_flops(lambda: policy.score(rows, step=1, views="both"))
    update = count_flops(lambda: policy.accumulate_gradients(batch_of(rows)))
    assert 1.2 < (both + update) / (one + update) <= 1.27


def test_the_update_executes_little_more_than_the_floor(folder: Path, layout: Layout) -> None:
    rows, floor = responses(), update_floor()
    policy = make_policy(folder, layout, per="row", shared=True)
    executed = count_flops(lambda: policy.accumulate_gradients(batch_of(rows)))
    assert GROUPS * floor < executed <= BAR * GROUPS * floor
    apart = make_policy(folder, layout, per="row", shared=False)
    assert count_flops(lambda: apart.accumulate_gradients(batch_of(rows))) > 2 * executed


def _executed(rank: int, world: int, folder: Path) -> tuple[int, int]:
    """Counts what a rank executes in scoring and update."""
    rows = responses()
    policy = make_policy(folder, Case(tensor=world).open(), per="image", shared=True)
    scoring = count_flops(lambda: policy.score(rows, step=1, views="both"))
    return scoring, count_flops(lambda: policy.accumulate_gradients(batch_of(rows)))


@pytest.mark.distributed
def test_two_tensor_parallel_ranks_execute_little_more_than_the_floor(folder: Path) -> None:
    """The tower's first product is not split: both ranks have it. Of a released 7B it is 0.2 % of the tower; here 8 %
    of all.
    """
    scoring, update = (sum(of_ranks) for of_ranks in zip(*run_gloo(_executed, 2, folder), strict=True))
    for executed, floor in ((scoring, scoring_floor("image", 2)), (update, update_floor())):
        whole = GROUPS * (floor + 2 * first_product())  # two views, or forward and the gradient of the weight
        assert whole < executed <= BAR * whole


class ImagesRun:
    """Counts the images that go through the tower of a policy, forward and backward."""

    def __init__(self, policy: MegatronPolicy) -> None:
        self._forward = self._backward = 0
        tower = policy.trainable.stages[0].vision
        assert tower is not None
        tower.register_forward_hook(self._add)

    def _add(self, tower: object, inputs: tuple[Tensor, TowerPlan], features: VisionFeatures) -> None:
        images = len(inputs[1].grids_thw)
        self._forward += images
        if features.merged_Mh.requires_grad:
            features.merged_Mh.register_hook(lambda _: self._add_backward(images))

    def _add_backward(self, images: int) -> None:
        self._backward += images

    def of(self, work: Callable[[], object]) -> tuple[int, int]:
        self._forward = self._backward = 0
        work()
        return self._forward, self._backward


@pytest.mark.parametrize("rows_each", [3, len(LENGTHS) // 2, len(LENGTHS), len(LENGTHS) * 3 // 2])
@pytest.mark.parametrize(("per", "perturbed"), [("image", 1), (3, 3), ("row", len(LENGTHS))])
def test_the_tower_runs_each_image_once_for_each_way_it_is_shown(
    per: PerturbUnit, perturbed: int, rows_each: int, folder: Path, layout: Layout
) -> None:
    """Also where a group is cut: with three rows to a micro-batch, one has rows of two groups."""
    rows = responses()
    policy = make_policy(folder, layout, per=per, shared=True, rows_each=rows_each)
    images = ImagesRun(policy)
    assert images.of(lambda: policy.score(rows, step=1, views="original")) == (GROUPS, 0)
    assert images.of(lambda: policy.score(rows, step=1, views="both")) == (GROUPS * (1 + perturbed), 0)
    assert images.of(lambda: policy.accumulate_gradients(batch_of(rows))) == (GROUPS, GROUPS)
