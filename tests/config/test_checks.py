"""Each refusal of an impossible combination, by the numbers in its message; and that what is possible passes."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_vppo.config.checks import check_device, check_layout, check_warmup, problems_of
from megatron_vppo.config.schema import RunConfig


def config_of(**sections: dict[str, Any]) -> RunConfig:
    data = {"train_files": "x", **sections.pop("data", {})}
    model = {"path": "m", **sections.pop("model", {})}
    return RunConfig.model_validate({"data": data, "model": model, **sections})


def parallel(tp: int, pp: int, dp: int | None = None, cp: int = 1) -> RunConfig:
    return config_of(
        parallel={
            "tensor_model_parallel_size": tp,
            "context_parallel_size": cp,
            "pipeline_model_parallel_size": pp,
            "data_parallel_size": dp,
        }
    )


@pytest.mark.parametrize(
    ("tp", "pp", "dp", "world", "expected"),
    [(1, 1, None, 1, 1), (2, 1, None, 8, 4), (2, 2, 3, 12, 3), (1, 4, 1, 4, 1), (2, 2, None, 4, 1)],
)
def test_layouts_that_fit(tp: int, pp: int, dp: int | None, world: int, expected: int) -> None:
    assert check_layout(parallel(tp, pp, dp), world) == expected


def test_context_parallel_ranks_belong_to_a_model_copy() -> None:
    assert check_layout(parallel(2, 1, cp=2), 8) == 2
    with pytest.raises(ValueError, match=r"context_parallel_size 3 x .* = 6 ranks per model copy does not divide 8"):
        check_layout(parallel(2, 1, cp=3), 8)


@pytest.mark.parametrize(
    ("tp", "pp", "dp", "world", "words"),
    [
        (2, 2, None, 6, ["2 x", "= 4 ranks per model copy", "does not divide 6 ranks", "start 4 or 8 ranks"]),
        (4, 2, None, 2, ["= 8 ranks per model copy", "does not divide 2 ranks", "start 8 ranks"]),
        (2, 2, 3, 8, ["data_parallel_size 3 = 12", "there are 8 ranks", "data_parallel_size=2", "start 12 ranks"]),
    ],
)
def test_layouts_that_do_not_fit(tp: int, pp: int, dp: int | None, world: int, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        check_layout(parallel(tp, pp, dp), world)
    for word in words:
        assert word in str(caught.value)


IMPOSSIBLE: list[tuple[dict[str, dict[str, Any]], list[str]]] = [
    (
        {"parallel": {"pipeline_model_parallel_size": 2, "pipeline_layers": [1, 2, 1]}},
        ["pipeline_layers [1, 2, 1] describes 3 stages", "pipeline_model_parallel_size is 2"],
    ),
    (
        {
            "parallel": {
                "pipeline_model_parallel_size": 2,
                "virtual_pipeline_model_parallel_size": 2,
                "pipeline_layers": [1, 3],
            }
        },
        ["[1, 3] describes 2 stages", "2 with 2 virtual stages on each rank", "4 in all"],
    ),
    ({"parallel": {"virtual_pipeline_model_parallel_size": 2}}, ["pipeline_model_parallel_size is 1", "raise it"]),
    ({"model": {"freeze": ["vision_tower", "projector", "language_model"]}}, ["nothing is left to train"]),
    ({"fp8": {"recipe": "blockwise", "scope": []}}, ["fp8.recipe 'blockwise'", "used nowhere", "fp8.scope is empty"]),
    (
        {"fp8": {"recipe": "delayed", "scope": ["scoring"]}},
        ["fp8.recipe 'delayed'", "add 'update' to it", "'tensorwise'"],
    ),
    (
        {"actor": {"offload": ["optimizer"]}, "rollout": {"free_cache_engine": False}},
        ["actor.offload ['optimizer']", "rollout.free_cache_engine=false", "leave one"],
    ),
    (
        {"model": {"dtype": "float32"}, "rollout": {"quantization": "fp8"}},
        ["rollout.quantization 'fp8' needs model.dtype=bfloat16", "float32"],
    ),
    (
        {"data": {"rollout_batch_size": 48}, "actor": {"global_batch_size": 20}},
        [
            "rollout_batch_size 48",
            "global_batch_size 20",
            "8 prompts would be left over",
            "global_batch_size=16",
            "=40",
        ],
    ),
    (
        {"data": {"rollout_batch_size": 16}, "actor": {"global_batch_size": 128}},
        ["global_batch_size 128 is more than data.rollout_batch_size 16"],
    ),
    (
        {
            "actor": {"max_tokens_per_micro_batch": 4094},
            "data": {"max_prompt_length": 2048, "max_response_length": 2048},
        },
        ["max_tokens_per_micro_batch is 4094", "row has 4095 tokens", "2048 - 1", "set at least 4095"],
    ),
    (
        {
            "algorithm": {"dependency": "visual_focus"},
            "actor": {"max_tokens_per_micro_batch": 4095},
            "data": {"max_prompt_length": 2048, "max_response_length": 2048},
        },
        ["max_tokens_per_micro_batch is 4095", "row has 4096 tokens", "'visual_focus' reads", "set at least 4096"],
    ),
    ({"rollout": {"top_k": 0}}, ["rollout.top_k is 0", "-1 (off)"]),
    ({"rollout": {"val": {"temperature": 0, "n": 4}}}, ["val.temperature is 0", "all 4", "rollout.val.n=1"]),
    ({"rollout": {"top_p": 0.9}, "algorithm": {"rollout_correction_cap": 2}}, ["cap 2.0", "top_p 0.9", "top_p=1"]),
    ({"rollout": {"top_k": 50}, "algorithm": {"rollout_correction_cap": 2}}, ["cap 2.0", "top_k 50", "top_k=-1"]),
    ({"algorithm": {"perturb": {"patch_size": 14}}}, ["patch_size 14 has no effect at stage 'patches'"]),
    (
        {"data": {"background": "#808080"}, "algorithm": {"resize": "easyr1"}},
        ["data.background '#808080' has no effect with algorithm.resize 'easyr1'", "algorithm.resize=smart"],
    ),
    ({"algorithm": {"perturb": {"stage": "pixels"}}}, ["set algorithm.perturb.patch_size", "14"]),
    ({"algorithm": {"reference_devices": 8}}, ["reference_devices 8 has no effect", "preset=reference"]),
    (
        {"algorithm": {"preset": "reference", "reference_devices": 8, "use_advantage_shaping": False}},
        ["reference_devices 8 has no effect with use_advantage_shaping=false"],
    ),
    ({"algorithm": {"filter_low": 0.6, "filter_high": 0.6}}, ["filter_low 0.6 and filter_high 0.6"]),
    (
        {"rollout": {"order": "arrival"}, "algorithm": {"online_filtering": False}},
        ["rollout.order 'arrival' has no effect", "online_filtering=false and max_try_make_batch 4"],
    ),
    (
        {"rollout": {"order": "arrival"}, "algorithm": {"max_try_make_batch": 1}},
        ["rollout.order 'arrival' has no effect", "online_filtering=true and max_try_make_batch 1"],
    ),
    (
        {"rollout": {"unfinished": "carry"}, "algorithm": {"online_filtering": False, "rollout_correction_cap": 2}},
        ["rollout.unfinished 'carry' has no effect", "online_filtering=false and max_try_make_batch 4"],
    ),
    (
        {"rollout": {"unfinished": "carry"}, "algorithm": {"max_try_make_batch": 1, "rollout_correction_cap": 2}},
        ["rollout.unfinished 'carry' has no effect", "online_filtering=true and max_try_make_batch 1"],
    ),
    (
        {"rollout": {"unfinished": "carry"}},
        ["rollout.unfinished 'carry' trains on tokens that older weights sampled", "rollout_correction_cap"],
    ),
    (
        {"algorithm": {"use_vppo_on_perception": False, "token_scores": "random", "token_weighting": "soft"}},
        ["algorithm.token_scores 'random' and algorithm.token_weighting 'soft': no effect"],
    ),
    (
        {"algorithm": {"token_scores": "dependency_or_entropy", "token_weighting": "pgpo"}},
        ["token_weighting 'pgpo'", "token_scores is 'dependency_or_entropy'", "token_weighting=mask"],
    ),
    ({"algorithm": {"advantage_scaling_max": 0.8}}, ["advantage_scaling_max 0.8 is below advantage_scaling_min 0.9"]),
    (
        {"algorithm": {"policy_loss": "gspo"}, "parallel": {"context_parallel_size": 2}},
        ["policy_loss 'gspo' needs whole responses", "context_parallel_size 2"],
    ),
    (
        {"algorithm": {"loss_avg_mode": "fixed_length", "loss_denominator": "selected"}},
        ["loss_denominator 'selected' has no effect"],
    ),
    ({"algorithm": {"pgpo_beta": 1.0}}, ["algorithm.pgpo_beta without effect"]),
    ({"algorithm": {"sapo_tau_positive": 2.0}}, ["algorithm.sapo_tau_positive without effect"]),
    (
        {"algorithm": {"advantage_scaling_max": 1.1, "use_advantage_shaping": False}},
        ["advantage_scaling_max 1.1 has no effect"],
    ),
    (
        {"algorithm": {"perception_gradient": "original_view", "perturbed_entropy_coef": 0.03}},
        ["perception_gradient original_view and perturbed_entropy_coef 0.03: no effect", "perception_loss_coef"],
    ),
    (
        {
            "algorithm": {
                "perception_loss_coef": 0.01,
                "perception_gradient": "original_view",
                "perturbed_entropy_coef": 0.03,
            }
        },
        ["perturbed_entropy_coef 0.03 has no effect", "'original_view'", "perception_gradient=both_views"],
    ),
    (
        {
            "algorithm": {"perception_loss_coef": 0.01},
            "data": {"max_prompt_length": 40, "max_response_length": 11},
            "actor": {"max_tokens_per_micro_batch": 99},
        },
        ["max_tokens_per_micro_batch is 99", "2 x 50 tokens", "at least 100", "perception_gradient=original_view"],
    ),
    ({"algorithm": {"kl_in": "reward"}}, ["algorithm.kl_in 'reward': no effect without a reference model"]),
    ({"algorithm": {"rollout_correction": "geometric_mask"}}, ["'geometric_mask' has no effect without a cap"]),
    ({"data": {"min_pixels": 9, "max_pixels": 4}}, ["min_pixels 9 is more than data.max_pixels 4"]),
    ({"actor": {"optim": {"betas": [0.9, 1.0]}}}, ["betas is [0.9, 1.0]"]),
    ({"actor": {"optim": {"min_lr_ratio": 0.1}}}, ["min_lr_ratio 0.1 has no effect", "linear or cosine"]),
    (
        {"actor": {"optim": {"lr": 0.1, "weight_decay": 10}}},
        ["actor.optim.lr 0.1 x weight_decay 10.0 = 1", "weight_decay below 10"],
    ),
    (
        {"actor": {"optim": {"lr_warmup_steps": 11}}, "trainer": {"total_steps": 10}},
        ["lr_warmup_steps 11", "10 steps", "at most 10"],
    ),
    ({"data": {"prompt_key": "answer"}}, ["data.prompt_key and data.answer_key are both 'answer'"]),
    ({"data": {"image_key": "problem"}}, ["data.prompt_key and data.image_key are both 'problem'"]),
    ({"data": {"image_key": "answer"}}, ["data.answer_key and data.image_key are both 'answer'"]),
    ({"rollout": {"val": {"temperature": 0.001}}}, ["val.temperature is 0.001", "0 (greedy) or at least 0.01"]),
    ({"trainer": {"save_freq": 0}}, ["trainer.save_freq is 0"]),
    ({"trainer": {"val_freq": -2}}, ["trainer.val_freq is -2"]),
    (
        {"rollout": {"engine_timeout_seconds": 60}, "parallel": {"collective_timeout_seconds": 60}},
        ["rollout.engine_timeout_seconds 60 is not below parallel.collective_timeout_seconds 60"],
    ),
    (
        {"trainer": {"watchdog": 1}},
        ["trainer.watchdog is 1: half of the steps take longer than 1 times their median"],
    ),
    (
        {"trainer": {"resume": False, "resume_step": 4}},
        ["trainer.resume_step 4 has no effect with trainer.resume=false", "trainer.resume=true"],
    ),
    ({"reward": {"reward_function": "mathruller"}}, ["reward_function is 'mathruller'", "file.py:function"]),
    ({"reward": {"reward_function": "file.py:"}}, ["reward_function is 'file.py:'"]),
    (
        {"reward": {"reward_function": "file.py:f", "parts": {"format": 1}}},
        ["reward.parts adds up built-in graders", "'file.py:f'", "add up in your function"],
    ),
    (
        {"reward": {"reward_function": "choice", "parts": {"number": 0.9, "format": 0.1}}},
        ["reward.parts {'number': 0.9, 'format': 0.1} has no weight for reward.reward_function 'choice'"],
    ),
    (
        {"reward": {"reward_function_kwargs": {"scale": 2}}},
        ["reward.reward_function_kwargs {'scale': 2} are arguments", "the built-in 'mathruler'"],
    ),
    ({"reward": {"relative_tolerance": 0.05}}, ["relative_tolerance 0.05 is for the grader 'number'", "of mathruler;"]),
    ({"reward": {"absolute_tolerance": 1}}, ["absolute_tolerance 1 is for the grader 'number'"]),
    ({"reward": {"reward_function": "f.py:g", "iou_threshold": 0.7}}, ["set reward.reward_function=iou"]),
]


@pytest.mark.parametrize(("sections", "words"), IMPOSSIBLE, ids=lambda value: str(value)[:60])
def test_impossible_combination(sections: dict[str, dict[str, Any]], words: list[str]) -> None:
    (message,) = problems_of(config_of(**sections))
    for word in words:
        assert word in message


POSSIBLE: list[dict[str, dict[str, Any]]] = [
    {},
    {"algorithm": {"preset": "reference", "reference_devices": 8}},
    {"algorithm": {"preset": "reference", "perturb": {"stage": "patches"}}},
    {"algorithm": {"preset": "reference", "perturb": {"kind": "gaussian_noise"}}},
    {"algorithm": {"perturb": {"stage": "pixels", "patch_size": 28}}},
    {"algorithm": {"perturb": {"stage": "pixels", "kind": "gaussian_blur"}}},
    {"algorithm": {"use_vppo_on_perception": False}},  # shaping alone, and filtering alone, are both real runs
    {"algorithm": {"use_advantage_shaping": False}},
    {"algorithm": {"online_filtering": False, "filter_low": 1.0, "filter_high": 0.0}},
    {"rollout": {"order": "arrival"}},
    {"rollout": {"unfinished": "carry"}, "algorithm": {"rollout_correction_cap": 2}},
    {"algorithm": {"rollout_correction_cap": 2}},
    {"algorithm": {"kl_coef": 0.01, "kl_in": "reward", "kl_kind": "k1"}},
    {"algorithm": {"rollout_correction_cap": 3, "rollout_correction": "sequence_mask"}},
    {"algorithm": {"token_scores": "entropy", "token_weighting": "soft", "advantage_scaling_max": 1.1}},
    {"algorithm": {"perception_loss_coef": 0.01, "perturbed_entropy_coef": 0.03}},
    {"algorithm": {"perception_loss_coef": 0.01, "perception_gradient": "original_view"}},
    {
        "algorithm": {"perception_loss_coef": 0.01},
        "data": {"max_prompt_length": 40, "max_response_length": 11},
        "actor": {"max_tokens_per_micro_batch": 100},
    },
    {
        "algorithm": {"dependency": "visual_focus"},
        "data": {"max_prompt_length": 40, "max_response_length": 11},
        "actor": {"max_tokens_per_micro_batch": 51},
    },
    {  # nothing reads the dependency
        "algorithm": {
            "dependency": "visual_focus",
            "use_advantage_shaping": False,
            "token_scores": "entropy",
        },
        "data": {"max_prompt_length": 40, "max_response_length": 11},
        "actor": {"max_tokens_per_micro_batch": 50},
    },
    {"algorithm": {"policy_loss": "gspo", "loss_avg_mode": "fixed_length", "advantage": "dr_grpo"}},
    {"rollout": {"val": {"temperature": 0}}},
    {"trainer": {"save_freq": -1, "val_freq": -1}},
    {"actor": {"optim": {"lr_warmup_steps": 10}}, "trainer": {"total_steps": 10}},
    {"actor": {"optim": {"lr_warmup_steps": 1000}}},  # total_epochs: the number of steps is not known yet
    {"parallel": {"pipeline_model_parallel_size": 2, "pipeline_layers": [1, 3]}},
    {"parallel": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 3}},
    {"model": {"freeze": ["vision_tower", "projector"]}},
    {"data": {"rollout_batch_size": 48}, "actor": {"global_batch_size": 48}},
    {"reward": {"reward_function": "my/grader.py:score", "reward_function_kwargs": {"scale": 2}}},
    {"reward": {"reward_function": "choice", "parts": {"choice": 0.9, "format": 0.1}}},
    {"reward": {"reward_function": "iou", "iou_threshold": 0.7}},
    {"reward": {"parts": {"mathruler": 0.5, "number": 0.5}, "relative_tolerance": 0.05}},
]


def test_the_steps_of_a_run_by_epochs_bound_its_warm_up() -> None:
    config = config_of(actor={"optim": {"lr_warmup_steps": 8}})
    check_warmup(config, total_steps=8)
    with pytest.raises(ValueError, match="lr_warmup_steps 8 is more than the 7 steps of the run"):
        check_warmup(config, total_steps=7)


@pytest.mark.parametrize("sections", POSSIBLE, ids=str)
def test_possible_combination(sections: dict[str, dict[str, Any]]) -> None:
    assert problems_of(config_of(**sections)) == []


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"actor": {"offload": ["params", "grads"]}}, "actor.offload is ['params', 'grads'], which needs GPUs"),
        ({"rollout": {"free_cache_engine": True}}, "rollout.free_cache_engine is True, which needs GPUs"),
        ({"rollout": {"weight_transfer": "ipc"}}, "rollout.weight_transfer is ipc, which needs GPUs"),
        ({"rollout": {"quantization": "fp8"}}, "rollout.quantization is fp8, which needs GPUs"),
    ],
)
def test_settings_that_need_gpus(sections: dict[str, dict[str, Any]], words: str) -> None:
    config = config_of(**sections)
    check_device(config, on_cpu=False)
    with pytest.raises(ValueError) as caught:
        check_device(config, on_cpu=True)
    assert words in str(caught.value)


@pytest.mark.parametrize("rollout", [{}, {"free_cache_engine": False, "weight_transfer": "shm"}])
def test_the_same_file_runs_on_cpu_where_it_asks_for_nothing_else(rollout: dict[str, Any]) -> None:
    check_device(config_of(rollout=rollout), on_cpu=True)
