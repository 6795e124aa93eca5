"""Each thing that can be wrong is said with the file and the tensor, and nothing is left of the conversion."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vppo.cli.main import main
from megatron_vppo.conversion.to_hf import megatron_to_hf
from megatron_vppo.conversion.to_megatron import hf_to_megatron
from megatron_vppo.conversion.verify import compare_checkpoints
from megatron_vppo.system.whole import whole_folder
from megatron_vppo.weights.hf_folder import HfFolder
from tests.conversion.folders import Flip, MarksIfLoaded, left_behind, rewrite, same_bits, shard, tensors_of
from tests.parallel.damage import NORM as NORM_KEY
from tests.parallel.damage import description_with, flip_a_value, in_record, lose_the_pieces, with_value

NAME = "Qwen2.5 untied"
NORM = "model.norm.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
DOWN_KEY = "language.decoder.layers.mlp.linear_fc2.weight"


def lose_a_file(folder: Path) -> None:
    shard(folder, parts=3)
    (folder / "model-00002-of-00003.safetensors").unlink()


def cut_a_file(folder: Path) -> None:
    shard(folder, parts=3)
    path = folder / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lie_in_the_index(folder: Path) -> None:
    shard(folder, parts=2)
    index = folder / "model.safetensors.index.json"
    described = json.loads(index.read_text())
    where = described["weight_map"]
    where[NORM] = next(file for file in sorted(where.values()) if file != where[NORM])
    index.write_text(json.dumps(described))


def hold_a_tensor_twice(folder: Path) -> None:
    shard(folder, parts=2)
    for path in folder.glob("*.safetensors"):
        save_file({**load_file(path), NORM: torch.zeros(64)}, path)


def write_header(folder: Path, header: object) -> None:
    text = json.dumps(header).encode().ljust(512)
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(256))


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def widen_the_config(folder: Path) -> None:
    text = json.loads((folder / "config.json").read_text())["text_config"]
    change_config(folder, text_config={**text, "intermediate_size": 100})


def set_value(name: str, value: float) -> Callable[[Path], object]:
    """Sets the last value of a tensor."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        changed = tensors[name].clone()
        changed.view(-1)[-1] = value
        return {**tensors, name: changed}

    return lambda folder: rewrite(folder, change)


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "file missing": (lose_a_file, r"index\.json names files that are not there: \[.*00002-of-00003\.safetensors"),
    "file cut off": (cut_a_file, r"00003-of-00003\.safetensors has \d+ bytes, .* ends at \d+; download it again"),
    "no safetensors": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\x80" * 500),
        r"model\.safetensors is not a safetensors file, or was cut off",
    ),
    "no header": (
        lambda folder: (folder / "model.safetensors").write_bytes((20).to_bytes(8, "little") + b"{" * 50),
        r"model\.safetensors is not a safetensors file: its header is not JSON",
    ),
    "a header too deep": (
        lambda folder: (folder / "model.safetensors").write_bytes((90_000).to_bytes(8, "little") + b"[" * 90_001),
        r"model\.safetensors is not a safetensors file: its header is not JSON",
    ),
    "an index too deep": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("[" * 100_000),
        r"index\.json is not JSON \(.*\); download it again",
    ),
    "a header of another kind": (
        lambda folder: write_header(folder, []),
        r"model\.safetensors is not a safetensors file: its header is not a table of tensors",
    ),
    "a tensor without a place": (
        lambda folder: write_header(folder, {NORM: {"dtype": "F32", "shape": [64]}}),
        rf"model\.safetensors is damaged: it describes {NORM} as .*; download it again",
    ),
    "a tensor without a dtype": (
        lambda folder: write_header(folder, {NORM: {"shape": [64], "data_offsets": [0, 256]}}),
        rf"model\.safetensors is damaged: it describes {NORM} as ",
    ),
    "a shape of words": (
        lambda folder: write_header(folder, {NORM: {"dtype": "F32", "shape": ["64"], "data_offsets": [0, 256]}}),
        rf"model\.safetensors is damaged: it describes {NORM} as ",
    ),
    "half an index": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a":'),
        r"index\.json is not JSON \(.*\); download it again",
    ),
    "an index of nothing": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
        r"index\.json has no weight_map that gives each tensor's file; download it again",
    ),
    "an index of numbers": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}'),
        r"index\.json has no weight_map that gives each tensor's file",
    ),
    "no folder": (shutil.rmtree, r"source: no such folder"),
    "wrong index": (lie_in_the_index, rf"says that {NORM} is in model-.*\.safetensors, which does not hold it"),
    "twice": (hold_a_tensor_twice, rf"{NORM} comes twice: .*00001-of-00002\.safetensors and .*00002-of-00002"),
    "missing": (
        lambda folder: rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if n != DOWN}),
        rf"lacks 1 tensors of the model, first \['{DOWN}'\]",
    ),
    "unknown": (
        lambda folder: rewrite(folder, lambda tensors: {**tensors, "model.spare": torch.zeros(3)}),
        r"does not know, first \['model\.spare'\] in \['model\.safetensors'\]",
    ),
    "shape": (
        lambda folder: rewrite(folder, lambda tensors: {**tensors, NORM: torch.zeros(65)}),
        rf"{NORM} in .*model\.safetensors has shape \(65,\), the configuration says \(64,\)",
    ),
    "integers": (
        lambda folder: rewrite(folder, lambda tensors: {**tensors, NORM: torch.zeros(64, dtype=torch.int8)}),
        rf"{NORM} in .*model\.safetensors is stored as I8; weights must be one of F32, BF16, F16",
    ),
    "two dtypes in one tower": (
        lambda folder: rewrite(folder, lambda tensors: {**tensors, DOWN: tensors[DOWN].half()}),
        r"decoder\.layers\.mlp\.linear_fc2\.weight has layers of dtypes .*; give --dtype",
    ),
    "one value is no number": (
        set_value(DOWN, float("nan")),
        rf"{DOWN} in .*model\.safetensors holds NaN; take a checkpoint whose weights are numbers",
    ),
    "one value is infinite": (
        set_value(NORM, float("-inf")),
        rf"{NORM} in .*model\.safetensors holds infinity",
    ),
    "config of another size": (
        widen_the_config,
        r"gate_proj\.weight in .*model\.safetensors has shape \(96, 64\), the configuration says \(100, 64\)",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        r"holds neither model\.safetensors nor model\.safetensors\.index\.json",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"has no config\.json"),
    "another architecture": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "qwen2"}'),
        r"config\.json: a model of type 'qwen2' is not supported; qwen2_5_vl, qwen3_vl are",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_hf_folders_are_refused(what: str, hf_folders: dict[str, Path], tmp_path: Path) -> None:
    spoil, message = WRONG[what]
    shutil.copytree(hf_folders[NAME], tmp_path / "source")
    spoil(tmp_path / "source")
    with pytest.raises(ValueError, match=message):
        hf_to_megatron(tmp_path / "source", tmp_path / "target")
    assert left_behind(tmp_path / "target") == []


