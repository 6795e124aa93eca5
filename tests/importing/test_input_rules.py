"""Files that their keys name: found, taken from this project, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vppo.importing.import_config import ImportedConfig
from tests.importing.least import import_keys

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = "examples/format_prompt/math_format_perception.jinja"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_the_authors_template_comes_with_this_project(tmp_path: Path) -> None:
    imported = import_keys({"data.format_prompt": f"./{TEMPLATE}"}, tmp_path)
    assert imported.config.data.format_prompt == str(ROOT / TEMPLATE)
    assert "math_format_perception.jinja  # theirs, which comes with vppo\n" in imported.text


def test_a_copy_of_the_template_in_their_repository_is_the_same(tmp_path: Path) -> None:
    write(tmp_path / TEMPLATE, (ROOT / TEMPLATE).read_text() + "\n")
    imported = import_keys({"data.format_prompt": TEMPLATE}, tmp_path)
    assert imported.config.data.format_prompt == str(ROOT / TEMPLATE)


def test_a_template_that_was_changed_is_taken(tmp_path: Path) -> None:
    write(tmp_path / TEMPLATE, "{{ content }} Think.")
    imported = import_keys({"data.format_prompt": TEMPLATE}, tmp_path)
    assert imported.config.data.format_prompt == TEMPLATE and "comes with vppo" not in imported.text


def test_a_template_of_the_same_name_elsewhere_is_not_ours(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no file prompts/math_plain\.jinja"):
        import_keys({"data.format_prompt": "prompts/math_plain.jinja"}, tmp_path)
    (tmp_path / "folder.jinja").mkdir()
    with pytest.raises(ValueError, match=r"there is no file folder\.jinja"):
        import_keys({"data.format_prompt": "folder.jinja"}, tmp_path)


def reward_of(keys: dict[str, str], folder: Path) -> ImportedConfig:
    return import_keys({f"worker.reward.{key}": value for key, value in keys.items()}, folder)


@pytest.mark.parametrize(
    "path", ["examples/reward_function/math.py", "./examples/reward_function/math.py", "/any/reward_function/math.py"]
)
def test_the_authors_grader_is_built_in(tmp_path: Path, path: str) -> None:
    imported = reward_of({"reward_function": f"{path}:compute_score_wo_format"}, tmp_path)
    assert imported.config.reward.reward_function == "mathruler"


def test_a_reward_function_of_the_users_is_taken(tmp_path: Path) -> None:
    write(tmp_path / "examples/reward_function/math.py")
    write(tmp_path / "other_reward_function/math.py")
    for given, taken in (
        ("examples/reward_function/math.py:compute_score", "examples/reward_function/math.py:compute_score"),
        ("./examples/reward_function/math.py", "examples/reward_function/math.py:main"),
        ("other_reward_function/math.py:compute_score_wo_format",) * 2,
    ):
        keys = {"reward_function": given, "reward_type": "sequential"}
        config = reward_of(keys, tmp_path).config
        assert (config.reward.reward_function, config.reward.reward_type) == (taken, "sequential")
    with pytest.raises(ValueError, match=r"there is no file r1v\.py"):
        reward_of({"reward_function": "r1v.py:f"}, tmp_path)


def test_arguments_of_a_reward_function_are_taken(tmp_path: Path) -> None:
    write(tmp_path / "dapo.py")
    config = reward_of({"reward_function": "dapo.py:f", "reward_function_kwargs.max_length": "9"}, tmp_path).config
    assert config.reward.reward_function_kwargs == {"max_length": 9}
    with pytest.raises(ValueError, match=r"reward_function_kwargs {'format_weight': 0\.1} are arguments of a function"):
        reward_of({"reward_function_kwargs.format_weight": "0.1"}, tmp_path)


def test_groups_are_kept_by_overall_only_where_it_is_the_accuracy(tmp_path: Path) -> None:
    filtering = {"algorithm.online_filtering": "true"}
    import_keys(filtering, tmp_path)
    write(tmp_path / "mine.py")
    with pytest.raises(ValueError, match=r"algorithm\.filter_key = overall: groups are kept by the 'accuracy'"):
        import_keys({"worker.reward.reward_function": "mine.py:f"} | filtering, tmp_path)
    import_keys({"worker.reward.reward_function": "mine.py:f"}, tmp_path)


def test_local_data_images_and_models_are_found(tmp_path: Path) -> None:
    write(tmp_path / "rows" / "train.parquet")
    write(tmp_path / "models" / "mine" / "config.json")
    (tmp_path / "photos").mkdir()
    deep = tmp_path / "examples" / "deep"
    deep.mkdir(parents=True)
    keys = {
        "data.train_files": "rows@test", "data.val_files": "./rows/train.parquet", "data.image_dir": "photos",
        "worker.actor.model.model_path": "models/mine", "worker.actor.model.tokenizer_path": "models/mine",
    }  # fmt: skip
    config = import_keys(keys, deep).config
    assert (config.data.train_files, config.data.val_files) == ("rows@test", "rows/train.parquet")
    assert (config.data.image_dir, config.model.path) == ("photos", "models/mine")


def test_files_elsewhere_have_whole_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "theirs" / "rows" / "train.parquet")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = import_keys({"data.train_files": "rows"}, tmp_path / "theirs").config
    assert config.data.train_files == str(tmp_path / "theirs" / "rows")


def test_what_validation_lacks_is_that_of_training(tmp_path: Path) -> None:
    keys = {"worker.rollout.temperature": "0.7", "worker.rollout.top_p": "0.8"}
    imported = import_keys(keys | {"worker.rollout.val_override_config": "{temperature: 0.5}"}, tmp_path)
    val = imported.config.rollout.val
    assert (val.n, val.temperature, val.top_p) == (1, 0.5, 0.8)
    assert "    top_p: 0.8  # theirs: that of training" in imported.text
    assert "    temperature: 0.5\n" in imported.text
