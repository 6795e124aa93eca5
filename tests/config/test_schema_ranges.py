"""Every number of the schema has its range. The bounds are written down here by hand, for every setting by its name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from megatron_vppo.config.checks import CHECKS
from megatron_vppo.config.load import load_config
from megatron_vppo.config.schema import RunConfig

NAMED_CHECKS = {
    "trainer.val_freq": "check_intervals",
    "trainer.save_freq": "check_intervals",
    "trainer.save_limit": "check_intervals",
    "rollout.top_k": "check_sampling",
    "rollout.val.temperature": "check_sampling",
    "actor.optim.betas": "check_optimizer",
}
"""Settings whose range a check of `config/checks.py` holds, since it is more than one interval or a list."""

LARGEST_INT = 2**31 - 1
LARGEST_FLOAT = 3.4e38
MONTH = 30 * 24 * 3600

RANGES: tuple[tuple[tuple[Any, ...], tuple[Any, ...], str], ...] = (
    (
        (0, -1, LARGEST_INT + 1),
        (1, LARGEST_INT, 8.0),
        "data.max_prompt_length data.max_response_length data.rollout_batch_size "
        "data.max_val_rows parallel.tensor_model_parallel_size parallel.pipeline_model_parallel_size "
        "parallel.data_parallel_size parallel.context_parallel_size parallel.virtual_pipeline_model_parallel_size "
        "algorithm.max_try_make_batch algorithm.reference_devices actor.global_batch_size actor.ppo_epochs "
        "actor.micro_batch_size_per_device_for_update actor.micro_batch_size_per_device_for_experience "
        "actor.max_tokens_per_micro_batch "
        "actor.head_chunk_tokens rollout.tensor_parallel_size rollout.num_engines rollout.max_images_per_prompt "
        "trainer.total_steps trainer.total_epochs trainer.resume_step "
        "trainer.max_attempts_without_progress",
    ),
    ((0, 2**27 + 1), (1, 2**27), "data.min_pixels data.max_pixels"),
    (
        (-1, LARGEST_INT + 1),
        (0, 1, LARGEST_INT),
        "fp8.bf16_layers_at_ends actor.optim.lr_warmup_steps reward.overlong_buffer_tokens",
    ),
    ((0, 1025), (1, 1024), "parallel.threads_per_rank rollout.threads_per_engine reward.num_workers"),
    ((-1, 1025), (0, 1024), "data.num_workers"),
    ((0, 2**14 + 1), (1, 2**14), "algorithm.perturb.patch_size"),
    ((-1, 256), (0, 255), "algorithm.perturb.grey_level"),
    ((-1, 21), (0, 20), "algorithm.score_centering_tokens"),
    ((0, -1, "group"), (1, LARGEST_INT, "row"), "algorithm.perturb.per"),
    ((1, 2**16 + 1), (2, 2**16), "rollout.n"),
    ((0, 2**16 + 1), (1, 2**16), "rollout.val.n"),
    ((0, 8193), (1, 8192), "rollout.max_num_seqs"),
    ((-1, 2**32), (0, 2**32 - 1), "trainer.seed"),
    (
        (-2, 0, LARGEST_INT + 1),
        (-1, 1, LARGEST_INT),
        "trainer.val_freq trainer.save_freq trainer.save_limit rollout.top_k",
    ),
    (([0], [2, -1], [LARGEST_INT + 1]), ([1], [28]), "parallel.pipeline_layers"),
    (
        (-0.001, 1.001),
        (0, 0.5, 1),
        "algorithm.perturb.probability algorithm.filter_low algorithm.filter_high actor.optim.min_lr_ratio "
        "reward.relative_tolerance algorithm.vepo_alpha",
    ),
    (
        (0, 1.001),
        (1e-6, 1),
        "algorithm.top_p_perception_tokens algorithm.advantage_scaling_min rollout.top_p rollout.val.top_p "
        "reward.max_error_share reward.iou_threshold algorithm.vgpo_tail algorithm.vgpo_top",
    ),
    ((0, 1), (0.001, 0.999), "algorithm.clip_ratio_low algorithm.pgpo_tau rollout.gpu_memory_utilization"),
    (
        (0, -1.0, LARGEST_FLOAT * 1.1),
        (1e-6, 100, LARGEST_FLOAT),
        "algorithm.clip_ratio_high algorithm.rollout_correction_cap algorithm.perturb.noise_std actor.max_grad_norm "
        "algorithm.advantage_scaling_max algorithm.sapo_tau_positive algorithm.sapo_tau_negative "
        "rollout.cpu_kv_cache_gib rollout.logprob_diff_bound reward.overlong_penalty",
    ),
    (
        (-0.001, LARGEST_FLOAT * 1.1),
        (0, 100, LARGEST_FLOAT),
        "algorithm.entropy_penalty_coef algorithm.kl_coef algorithm.perception_loss_coef "
        "algorithm.perturbed_entropy_coef algorithm.pgpo_beta actor.optim.weight_decay "
        "reward.absolute_tolerance algorithm.vgpo_strength",
    ),
    (
        ({"format": 0}, {"format": -1}, {"format": LARGEST_FLOAT * 1.1}),
        ({"format": 1e-6}, {"mathruler": 0.9, "format": 100}),
        "reward.parts",
    ),
    ((1, LARGEST_FLOAT * 1.1), (1.001, LARGEST_FLOAT), "algorithm.clip_ratio_dual"),
    ((0, -1.0, 2**14 + 1), (0.1, 2**14), "algorithm.perturb.blur_radius"),
    ((0, 1.001), (1e-12, 1), "actor.optim.lr"),
    ((0, 1e-38, 1.001), (1.2e-38, 1), "actor.optim.eps"),
    (([-0.1, 0.9], [0.9, 1.0], [0.9, 1.5]), ([0.0, 0.0], [0.9, 0.9999]), "actor.optim.betas"),
    ((0, 0.009, 2.001), (0.01, 2), "rollout.temperature"),
    ((-0.001, 0.009, 2.001), (0, 0.01, 2), "rollout.val.temperature"),
    (
        (0, 0.999, MONTH + 1),
        (1, MONTH),
        "parallel.collective_timeout_seconds rollout.start_timeout_seconds rollout.engine_timeout_seconds "
        "trainer.stop_within_seconds",
    ),
    ((-1, 1001), (0, 1000), "rollout.max_engine_restarts"),
    ((-0.1, 1e6 + 1), (0, 10, 1e6), "trainer.watchdog"),
    ((0, 0.0009, 9 * 3600 + 1), (0.001, 9 * 3600), "reward.timeout_seconds"),
)
"""(values just outside, values inside, the settings that have this range)."""

OUTSIDE = [(name, value) for outside, _, names in RANGES for name in names.split() for value in outside]
INSIDE = [(name, value) for _, inside, names in RANGES for name in names.split() for value in inside]
NUMBERS = [name for _, _, names in RANGES for name in names.split()]
MINIMAL = {"data": {"train_files": "train.jsonl"}, "model": {"path": "m"}}


def number_declarations(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(dotted name, JSON schema of the number) of every number in the schema, those inside lists too."""

    def walk(spec: dict[str, Any], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
        if "$ref" in spec:
            spec = schema["$defs"][spec["$ref"].rpartition("/")[2]]
        for choice in (*spec.get("anyOf", ()), *spec.get("allOf", ()), *spec.get("prefixItems", ())):
            yield from walk(choice, name)
        for inner in (spec.get("items"), spec.get("additionalProperties")):
            if isinstance(inner, dict):
                yield from walk(inner, name)
        for key, inner in spec.get("properties", {}).items():
            yield from walk(inner, f"{name}.{key}" if name else key)
        if spec.get("type") in ("integer", "number"):
            yield name, spec

    yield from walk(schema, "")


def with_setting(name: str, value: Any) -> dict[str, Any]:
    nested = reduce(lambda inner, key: {key: inner}, reversed(name.split(".")), value)
    return {key: {**MINIMAL.get(key, {}), **nested.get(key, {})} for key in {**MINIMAL, **nested}}


def refusal(tmp_path: Path, name: str, value: Any) -> str:
    (tmp_path / "run.yaml").write_text(json.dumps(MINIMAL))
    with pytest.raises(ValueError) as caught:
        load_config(tmp_path / "run.yaml", [f"{name}={json.dumps(value)}"])
    return str(caught.value)


def test_every_number_has_a_range_in_its_declaration_or_in_a_named_check() -> None:
    declared = list(number_declarations(RunConfig.model_json_schema()))
    assert len(declared) > 60
    known = {check.__name__ for check in CHECKS}
    open_ended = {
        name
        for name, spec in declared
        if not spec.keys() & {"minimum", "exclusiveMinimum"} or not spec.keys() & {"maximum", "exclusiveMaximum"}
    }
    assert open_ended - {name for name, check in NAMED_CHECKS.items() if check in known} == set()


def test_every_number_is_tried_here() -> None:
    declared = {name for name, _ in number_declarations(RunConfig.model_json_schema())}
    assert sorted(NUMBERS) == sorted(declared)


def test_a_planted_number_without_a_range_is_found() -> None:
    schema = {
        "properties": {"a": {"$ref": "#/$defs/A"}, "b": {"anyOf": [{"type": "number"}, {"type": "null"}]}},
        "$defs": {"A": {"properties": {"c": {"type": "array", "items": {"type": "integer"}}, "d": {"type": "string"}}}},
    }
    assert [name for name, _ in number_declarations(schema)] == ["a.c", "b"]


@pytest.mark.parametrize(("name", "value"), OUTSIDE)
def test_a_value_outside_is_refused_by_name(tmp_path: Path, name: str, value: Any) -> None:
    message = refusal(tmp_path, name, value)
    assert "1 problem " in message and (f"{name} = " in message or (name in NAMED_CHECKS and name in message)), message


@pytest.mark.parametrize(("name", "value"), INSIDE)
def test_a_value_inside_is_accepted(name: str, value: Any) -> None:
    config = RunConfig.model_validate(with_setting(name, value))
    problems = []
    for check in CHECKS:
        if check.__name__ == NAMED_CHECKS.get(name):
            try:
                check(config)
            except ValueError as problem:
                problems.append(str(problem))
    assert problems == []


@pytest.mark.parametrize("name", NUMBERS)
def test_true_is_no_number(tmp_path: Path, name: str) -> None:
    value = {
        "actor.optim.betas": [True, 0.9],
        "parallel.pipeline_layers": [True],
        "reward.parts": {"format": True},
    }.get(name, True)
    message = refusal(tmp_path, name, value)
    assert f"{name} = " in message and "should be a number, not true or false" in message


# --- Texts ------------------------------------------------------------------------------------------------------------

TEXTS = (
    "data.train_files data.val_files data.prompt_key data.answer_key data.image_key data.image_dir data.format_prompt "
    "model.path reward.reward_function trainer.runs_dir trainer.project_name trainer.experiment_name "
    "trainer.load_checkpoint_path"
)
FOLDERS = ("trainer.project_name", "trainer.experiment_name")


def text_settings(schema: dict[str, Any]) -> set[str]:
    """The settings that hold a text of the user's own, not one of several choices."""
    found = {}
    for section, spec in schema["properties"].items():
        for key, inner in schema["$defs"][spec["$ref"].rpartition("/")[2]]["properties"].items():
            choices = [inner, *inner.get("anyOf", ())]
            found[f"{section}.{key}"] = choices + [one for choice in choices for one in choice.get("oneOf", ())]
    return {
        name
        for name, choices in found.items()
        if any(choice.get("type") == "string" and not choice.keys() & {"enum", "const"} for choice in choices)
    }


def test_every_text_is_tried_here() -> None:
    """An empty system prompt is a system turn without words, which is another prompt than the template's own turn.
    A background is a colour (`setup/inputs.py`).
    """
    others = {"data.system_prompt", "data.background"}
    assert text_settings(RunConfig.model_json_schema()) == {*TEXTS.split(), *others}


@pytest.mark.parametrize("value", ["", " ", "a\0b"])
@pytest.mark.parametrize("name", TEXTS.split())
def test_an_empty_text_is_refused_by_name(tmp_path: Path, name: str, value: str) -> None:
    if name in FOLDERS and value == " ":
        return  # a strange name of a folder, and a possible one
    assert f"{name} = " in refusal(tmp_path, name, value)


@pytest.mark.parametrize("value", [".", "..", "a/b", "/etc", "../x", "x" * 256, "ü" * 128])
@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_not_one_folder_is_refused_by_name(tmp_path: Path, name: str, value: str) -> None:
    message = refusal(tmp_path, name, value)
    assert f"{name} = " in message and "should be the name of one folder: at most 255 bytes" in message


@pytest.mark.parametrize("value", ["x" * 255, "vppo seed 1", "ü" * 127, "...", "a.b"])
def test_a_folder_name_may_be_anything_that_linux_takes(tmp_path: Path, value: str) -> None:
    config = RunConfig.model_validate(with_setting("trainer.experiment_name", value))
    (tmp_path / config.trainer.experiment_name).mkdir()
    assert [path.name for path in tmp_path.iterdir()] == [value]
