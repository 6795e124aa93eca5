"""Settings to what data/ takes: each perturbation with its own parameters, and the background."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_vppo.config.schema import PerturbConfig, RunConfig
from megatron_vppo.data.perturb import BlackPatches, BlackSquares, GaussianBlur, GaussianNoise, GreyImage, Perturbation
from megatron_vppo.data.plain_think import save_plain_tokenizer, think_token_ids
from megatron_vppo.models.hf_config import vision_token_ids
from megatron_vppo.models.model_files import open_without_weights
from megatron_vppo.setup.hardware import model_options
from megatron_vppo.setup.inputs import background_color, make_perturbation, open_inputs, read_prompts
from megatron_vppo.setup.policy import policy_settings
from tests.models.whole import add_think_tokens, save_whole_folder


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, BlackPatches(0.5)),
        ({"probability": 0.25}, BlackPatches(0.25)),
        ({"stage": "pixels", "patch_size": 14}, BlackSquares(0.5, side=14)),
        ({"kind": "gaussian_noise"}, GaussianNoise(189.0)),
        ({"kind": "gaussian_noise", "noise_std": 20}, GaussianNoise(20.0)),
        ({"kind": "gaussian_blur", "blur_radius": 2}, GaussianBlur(2.0)),
        ({"kind": "grey", "grey_level": 7, "stage": "pixels", "patch_size": 14}, GreyImage(7)),
    ],
)
def test_each_kind_gets_its_parameters(settings: dict[str, Any], expected: Perturbation) -> None:
    assert make_perturbation(PerturbConfig.model_validate(settings)) == expected


@pytest.mark.parametrize(
    ("text", "color"), [("white", (255, 255, 255)), ("#0a141e", (10, 20, 30)), ("hsl(0,0%,0%)", (0,) * 3)]
)
def test_a_background_is_a_color(text: str, color: tuple[int, int, int]) -> None:
    assert background_color(_with_background(text).data) == color


@pytest.mark.parametrize("text", ["whitee", "#12345", "#ffffff80", ""])
def test_other_backgrounds_are_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=r"^data\.background: .*set a name such as white, or '#rrggbb'$"):
        background_color(_with_background(text).data)


def _with_background(text: str) -> RunConfig:
    data = {"train_files": "x", "background": text}
    return RunConfig.model_validate({"data": data, "model": {"path": "m"}})


# --- Several files, and the think tags --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits model with tokens for the think tags, as Qwen3-VL Instruct has them."""
    folder = tmp_path_factory.mktemp("model") / "model"
    save_whole_folder(folder)
    add_think_tokens(folder)
    return folder


def config_of(folder: Path, **data: Any) -> RunConfig:
    (folder / "a.jsonl").write_text(json.dumps({"problem": "What is <think> ?", "answer": "1"}))
    (folder / "b.jsonl").write_text(json.dumps({"question": "What is 2?", "answer": "1"}))
    settings = {"train_files": str(folder / "a.jsonl"), **data}
    return RunConfig.model_validate(
        {"data": settings, "model": {"path": "none"}, "trainer": {"runs_dir": str(folder / "runs")}}
    )


def test_plain_think_tags_are_banned_as_tokens_and_in_the_prompts_as_text(tmp_path: Path, model: Path) -> None:
    files = open_without_weights(model)
    own = think_token_ids(files.processor.tokenizer)
    assert len(own) == 2
    found = {}
    for plain in (False, True):
        config = config_of(tmp_path, plain_think_tokens=plain)
        inputs = open_inputs(config, files)
        found[plain] = read_prompts(config, inputs, "train")[0].token_ids
        assert inputs.banned_ids == (*vision_token_ids(files.hf_config), *(own if plain else ()))
        # The trainer leaves out of its softmax what the engines are told never to sample.
        settings = policy_settings(
            config, files.hf_config, model_options(config, on_gpu=False), banned_ids=inputs.banned_ids, on_gpu=False
        )
        assert settings.banned_ids == inputs.banned_ids
    assert own[0] in found[False] and own[0] not in found[True]


def test_an_exported_folder_bans_what_its_run_has_banned(tmp_path: Path, model: Path) -> None:
    """And has its prompts: an evaluation and a further run need no setting."""
    exported = tmp_path / "exported"
    shutil.copytree(model, exported)
    training = open_inputs(config_of(tmp_path, plain_think_tokens=True), open_without_weights(model))
    own = think_token_ids(open_without_weights(model).processor.tokenizer)
    save_plain_tokenizer(training.processor.tokenizer, exported, own_ids=own)
    config = config_of(tmp_path)
    inputs = open_inputs(config, open_without_weights(exported))
    assert set(inputs.banned_ids) == set(training.banned_ids)
    assert read_prompts(config, inputs, "train")[0] == read_prompts(config, training, "train")[0]
    assert inputs.eos_ids == training.eos_ids


def test_each_file_is_opened_with_its_own_settings_under_its_name(tmp_path: Path, model: Path) -> None:
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "a.jsonl").write_text(json.dumps({"problem": "What is 3?", "answer": "1"}) + "\n")
    files = [str(tmp_path / "a.jsonl"), {"path": str(tmp_path / "b.jsonl"), "prompt_key": "question"}]
    config = config_of(tmp_path, train_files=files, val_files=[str(tmp_path / "held" / "a.jsonl")])
    inputs = open_inputs(config, open_without_weights(model))
    assert list(inputs.datasets) == ["train/a", "train/b", "val/a"]
    prompts = [*read_prompts(config, inputs, "train"), *read_prompts(config, inputs, "val")]
    assert [(prompt.split, prompt.row, prompt.problem) for prompt in prompts] == [
        ("train/a", 0, "What is <think> ?"), ("train/b", 0, "What is 2?"), ("val/a", 0, "What is 3?"),
    ]  # fmt: skip
    assert len(list((tmp_path / "runs" / ".checked_rows").iterdir())) == 3, "each file's check is kept apart"


def test_rows_have_to_hold_what_a_function_of_the_users_may_read(tmp_path: Path, model: Path) -> None:
    config = config_of(tmp_path)
    deep = '{"in": ' * 900 + "1" + "}" * 900
    (tmp_path / "a.jsonl").write_text(f'{{"problem": "?", "answer": "1", "extra_info": {deep}}}')
    inputs = open_inputs(config, open_without_weights(model))
    assert len(read_prompts(config, inputs, "train")) == 1
    own = RunConfig.model_validate({**config.model_dump(), "reward": {"reward_function": "r.py:f"}})
    with pytest.raises(ValueError, match="'extra_info' hold records too deep"):
        read_prompts(own, inputs, "train")
