"""One data file or several: their names, what applies to each, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_vppo.config.data_files import files_of, name_of, names_of, settings_of_files, weights_of
from megatron_vppo.config.load import load_config, save_resolved
from megatron_vppo.config.schema import DataConfig, DataFile, RunConfig

TWO = [{"path": "a/geo.parquet@train", "weight": 2}, {"path": "lab/k12", "weight": 0.5, "prompt_key": "question"}]


def data_of(**settings: Any) -> DataConfig:
    return DataConfig.model_validate(settings)


def loaded(tmp_path: Path, *overrides: str) -> RunConfig:
    (tmp_path / "run.yaml").write_text("model: {path: m}\ndata: {train_files: a.parquet}\n")
    return load_config(tmp_path / "run.yaml", overrides)


def test_one_path_is_a_file_with_the_settings_of_data() -> None:
    data = data_of(train_files="a.parquet", prompt_key="q", image_dir="pictures")
    assert list(files_of(data, "train")) == ["train"] and files_of(data, "val") == {}
    (file,) = files_of(data, "train").values()
    assert (file.path, file.prompt_key, file.answer_key, file.image_dir) == ("a.parquet", "q", "answer", "pictures")
    assert names_of(data, "train") == () and weights_of(data) is None
    assert list(settings_of_files(data)) == ["data.train_files"]


def test_a_file_of_a_list_has_its_own_settings_before_those_of_data() -> None:
    data = data_of(train_files=TWO, val_files=["v.jsonl", "w.json@test"], image_key="image")
    files = files_of(data, "train")
    assert list(files) == ["train/geo", "train/k12"] and names_of(data, "val") == ("v", "w")
    assert [file.prompt_key for file in files.values()] == ["problem", "question"]
    assert [file.image_key for file in files.values()] == ["image", "image"]
    assert weights_of(data) == (2.0, 0.5)
    assert list(settings_of_files(data)) == [
        "data.train_files[0]", "data.train_files[1]", "data.val_files[0]", "data.val_files[1]",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("hiyouga/geometry3k@test[:50]", "geometry3k"),
        ("data/train-00000.v2.jsonl", "train-00000.v2"),
        ("at@home/rows.json", "rows"),
        ("my set (1).parquet", "my_set__1_"),
    ],
)
def test_names(path: str, name: str) -> None:
    assert name_of(DataFile(path=path)) == name
    assert name_of(DataFile(path=path, name="mine")) == "mine"


def test_a_list_comes_back_from_the_run_folder(tmp_path: Path) -> None:
    config = loaded(tmp_path, "data.train_files=[{path: a.parquet, weight: 1}, {path: b.parquet, weight: 3}]")
    save_resolved(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("train_files=[{path: a, wieght: 2}]", r"data\.train_files\[0\]\.wieght \(override .* did you mean weight\?"),
        ("train_files=[a, {weight: 2}]", r"data\.train_files\[1\]\.path \(override .*\) must be set"),
        ("train_files=[{path: a, weight: 0}]", r"data\.train_files\[0\]\.weight = 0 \(.*\): should be greater than 0"),
        ("train_files=[{path: a, weight: true}]", r"\.weight = True .*should be a number, not true or false"),
        ("train_files=[]", r"data\.train_files is a list without a file; name one"),
        ("train_files=[{path: ~/a}]", r"data\.train_files\[0\]\.path = '~/a' .*~ and \$NAME are not expanded"),
        ("train_files=~/a", r"data\.train_files = '~/a' .*~ and \$NAME are not expanded"),
        ("train_files=[x/a.json, y/a.parquet]", r"x/a\.json and y/a\.parquet are both called 'a'; give one of"),
        ("train_files=[{path: a, weight: 2}, b]", r"b without a weight next to files with one; give every file a"),
        ("val_files=[{path: a, weight: 2}]", r"data\.val_files: weights have no effect, since every row is validated"),
        ("train_files=[a, {path: b, answer_key: problem}]",
         r"data\.prompt_key and data\.answer_key of data\.train_files\[1\] are both 'problem'"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, files: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        loaded(tmp_path, f"data.{files}")
    assert ": 1 problem in" in str(caught.value)
