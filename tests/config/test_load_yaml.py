"""YAML as users write it: what its text means, and the words of the refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vppo.config.load import load_config, save_resolved
from megatron_vppo.config.yaml_text import read_yaml, write_yaml_value

MINIMAL = "data: {train_files: train.jsonl}\nmodel: {path: some/model}\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(MINIMAL)
    return tmp_path / "run.yaml"


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        load_config(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "number"),
    [("010", 10), ("08", 8), ("0x10", 16), ("0b10", 2), ("1_000", 1000), ("384e0", 384), ("'12'", 12), ("+7", 7)],
)
def test_numbers_are_decimal_unless_they_say_otherwise(path: Path, text: str, number: int) -> None:
    """YAML 1.1 takes 010 for 8."""
    assert load_config(path, [f"rollout.n={text}"]).rollout.n == number


@pytest.mark.parametrize("text", ["1e-6", "1E-6", "1.0e-06", "0.000001", ".1e-5", "+1.e-6", "1_0e-7", "'1e-6'"])
def test_fractions(path: Path, text: str) -> None:
    assert load_config(path, [f"actor.optim.lr={text}"]).actor.optim.lr == pytest.approx(1e-6, rel=1e-12)


def test_times_are_no_numbers(path: Path) -> None:
    """YAML 1.1 takes 1:30 for 90."""
    assert "rollout.n = '1:30'" in refusal(path, "rollout.n=1:30")
    assert "reward.timeout_seconds = '1:30.5'" in refusal(path, "reward.timeout_seconds=1:30.5")


@pytest.mark.parametrize("name", ["2026-01-31", "2026-13-45", "007", "1:30", "0o17"])
def test_names_that_are_no_numbers_stay_text(path: Path, name: str) -> None:
    assert load_config(path, [f"trainer.experiment_name={name}"]).trainer.experiment_name == name


@pytest.mark.parametrize("name", ["12e456", "1e5", "010", "1:30", "2026-01-31", "null", "no", "8", "1_0", "0x1f", "<<"])
def test_every_name_is_saved_so_that_it_reads_back(path: Path, tmp_path: Path, name: str) -> None:
    config = load_config(path, [f"trainer.experiment_name='{name}'"])
    save_resolved(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_anchors_and_merges(path: Path) -> None:
    """A merged key may be set again, also where the merging mapping is merged itself before it is read."""
    path.write_text(
        MINIMAL + "algorithm: {perturb: &p {probability: 0.25}}\nrollout:\n  val: &v {n: 4, temperature: 0.5}\n"
        "  <<: {top_k: 5, max_num_seqs: 7}\n  max_num_seqs: 9\n"
    )
    rollout = load_config(path).rollout
    assert (rollout.val.n, rollout.top_k, rollout.max_num_seqs) == (4, 5, 9)
    path.write_text(
        MINIMAL + "rollout: {val: &b {<<: &a {n: 4, top_p: 0.5}, n: 5}}\nactor: {optim: {}}\nreward:\n  <<: *b\n"
    )
    message = refusal(path)
    assert "reward.n" in message and "set twice" not in message


def test_a_key_twice_below_a_merge_is_still_refused(path: Path) -> None:
    path.write_text(MINIMAL + "rollout:\n  <<: {top_k: 5}\n  n: 4\n  n: 5\n")
    assert "'n' is set twice" in refusal(path)


@pytest.mark.parametrize("value", ["9" * 5000, "!!bool maybe", "!!int foo", "!!timestamp x", "[" * 3000])
def test_what_the_yaml_package_stumbles_over_is_named(path: Path, value: str) -> None:
    message = refusal(path, f"rollout.n={value}")
    assert message.startswith("override 'rollout.n=")
    assert "is not valid YAML" in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.freeze=vision_tower", "model.freeze = 'vision_tower' (override 'model.freeze=vision_tower'): should be "
         "a list, such as [a, b]"),
        ("trainer.experiment_name=1", "should be a text; write it in quotes"),
        ("trainer.experiment_name=no", "should be a text; write it in quotes"),
        ("trainer.experiment_name=a: b", "should be a text; write it in quotes"),
        ("data.background=#ffffff", "# begins a comment in YAML; write it in quotes: data.background=\"'#ffffff'\""),
        ("data.system_prompt= # be brief", "# begins a comment in YAML"),
    ],
)  # fmt: skip
def test_refusals_say_what_to_write(path: Path, override: str, words: str) -> None:
    assert words in refusal(path, override)


def test_a_dotted_name_in_a_file_is_told_from_an_unknown_one(path: Path) -> None:
    path.write_text(MINIMAL + "rollout.n: 4\nactor: {optim.lr: 1e-5}\nrollout.m: 3\n")
    message = refusal(path)
    for words in (
        f"rollout.n ({path}) is no setting; in a file, write 'n' below 'rollout'",
        f"actor.optim.lr ({path}) is no setting; in a file, write 'lr' below 'actor' and 'optim'",
        f"rollout.m ({path}) is no setting; the sections are",
    ):
        assert words in message


@pytest.mark.parametrize("name", ["data.system_prompt", "data.val_files", "trainer.total_steps", "data.image_dir"])
def test_pythons_none_is_not_taken_for_a_text(path: Path, name: str) -> None:
    """A model would have got the system prompt "None"."""
    assert f"{name} = 'None' (override '{name}=None'): should be null" in refusal(path, f"{name}=None")
    assert load_config(path, [f"{name}=null"])


PATHS = "data.train_files data.val_files data.image_dir data.format_prompt model.path trainer.runs_dir "
PATHS += "reward.reward_function"


@pytest.mark.parametrize("name", PATHS.split())
@pytest.mark.parametrize("value", ["~/x.py:f", "$HOME/x.py:f", "/data/${USER}/x", "${oc.env:X}"])
def test_shell_signs_in_paths_are_refused(path: Path, name: str, value: str) -> None:
    """A run would have made a folder named ~."""
    message = refusal(path, f"{name}={value}")
    assert f"{name} = '{value}'" in message and "~ and $NAME are not expanded" in message


@pytest.mark.parametrize("name", PATHS.split())
@pytest.mark.parametrize("value", ["/" + "x" * 256, "/".join(["x" * 200] * 21)])
def test_paths_that_linux_refuses_are_named(path: Path, name: str, value: str) -> None:
    message = refusal(path, f"{name}={value}")
    assert f"{name} = " in message and "at most 255 bytes" in message


@pytest.mark.parametrize("value", ["a~/b$", "./~/x", "/costs in $/x@train[:5%]"])
def test_other_paths_are_taken(path: Path, value: str) -> None:
    assert load_config(path, [f"data.train_files='{value}'"]).data.train_files == value


VALUES = [
    (8, "8"), (1e-6, "1.0e-06"), (True, "true"), (None, "null"), ("a b", "a b"), ("010", "010"), ("12", "'12'"),
    ("yes", "'yes'"),
    ("a # b", "'a # b'"), ("", "''"), (["params", "grads"], "[params, grads]"), ([0.9, 0.999], "[0.9, 0.999]"),
    ([], "[]"), ({"n": 8}, "{n: 8}"), ("ä" * 300, "ä" * 300), ([9] * 100, f"[{', '.join('9' * 100)}]"),
    ("...", "'...'"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "text"), VALUES)
def test_a_value_is_written_in_one_line(value: object, text: str) -> None:
    assert write_yaml_value(value) == text
    assert read_yaml(f"key: {text}  # a comment", "here") == {"key": value}