def test_a_file_that_is_cut_off_while_it_is_read(
    hf_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(hf_folders[NAME], tmp_path / "source")
    check = HfFolder.check

    def check_and_cut(*arguments: Any) -> tuple[str, ...]:
        copies = check(*arguments)
        weights = source / "model.safetensors"
        os.truncate(weights, weights.stat().st_size // 2)
        return copies

    monkeypatch.setattr(HfFolder, "check", check_and_cut)
    with pytest.raises(ValueError, match=r"model\.safetensors ends within [a-z.0-9_]+; download it again"):
        hf_to_megatron(source, tmp_path / "target")
    assert left_behind(tmp_path / "target") == []


def test_weights_beyond_float16(hf_folders: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(hf_folders[NAME], tmp_path / "source")
    set_value(DOWN, 1e5)(source)
    hf_to_megatron(source, tmp_path / "wide", dtype=torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"linear_fc2\.weight has values beyond the range of float16; convert to bfloat"
    ):
        hf_to_megatron(source, tmp_path / "target", dtype=torch.float16)
    with pytest.raises(ValueError, match=rf"{DOWN} has values beyond the range of float16"):
        megatron_to_hf(tmp_path / "wide", tmp_path / "target", dtype=torch.float16)
    assert left_behind(tmp_path / "target") == []


def test_verify_names_a_value_that_is_no_number(hf_folders: dict[str, Path], tmp_path: Path) -> None:
    other = shutil.copytree(hf_folders[NAME], tmp_path / "other")
    set_value(DOWN, float("nan"))(other)
    with pytest.raises(ValueError, match=rf"{DOWN} in .*other/model\.safetensors holds NaN"):
        compare_checkpoints(hf_folders[NAME], other)


def test_the_other_family_is_refused(hf_folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(hf_folders[NAME], tmp_path / "source")
    shutil.copy(hf_folders["Qwen3 untied"] / "config.json", tmp_path / "source")
    message = (
        r"source does not hold the model's weights: \d+ tensors are missing, first model\.language_model\.\S+, and "
        r"\d+ are not the model's, first model\.\S+ in model\.safetensors; does .*source/config\.json belong"
    )
    with pytest.raises(ValueError, match=message):
        hf_to_megatron(tmp_path / "source", tmp_path / "target")
    with pytest.raises(ValueError, match=message):
        compare_checkpoints(tmp_path / "source", hf_folders[NAME])
    assert left_behind(tmp_path / "target") == []


def largest(dist_ckpt: Path) -> Path:
    return max(dist_ckpt.glob("*.distcp"), key=lambda path: path.stat().st_size)


def damage(path: Path) -> None:
    """The beginning of a stored tensor."""
    data = bytearray(path.read_bytes())
    data[:400] = bytes(400)
    path.write_bytes(data)


def execute(dist_ckpt: Path) -> None:
    evil = MarksIfLoaded(dist_ckpt.parents[1] / "was_executed")
    (dist_ckpt / ".metadata").write_bytes(pickle.dumps(evil))


WRONG_CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "file missing": (
        lambda folder: largest(folder).unlink(),
        r"__1_0\.distcp is missing; the checkpoint is inc",
    ),
    "file cut off": (
        lambda folder: largest(folder).write_bytes(largest(folder).read_bytes()[:-1]),
        r"__1_0\.distcp has \d+ bytes instead of \d+; the checkpoint is incomplete",
    ),
    "file empty": (
        lambda folder: largest(folder).write_bytes(b""),
        r"__1_0\.distcp has 0 bytes instead of \d+; the checkpoint is incomplete",
    ),
    "a bit of a weight": (
        lambda folder: in_record(NORM_KEY, flip_a_value)(folder.parent),
        rf"{NORM_KEY} in \S+__\d_0\.distcp cannot be read: Bad CRC-32",
    ),
    "NaN": (
        lambda folder: with_value(float("nan"), DOWN_KEY, which=1)(folder.parent),
        rf"{DOWN_KEY} \(layer 1\) in \S+__\d_0\.distcp holds NaN",
    ),
    "infinity": (
        lambda folder: with_value(float("inf"), NORM_KEY)(folder.parent),
        rf"{NORM_KEY} in \S+__\d_0\.distcp holds infinity",
    ),
    "description empty": (
        lambda folder: (folder / ".metadata").write_bytes(b""),
        r"\.metadata is not the description .* was not loaded: Ran out of input",
    ),
    "description of other pieces": (
        lambda folder: description_with(lose_the_pieces)(folder.parent),
        rf"\.metadata is damaged: it has 0 of the 64 values of {NORM_KEY}",
    ),
    "file damaged": (lambda folder: damage(largest(folder)), r"vision\.patch_embed\.weight in .* cannot be read"),
    "no description": (lambda folder: (folder / ".metadata").unlink(), r"lacks \.metadata"),
    "not finished": (lambda folder: (folder / "metadata.json").unlink(), r"lacks metadata\.json"),
    "another format": (
        lambda folder: (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}'),
        r"metadata\.json: format 'zarr' is not supported",
    ),
    "a program as description": (execute, r"\.metadata is not the description .* was not loaded: it names"),
    "larger config": (
        lambda folder: widen_the_config(folder.parent),
        r"mlp\.linear_fc1\.weight in .*dist_ckpt has shape \(3, 192, 64\), the configuration says \(3, 200, 64\)",
    ),
    "an output layer that the config ties": (
        lambda folder: change_config(folder.parent, tie_word_embeddings=True),
        r"has 1 tensors that the model does not know, first \['language\.output_layer\.weight'\]; does config\.json",
    ),
    "a format of no kind": (
        lambda folder: (folder / "metadata.json").write_text("[]"),
        r"metadata\.json is not that of a distributed checkpoint",
    ),
    "config of more tokens": (
        lambda folder: change_vocabulary(folder.parent, 303),
        r"word_embeddings\.weight in .*dist_ckpt has shape \(301, 64\), the configuration says \(303, 64\)",
    ),
    "config of fewer tokens": (
        lambda folder: change_vocabulary(folder.parent, 299),
        r"word_embeddings\.weight in .*dist_ckpt has shape \(301, 64\), the configuration says \(299, 64\)",
    ),
    "no config": (lambda folder: (folder.parent / "config.json").unlink(), r"has no config\.json; --source names"),
    "no checkpoint": (shutil.rmtree, r"has no dist_ckpt/; give a converted folder"),
}


def change_vocabulary(folder: Path, tokens: int) -> None:
    text = json.loads((folder / "config.json").read_text())["text_config"]
    change_config(folder, text_config={**text, "vocab_size": tokens})


@pytest.mark.parametrize("what", WRONG_CHECKPOINTS)
def test_wrong_checkpoints_are_refused(what: str, converted: dict[str, Path], tmp_path: Path) -> None:
    spoil, message = WRONG_CHECKPOINTS[what]
    shutil.copytree(converted[NAME], tmp_path / "megatron")
    spoil(tmp_path / "megatron" / "dist_ckpt")
    with pytest.raises(ValueError, match=message):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "target")
    assert left_behind(tmp_path / "target") == []
    assert not (tmp_path / "was_executed").exists()


@pytest.mark.parametrize("what", ["file empty", "a bit of a weight", "NaN", "description empty", "file damaged"])
def test_a_damaged_conversion_does_not_pass_for_a_good_one(
    what: str, hf_folders: dict[str, Path], converted: dict[str, Path], tmp_path: Path
) -> None:
    spoil, message = WRONG_CHECKPOINTS[what]
    shutil.copytree(converted[NAME], tmp_path / "megatron")
    spoil(tmp_path / "megatron" / "dist_ckpt")
    with pytest.raises(ValueError, match=message):
        compare_checkpoints(hf_folders[NAME], tmp_path / "megatron")


def test_a_file_that_only_training_reads(
    hf_folders: dict[str, Path], converted: dict[str, Path], tmp_path: Path
) -> None:
    """Weights can still be had without it; to train from the folder it is needed."""
    folder = shutil.copytree(converted[NAME], tmp_path / "megatron")
    (folder / "dist_ckpt" / "common.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"common\.pt is damaged: EOFError"):
        compare_checkpoints(hf_folders[NAME], folder)
    megatron_to_hf(folder, tmp_path / "target")
    assert same_bits(tensors_of(tmp_path / "target"), tensors_of(hf_folders[NAME]))


def test_an_existing_target_is_not_touched(hf_folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "mine").touch()
    with pytest.raises(ValueError, match=r"target exists; remove it, or give another name"):
        hf_to_megatron(hf_folders[NAME], tmp_path / "target")
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["mine"]


def test_a_disk_that_is_too_small_is_seen_before_anything_is_written(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"target: not enough space\. About 1000000000\.07 GB are needed in .*, \d"),
        whole_folder(tmp_path / "target", num_bytes=10**18),
    ):
        raise AssertionError("got in")
    assert left_behind(tmp_path / "target") == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shard-size", "5"), "write a size such as 5GB"),
        (("--shard-size", "0GB"), "write a size such as 5GB"),
        (("--processes", "0"), "at least 1"),
        (("--dtype", "int8"), "invalid choice"),
    ],
)
def test_wrong_arguments(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["convert", "megatron-to-hf", "a", "b", *arguments])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_a_head_that_differs_from_what_it_is_tied_to(
    hf_folders: dict[str, Path], converted: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model would have no place for it; one that is equal is left out, and said to be."""
    name, head = "Qwen2.5 tied", "lm_head.weight"
    equal = shutil.copytree(hf_folders[name], tmp_path / "equal")
    rewrite(equal, lambda tensors: {**tensors, head: tensors["model.embed_tokens.weight"].clone()})
    other = shutil.copytree(equal, tmp_path / "other")
    rewrite(other, Flip(head))
    with pytest.raises(ValueError, match=rf"{head} in .*model\.safetensors differs from model\.embed_tokens\.weight"):
        hf_to_megatron(other, tmp_path / "target")
    with pytest.raises(ValueError, match="set tie_word_embeddings to false there, or remove the tensor"):
        compare_checkpoints(other, converted[name])
    assert left_behind(tmp_path / "target") == []
    assert main(["convert", "verify", str(equal), str(converted[name])]) == 0
    assert f"{head} equals the embedding that it is tied to" in capsys.readouterr().out


def test_mistakes_end_in_one_line(
    hf_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    source = str(hf_folders[NAME])
    for arguments, message in (
        (["hf-to-megatron", str(tmp_path), str(tmp_path / "target")], f"{tmp_path} has no config.json; give"),
        (["hf-to-megatron", f"{tmp_path}/absent", str(tmp_path / "target")], f"{tmp_path}/absent: no such folder"),
        (["hf-to-megatron", source, f"{tmp_path}/file/target"], f"{tmp_path}/file/target cannot be made: "),
    ):
        assert main(["convert", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"vppo: {message}") and error.count("\n") == 1
