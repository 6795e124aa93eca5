"""`vppo convert` of checkpoints of runs whose tokenizer is another than that of the model's folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig

from megatron_vppo.cli.main import main
from megatron_vppo.conversion.to_megatron import hf_to_megatron
from megatron_vppo.weights.dist_metadata import DIST_CKPT
from tests.conversion.folders import same_bits, tensors_of
from tests.models.whole import add_think_tokens, save_whole_folder

TEXT = "Within <think> </think> tags."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    save_whole_folder(folder)
    add_think_tokens(folder)
    return folder


@pytest.fixture(scope="module")
def converted(model: Path) -> Path:
    hf_to_megatron(model, model.parent / "converted")
    return model.parent / "converted"


def checkpoint_of(converted: Path, folder: Path, **state: object) -> Path:
    """Makes a checkpoint as a run writes it: weights and state, and none of the model's other files."""
    sizes = {
        "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "pipeline_layers": [2],
        "vision_split": "heads", "freeze": [], "backend": "torch",
    }  # fmt: skip
    folder.mkdir()
    shutil.copytree(converted / DIST_CKPT, folder / DIST_CKPT)
    (folder / "trainer_state.json").write_text(json.dumps({"step": 3, **sizes, **state}))
    return folder


def side_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".safetensors"}


def convert(checkpoint: Path, target: Path, source: Path) -> int:
    return main(["convert", "megatron-to-hf", str(checkpoint), str(target), "--source", str(source)])


def test_a_checkpoint_of_plain_think_tags_gets_the_tokenizer_of_training(
    model: Path, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The digits tokenizer has one token for each character, and so has the converted one for those of the tags."""
    checkpoint = checkpoint_of(converted, tmp_path / "global_step_3", plain_think_tokens=True)
    assert convert(checkpoint, tmp_path / "back", model) == 0
    assert "data.plain_think_tokens: the tokenizer has no tokens for <think> and </think>" in capsys.readouterr().out
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (model, tmp_path / "back"))
    assert len(before(TEXT)["input_ids"]) < len(TEXT)
    assert after(TEXT)["input_ids"] == after.convert_tokens_to_ids(list(TEXT))
    assert after.get_vocab() == {word: n for word, n in before.get_vocab().items() if "think" not in word}
    assert same_bits(tensors_of(tmp_path / "back"), tensors_of(model))
    own = sorted(before.convert_tokens_to_ids(["<think>", "</think>"]))
    assert GenerationConfig.from_pretrained(tmp_path / "back").suppress_tokens == own
    # The folder of such a run may be the source of the next conversion.
    assert convert(checkpoint, tmp_path / "again", tmp_path / "back") == 0
    assert side_files(tmp_path / "again") == side_files(tmp_path / "back")


@pytest.mark.parametrize("state", [{"plain_think_tokens": False}, {}, None])
def test_all_other_checkpoints_keep_the_tokenizer_of_the_source(
    model: Path, converted: Path, tmp_path: Path, state: dict[str, object] | None
) -> None:
    """Those of earlier versions say nothing of it, and a converted folder has no state."""
    checkpoint = checkpoint_of(converted, tmp_path / "global_step_3", **(state or {}))
    if state is None:
        (checkpoint / "trainer_state.json").unlink()
    assert convert(checkpoint, tmp_path / "back", model) == 0
    assert side_files(tmp_path / "back") == side_files(model)


def test_a_source_without_the_tokenizer_is_refused_before_weights_are_written(
    model: Path, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = checkpoint_of(converted, tmp_path / "global_step_3", plain_think_tokens=True)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy2(model / "config.json", bare)
    assert convert(checkpoint, tmp_path / "back", bare) == 2
    assert "is not whole" in capsys.readouterr().err and not (tmp_path / "back").exists()
