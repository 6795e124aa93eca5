"""Reading of YAML, base files and overrides, and the words of the refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_vppo.config.load import config_of, load_config, nearest_name, save_resolved

MINIMAL = "data: {train_files: train.jsonl}\nmodel: {path: some/model}\n"

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_defaults_file_and_overrides_in_that_order(write: Write) -> None:
    path = write(MINIMAL + "rollout: {n: 4, temperature: 0.7}\n")
    config = load_config(path, ["rollout.n=6", "rollout.n=16"])
    assert (config.rollout.n, config.rollout.temperature, config.rollout.top_p) == (16, 0.7, 1.0)


@pytest.mark.parametrize(
    ("override", "section", "name", "value"),
    [
        ("actor.optim.lr=1e-6", ("actor", "optim"), "lr", 1e-6),
        ("actor.max_grad_norm=3E5", ("actor",), "max_grad_norm", 3e5),
        ("actor.optim.betas=[0.9, 0.95]", ("actor", "optim"), "betas", (0.9, 0.95)),
        ("algorithm.use_advantage_shaping=false", ("algorithm",), "use_advantage_shaping", False),
        ("data.val_files=null", ("data",), "val_files", None),
        ("data.val_files=", ("data",), "val_files", None),
        ("data.val_files=a=b@test", ("data",), "val_files", "a=b@test"),
        ("algorithm.perturb={kind: grey, grey_level: 7}", ("algorithm", "perturb"), "grey_level", 7),
        ("trainer.loggers=[wandb]", ("trainer",), "loggers", ("wandb",)),
        ("data.train_files=../up/x.parquet", ("data",), "train_files", "../up/x.parquet"),
    ],
)
def test_override_values_are_yaml(
    write: Write, override: str, section: tuple[str, ...], name: str, value: object
) -> None:
    found: object = load_config(write(MINIMAL), [override])
    for part in (*section, name):
        found = getattr(found, part)
    assert found == value


def test_a_mapping_over_a_section_leaves_its_other_settings(write: Write) -> None:
    path = write(MINIMAL + "algorithm: {perturb: {probability: 0.25}}\n")
    config = load_config(path, ["algorithm.perturb={noise_std: 5}"])
    assert (config.algorithm.perturb.probability, config.algorithm.perturb.noise_std) == (0.25, 5.0)


def test_file_is_laid_over_its_base_which_lies_relative_to_it(write: Write) -> None:
    write(MINIMAL + "rollout: {n: 4, top_k: 5}\n", "common/root.yaml")
    write("base: common/root.yaml\nrollout: {n: 6}\ntrainer: {seed: 3}\n", "middle.yaml")
    path = write("base: ../middle.yaml\ntrainer: {seed: 4}\n", "here/run.yaml")
    config = load_config(path)
    assert (config.rollout.n, config.rollout.top_k, config.trainer.seed) == (6, 5, 4)
    assert config.data.train_files == "train.jsonl"  # paths stay as written


def test_of_several_bases_each_is_laid_over_those_before_it(write: Write) -> None:
    write(MINIMAL + "rollout: {n: 4, top_k: 5}\ntrainer: {seed: 3}\n", "model.yaml")
    write("rollout: {n: 6}\ntrainer: {seed: 4}\n", "method.yaml")
    config = load_config(write("base: [model.yaml, method.yaml]\ntrainer: {seed: 5}\n", "run.yaml"))
    assert (config.rollout.n, config.rollout.top_k, config.trainer.seed) == (6, 5, 5)


def test_base_circle_and_missing_base_are_named(write: Write, tmp_path: Path) -> None:
    a = write("base: b.yaml\n", "a.yaml")
    write("base: a.yaml\n", "b.yaml")
    assert f"circle: {a} -> {tmp_path / 'b.yaml'} -> {tmp_path / 'a.yaml'}" in refusal(a)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml \(named by 'base' in .*c\.yaml\)"):
        load_config(write("base: nowhere.yaml\n", "c.yaml"))
    with pytest.raises(FileNotFoundError, match="no configuration file"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("rollout.temprature", "rollout.temperature"),
        ("rollout.val.temprature", "rollout.val.temperature"),
        ("actor.lr", "actor.optim.lr"),
        ("clip_ratio_low", "algorithm.clip_ratio_low"),
        ("actor.clip_ratio_high", "algorithm.clip_ratio_high"),
        ("algorithm.top_p_perception_token", "algorithm.top_p_perception_tokens"),
        ("parallel.tensor_parallel", "rollout.tensor_parallel_size"),
        ("tensor_model_parallel_size", "parallel.tensor_model_parallel_size"),
    ],
)
def test_unknown_setting_is_named_with_its_source_and_the_nearest(write: Write, wrong: str, nearest: str) -> None:
    message = refusal(write(MINIMAL), f"{wrong}=1")
    assert f"{wrong} (override '{wrong}=1') is no setting; did you mean {nearest}?" in message


def test_unknown_setting_in_a_base_file_names_that_file(write: Write) -> None:
    base = write(MINIMAL + "rollot: {n: 4}\n", "base.yaml")
    message = refusal(write("base: base.yaml\n"))
    assert f"rollot ({base}) is no setting; did you mean rollout?" in message


def test_nothing_near_lists_the_sections(write: Write) -> None:
    message = refusal(write(MINIMAL), "zzzz=1")
    assert "zzzz (override 'zzzz=1') is no setting; the sections are data, model, parallel" in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rollout.n=eight", "rollout.n = 'eight' (override 'rollout.n=eight'): should be a valid integer"),
        ("rollout.n=2.5", "rollout.n = 2.5 (override 'rollout.n=2.5'): should be a valid integer"),
        ("rollout.n=1", "rollout.n = 1 (override 'rollout.n=1'): should be greater than 1"),
        ("actor.optim.lr=.inf", "actor.optim.lr = inf (override 'actor.optim.lr=.inf'): should be a finite number"),
        ("algorithm.dependency=kl", "should be 'k3_sampled', 'kl_full', 'jsd', 'top1_drop' or"),
        ("algorithm.preset=[a]", "algorithm.preset = ['a'] (override 'algorithm.preset=[a]'): should be 'global'"),
        ("actor.optim.betas=[0.9]", "actor.optim.betas = [0.9] (override 'actor.optim.betas=[0.9]')"),
        ("actor.optim.betas=[0.9, x]", "actor.optim.betas = [0.9, 'x'] (override"),
        ("rollout.val=3", "rollout.val = 3 (override 'rollout.val=3'): rollout.val is a section; set one of n, temp"),
        ("data.train_files=null", "data.train_files = None (override 'data.train_files=null'): should be a text"),
    ],
)
def test_wrong_value_is_named_with_what_was_expected(write: Write, override: str, words: str) -> None:
    assert words in refusal(write(MINIMAL), override)


def test_all_problems_at_once(write: Write) -> None:
    path = write("model: {path: m}\nrollout: {n: 0, tempratur: 1}\n")
    message = refusal(path, "trainer.val_frq=3", "actor.ppo_epochs=-1")
    assert message.startswith(f"{path}: 5 problems in the configuration\n")
    for name in (
        "data.train_files must be set",
        "rollout.n = 0",
        "rollout.tempratur",
        "trainer.val_frq",
        "ppo_epochs = -1",
    ):
        assert name in message


def test_impossible_combinations_are_reported_together(write: Write) -> None:
    message = refusal(write(MINIMAL), "data.rollout_batch_size=10", "actor.global_batch_size=4", "trainer.val_freq=0")
    assert "2 problems" in message
    assert "actor.global_batch_size 4" in message
    assert "trainer.val_freq is 0" in message


def test_empty_file_says_what_is_required(write: Write) -> None:
    message = refusal(write(""))
    assert "data.train_files must be set" in message
    assert "model.path must be set" in message


@pytest.mark.parametrize("override", ["rollout.n", "--rollout.n=3", "=3", "rollout..n=3", "rollout n=3"])
def test_malformed_override(write: Write, override: str) -> None:
    assert "is not of the form section.setting=value" in refusal(write(MINIMAL), override)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rollout: {n: 4}\nrollout: {top_k: 3}\n", "'rollout' is set twice"),
        ("data: [unclosed\n", "is not valid YAML"),
        ("- a\n- b\n", "it should hold sections"),
        ("0\n", "it should hold sections"),
        ("base: [a, 3]\n", "'base' in"),
        ("base: {a: b}\n", "'base' in"),
    ],
)
def test_malformed_file(write: Write, text: str, words: str) -> None:
    path = write(text)
    message = refusal(path)
    assert words in message
    assert str(path) in message


@pytest.mark.parametrize("preset", ["global", "reference"])
def test_saved_config_reads_back_equal(write: Write, tmp_path: Path, preset: str) -> None:
    config = load_config(
        write(MINIMAL), [f"algorithm.preset={preset}", "actor.optim.lr=3e-5", "trainer.loggers=[wandb]"]
    )
    save_resolved(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_a_file_of_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"data: {train_files: \xff}\n")
    with pytest.raises(ValueError, match=r"run\.yaml is not UTF-8 text \(.*save it as UTF-8"):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize("seed", [-1, 2**32, "x"])
def test_seeds_that_a_generator_refuses_are_refused_at_once(write: Write, seed: object) -> None:
    with pytest.raises(ValueError, match=rf"trainer\.seed = {seed!r}"):
        load_config(write(MINIMAL), [f"trainer.seed={seed}"])


def test_settings_of_several_sources() -> None:
    layers = [
        ("first", {"data": {"train_files": "x"}, "rollout": {"n": 4}}),
        ("second", {"model": {"path": "y"}, "rollout": {"n": 6}}),
    ]
    config = config_of(layers, name="mine")
    assert (config.data.train_files, config.model.path, config.rollout.n) == ("x", "y", 6)
    with pytest.raises(ValueError) as caught:
        config_of([*layers, ("third", {"rollout": {"n": 1, "k": 2}})], name="mine")
    heading, unknown, wrong = str(caught.value).splitlines()
    assert heading == "mine: 2 problems in the configuration"
    assert unknown.startswith("  - rollout.k (third) is no setting")
    assert wrong == "  - rollout.n = 1 (third): should be greater than 1"


def test_the_nearest_name() -> None:
    names = ["rollout.n", "rollout.top_p", "actor.optim.lr"]
    assert nearest_name("rollout.topp", names) == "rollout.top_p"
    assert nearest_name("trainer.lr", names) == "actor.optim.lr"
    assert nearest_name("zzz", names) is None
