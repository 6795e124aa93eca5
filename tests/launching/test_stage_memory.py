"""The bytes of a stage: Megatron's buffers on meta, against arithmetic by hand, `vppo plan`, and real gloo ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vppo.config.schema import RunConfig
from megatron_vppo.launching.batches import divide_step
from megatron_vppo.launching.dry_run import report_stages
from megatron_vppo.launching.fake_world import META, fake_rank, meta_device
from megatron_vppo.launching.longest_rows import ZeroPixels, longest_responses, shortest_responses
from megatron_vppo.launching.meta_step import update_views
from megatron_vppo.launching.stage_memory import StageReport, report_stage, state_of
from megatron_vppo.models.families import family_of, weight_map
from megatron_vppo.models.hf_config import HfConfig, vision_token_ids
from megatron_vppo.models.options import ModelOptions
from megatron_vppo.parallel.layout import Layout, init_layout
from megatron_vppo.parallel.schedule import ScheduleRunner
from megatron_vppo.parallel.training import Trainable, make_trainable
from megatron_vppo.planning.activations import Kernels, LayerSplit, language_saved, vision_saved
from megatron_vppo.planning.published import published_config
from megatron_vppo.planning.sizes import language_sizes, stage_values, vision_sizes
from megatron_vppo.planning.state import StateBytes, state_bytes
from megatron_vppo.setup.policy import DTYPES, build_stages, optim_settings, policy_settings
from tests.gloo import run_gloo
from tests.launching.runs import PROMPT, RESPONSE, four_layers, run_config
from tests.models.tiny import tiny_qwen3_config
from tests.planning.test_activations import small_config

GIB = 2**30


def options_of(config: RunConfig) -> ModelOptions:
    parallel = config.parallel
    return ModelOptions(
        sequence_parallel=parallel.sequence_parallel,
        virtual_stages=parallel.virtual_pipeline_model_parallel_size,
        recompute=parallel.recompute,
        vision_split=parallel.vision_split,
        frozen=frozenset(config.model.freeze),
    )


def report(config: RunConfig, hf_config: HfConfig, *, rank: int, world_size: int, data: int) -> StageReport:
    responses, batches = longest_responses(config, hf_config), divide_step(config, data=data)
    return report_stage(
        config, hf_config, options_of(config), responses, batches=batches, rank=rank, world_size=world_size
    )


# --- The 32B on 32 GPUs -----------------------------------------------------------------------------------------------


def thirty_two(*, overlap_grad_reduce: bool) -> RunConfig:
    return run_config(
        data={"max_prompt_length": 4096, "max_response_length": 2048, "max_pixels": 1003520, "rollout_batch_size": 16},
        parallel={
            "tensor_model_parallel_size": 4,
            "pipeline_model_parallel_size": 2,
            "sequence_parallel": True,
            "overlap_grad_reduce": overlap_grad_reduce,
            "recompute": "full",
        },
        actor={"global_batch_size": 16, "micro_batch_size_per_device_for_update": 4},
        rollout={"n": 8},
    )


@pytest.mark.filterwarnings("ignore:When using async grad allreduce:UserWarning")
def test_buckets_pad_by_nearly_nothing() -> None:
    """Buckets of at least 40 million values, each padded by less than 128 values for each of four replicas, on the
    first stage; one on the second."""
    hf_config = published_config("qwen2.5-vl-32b")
    for rank in (0, 16):
        one, cut = (
            report(
                hf_config=hf_config, config=thirty_two(overlap_grad_reduce=overlap), rank=rank, world_size=32, data=4
            )
            for overlap in (False, True)
        )
        buckets = one.state.weights // 2 // 40_000_000
        more = (cut.state.weights - one.state.weights) // 2
        assert (0 < more < 128 * 4 * buckets) if rank == 0 else more == 0
        assert cut.state.gradients - one.state.gradients == 4 * more
        assert (cut.step, cut.update) == (one.step, one.update)


@pytest.mark.filterwarnings("ignore:When using async grad allreduce:UserWarning")
def test_a_32b_by_hand() -> None:
    """TP 4, PP 2, DP 4: 7.95, 15.90 and 11.93 GiB on a rank of the first stage; 7.63, 15.26 and 11.44 on the second."""
    hf_config, config = published_config("qwen2.5-vl-32b"), thirty_two(overlap_grad_reduce=False)
    hidden, ffn, vocabulary, tensor = 5120, 27648, 152064, 4
    heads, keys = 40 * 128, 8 * 128
    layer = (heads + 2 * keys) * (hidden + 1) // tensor + heads * hidden // tensor + 3 * hidden * ffn // tensor
    layer += 2 * hidden  # norms, which every rank holds
    # The tower: QKV and MLP with biases, split except for those of the second matrices; RMSNorms.
    width, mlp = 1280, 3456
    block = (3 * width * (width + 1) + width * width + 2 * mlp * (width + 1) + mlp * width) // tensor + 4 * width
    merged = 4 * width
    tower = 32 * block + width * 3 * 2 * 14 * 14 + width
    tower += (merged * (merged + 1) + merged * hidden) // tensor + hidden
    first = 32 * layer + vocabulary * hidden // tensor + tower
    second = 32 * layer + vocabulary * hidden // tensor + hidden
    expected = {0: (7.95, 15.90, 11.93), 1: (7.63, 15.26, 11.44)}
    for stage, values in enumerate((first, second)):
        found = report(config, hf_config, rank=16 * stage, world_size=32, data=4)
        state = found.state
        # Megatron aligns parameters to 64 values and buckets to 128: less than 1 % of 1 %.
        assert state.weights == pytest.approx(2 * values, rel=1e-4) and state.weights >= 2 * values
        assert (state.gradients, state.optimizer) == (2 * state.weights, pytest.approx(12 * values / 4, rel=1e-4))
        in_gib = (state.weights / GIB, state.gradients / GIB, state.optimizer / GIB)
        assert tuple(round(size, 2) for size in in_gib) == expected[stage]
        entries = weight_map(hf_config, family=family_of(hf_config))
        planned = stage_values(entries, stage_layers=(32, 32), stage=stage, tensor=4)
        assert state == state_bytes(planned, dtype_bytes=2, replicas=4, distributed=True), "as `vppo plan` has it"

        assert found.layers == (32,) and found.in_flight == (2 - stage,)
        # A prompt of 4096 tokens and four responses of 2048 - 1 to it, a multiple of 4 together; each layer keeps its
        # input of a fourth.
        tokens = 4096 + 4 * 2047
        assert found.step.batch.tokens == tokens
        assert found.step.batch.patches == (5120 if stage == 0 else 0)
        inputs = 32 * tokens // 4 * hidden * 2
        assert found.step.kept[0] > inputs
        if stage == 1:
            # besides: the input of the final norm, in fp32 the angles of all tokens and one statistic of the norm's
            assert found.step.kept[0] == inputs + tokens // 4 * hidden * 2 + tokens * 128 * 4 + tokens // 4 * 4
            assert found.step.output == (tokens * hidden * 2,)


# --- What autograd keeps, against the formulas that real runs have confirmed ------------------------------------------


@pytest.mark.filterwarnings("ignore:If you are using transformer_engine:UserWarning")
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("shared", [False, True])
def test_kept_bytes_equal_the_formulas(family: str, recompute: Any, shared: bool) -> None:
    """The formulas leave out norm statistics and index tensors, and with 'full' deepstack's features
    (tests/planning/test_activations.py).

    They are those of whole rows. Where responses share their prompt, attention keeps a copy of its keys and values for
    each of them, and its outputs once more, since they come from several calls.
    """
    hf_config = small_config(family)
    config = run_config(
        data={"max_prompt_length": 200, "max_response_length": 57, "max_pixels": 96 * 28 * 28},
        parallel={"recompute": recompute, "shared_prefix": shared},
        rollout={"n": 2},
    )
    found = report(config, hf_config, rank=0, world_size=1, data=1)
    batch = found.step.batch
    tokens, prompts = (200 + 2 * 56, 1) if shared else (2 * 256, 2)
    assert (batch.tokens, batch.patches, batch.image_tokens) == (tokens, 4 * 96, prompts * 96)
    kernels = Kernels(dtype_bytes=2, fused_rms_norm=True)
    language, vision = language_sizes(hf_config), vision_sizes(hf_config)
    formula = language_saved(
        language,
        batch,
        layers=language.layers,
        taps=vision.taps,
        is_first=True,
        is_last=True,
        split=LayerSplit(tensor=1, context=1, sequence_parallel=False),
        kernels=kernels,
        recompute=recompute,
    ) + vision_saved(vision, batch.patches, tensor=1, kernels=kernels, recompute=recompute)
    if shared and recompute == "none":
        layer = language.layer
        copies = 2 * (200 + 56) * 2 * layer.kv_heads + tokens * layer.heads
        formula += language.layers * copies * layer.head_dim * 2
    assert found.step.kept[0] == pytest.approx(formula, rel=0.05 if recompute == "full" else 0.01)


def test_both_views_in_the_update_are_kept() -> None:
    """Two rows of 256 tokens in two views, and their image as it is and perturbed. Scoring reads half of that."""
    hf_config = small_config("qwen2_5_vl")
    papo = {"use_vppo_on_perception": False, "use_advantage_shaping": False, "perception_loss_coef": 0.01}
    config = run_config(
        data={"max_prompt_length": 200, "max_response_length": 57, "max_pixels": 96 * 28 * 28},
        actor={"micro_batch_size_per_device_for_experience": 2},
        parallel={"shared_prefix": False},
        rollout={"n": 2},
        algorithm=papo,
    )
    constant = run_config(**{**config.model_dump(), "algorithm": {**papo, "perception_gradient": "original_view"}})
    both, once = (report(each, hf_config, rank=0, world_size=1, data=1) for each in (config, constant))
    batch = both.step.batch
    assert (batch.tokens, batch.response_tokens, batch.patches) == (4 * 256, 4 * 57, 2 * 4 * 96)
    assert once.step.batch.tokens == 2 * 256
    assert both.step.kept[0] == pytest.approx(2 * once.step.kept[0], rel=0.01)
    assert both.score.total == pytest.approx(once.score.total / 2, rel=0.01)


def test_scoring_that_reads_the_last_tokens_takes_as_much_more() -> None:
    """One row has 257 tokens rather than 256 where the hidden state of its last token is compared."""
    shape: dict[str, Any] = {
        "data": {"max_prompt_length": 200, "max_response_length": 57, "max_pixels": 4 * 28 * 28},
        "actor": {"micro_batch_size_per_device_for_experience": 1},
        "rollout": {"n": 2},
    }
    unread = {"use_vppo_on_perception": False, "use_advantage_shaping": False}
    usual, to_end = (
        report(run_config(**shape, algorithm=algorithm), small_config("qwen2_5_vl"), rank=0, world_size=1, data=1)
        for algorithm in (unread, {"dependency": "visual_focus"})
    )
    assert to_end.score.layers == pytest.approx(usual.score.layers * 257 / 256, rel=1e-4)
    assert to_end.step == usual.step


def test_micro_batches_of_tokens_hold_long_rows_or_many_images() -> None:
    """640 tokens: two groups of 200 + 2 x 56 tokens, padded to 640; or four prompts of an image of 96 and three more
    tokens, padded to ten sixteenths."""
    hf_config = small_config("qwen2_5_vl")
    config = run_config(
        data={"max_prompt_length": 200, "max_response_length": 57, "max_pixels": 96 * 28 * 28},
        actor={"global_batch_size": 4, "max_tokens_per_micro_batch": 640},
        rollout={"n": 2},
    )
    (found,) = report_stages(config, hf_config, divide_step(config, data=1), world_size=1)
    of_kinds = [
        report_stage(
            config, hf_config, options_of(config), kind(config, hf_config), batches=divide_step(config, data=1), rank=0,
            world_size=1,
        )
        for kind in (longest_responses, shortest_responses)
    ]  # fmt: skip
    batches = [report.step.batch for report in of_kinds]
    assert [(batch.tokens, batch.patches) for batch in batches] == [(640, 2 * 384), (400, 4 * 384)]
    assert found.update.total == max(report.update.total for report in of_kinds)
    assert found.score.total == max(report.score.total for report in of_kinds)
    assert divide_step(config, data=1).update.micro_batches == 2


# --- Real ranks -------------------------------------------------------------------------------------------------------

WORLDS = {
    "TP 2 x DP 2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP 2 x DP 2": {"pipeline_model_parallel_size": 2},
    "CP 2 x DP 2": {"context_parallel_size": 2},
}
MODELS = {
    "bfloat16": ({"dtype": "bfloat16"}, {}),
    "float32, frozen tower, no distributed optimizer": (
        {"dtype": "float32", "freeze": ["vision_tower"]},
        {"use_distributed_optimizer": False},
    ),
}


def configs(world: str) -> list[RunConfig]:
    return [run_config(model=model, parallel={**WORLDS[world], **extra}) for model, extra in MODELS.values()]


def real_ranks(rank: int, world_size: int, world: str) -> list[tuple[StateBytes, int]]:
    """(state, tokens of the micro-batch) of each model on a rank that holds it."""
    return [_real(config, four_layers()) for config in configs(world)]


def _real(config: RunConfig, hf_config: HfConfig) -> tuple[StateBytes, int]:
    parallel = config.parallel
    layout = init_layout(
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        context=parallel.context_parallel_size,
        timeout_seconds=60,
    )
    try:
        trainable = _trainable(config, layout, hf_config, device=layout.device)
        trainable.zero_gradients()
        trainable.step()  # the moments are made in the first step
        return _measured(trainable), _packed_tokens(config, layout, hf_config, trainable)
    finally:
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()


def _trainable(config: RunConfig, layout: Layout, hf_config: HfConfig, *, device: torch.device) -> Trainable:
    stages = build_stages(config, layout, hf_config, options_of(config), device=device)
    for stage in stages:
        for parameter in stage.parameters():
            torch.nn.init.constant_(parameter, 0.01)
    return make_trainable(
        stages,
        layout=layout,
        settings=optim_settings(config, total_steps=1, on_gpu=True),
        dtype=DTYPES[config.model.dtype],
        frozen=options_of(config).frozen,
    )


def _measured(trainable: Trainable) -> StateBytes:
    """Counts storages by their addresses, moments included."""

    def sizes(tensors: Any) -> dict[int, int]:
        storages = [tensor.untyped_storage() for tensor in tensors]
        return {storage.data_ptr(): storage.nbytes() for storage in storages}

    weights = sizes(p for stage in trainable.stages for p in stage.parameters())
    gradients = sizes(buffer.grad_data for ddp in trainable.ddps for buffer in ddp.buffers)
    (inner,) = getattr(trainable.optimizer, "chained_optimizers", [trainable.optimizer])
    kept: list[Tensor] = [p for group in inner.optimizer.param_groups for p in group["params"]]
    kept += [value for state in inner.optimizer.state.values() for value in state.values() if value.dim()]
    optimizer = {key: size for key, size in sizes(kept).items() if key not in weights}
    return StateBytes(sum(weights.values()), sum(gradients.values()), sum(optimizer.values()))


def _packed_tokens(config: RunConfig, layout: Layout, hf_config: HfConfig, trainable: Trainable) -> int:
    runner = ScheduleRunner(
        trainable.stages,
        hf_config=hf_config,
        layout=layout,
        settings=policy_settings(
            config, hf_config, options_of(config), banned_ids=vision_token_ids(hf_config), on_gpu=True
        ),
        pixels=ZeroPixels(hf_config, patches=48),
    )
    responses = longest_responses(config, hf_config)
    batch = runner.packer.pack(responses, update_views(runner, responses, per=None))
    return batch.packed.token_ids_K.numel()


@pytest.mark.distributed
@pytest.mark.parametrize(
    "world", [pytest.param(name, marks=[] if "TP" in name else [pytest.mark.extended]) for name in WORLDS]
)
def test_fake_ranks_hold_what_real_ranks_hold(world: str) -> None:
    """Every rank, to the byte; and the longest micro-batch has as many tokens."""
    real = run_gloo(real_ranks, 4, world)
    # Two rows of 40 + 9 - 1 = 48 tokens, which two and four ranks divide.
    assert {tokens for of_rank in real for _, tokens in of_rank} == {2 * (PROMPT + RESPONSE - 1)}
    for number, config in enumerate(configs(world)):
        for rank, of_rank in enumerate(real):
            with fake_rank(config.parallel, rank=rank, world_size=4) as layout, meta_device():
                fake = state_of(_trainable(config, layout, four_layers(), device=META))
            assert fake == of_rank[number][0], (world, config.model, rank)
        fullest = [report(config, four_layers(), rank=rank, world_size=4, data=2) for rank in range(4)]
        by_stage: dict[int, list[StageReport]] = {}
        for found in fullest:
            by_stage.setdefault(found.pipeline_rank, []).append(found)
        for reports in by_stage.values():
            first = reports[0]
            assert first.step.batch.tokens == 2 * (PROMPT + RESPONSE - 1)
            for other in reports:  # the first rank of a stage stands for all of them
                assert (other.state.weights, other.state.gradients) == (first.state.weights, first.state.gradients)
                assert sum(other.step.kept) <= sum(first.step.kept)


# --- Several stages on a rank, and a whole tower on each --------------------------------------------------------------


def test_virtual_stages_are_counted_one_by_one() -> None:
    config = run_config(
        parallel={"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2, "recompute": "full"},
        actor={"micro_batch_size_per_device_for_update": 1},
    )
    first, second = (report(config, four_layers(), rank=rank, world_size=2, data=1) for rank in (0, 1))
    assert (first.layers, second.layers) == ((1, 1), (1, 1))
    assert (first.in_flight, second.in_flight) == ((3, 2), (2, 1))
    assert first.step.kept[0] > first.step.kept[1], "the tower lies on the first stage"
    assert second.update.head > 0 and first.update.head == 0
    kept = [3 * (first.step.kept[0] + first.step.output[0]), 2 * (first.step.kept[1] + first.step.output[1])]
    assert first.update.layers > sum(kept)
    plain = run_config(parallel={"pipeline_model_parallel_size": 2})
    whole = report(plain, four_layers(), rank=0, world_size=2, data=1)
    assert first.state.weights == pytest.approx(whole.state.weights, rel=0.1), "other layers, as many of them"


def test_ranks_that_share_images_out() -> None:
    """Two tensor-parallel ranks have a whole tower each; of one image the first rank takes all patches."""
    two = {"n": 2}  # rows of a micro-batch: those of one group
    config = run_config(parallel={"tensor_model_parallel_size": 2, "vision_split": "images"}, rollout=two)
    hf_config = tiny_qwen3_config(tied=True, vocab=299, taps=(0, 2), num_hidden_layers=4)
    split = run_config(parallel={"tensor_model_parallel_size": 2}, rollout=two)
    whole, half = (report(each, hf_config, rank=0, world_size=2, data=1) for each in (config, split))
    assert whole.step.batch.patches == half.step.batch.patches == 48
    assert report(config, hf_config, rank=1, world_size=2, data=1).step.batch.patches == 0
    assert whole.state.weights > half.state.weights and whole.step.kept[0] > half.step.kept[0]
