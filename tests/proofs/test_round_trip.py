"""Hugging Face -> Megatron -> Hugging Face: the same tensors, bit by bit, in files that other libraries read."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from megatron_vppo.cli.main import main
from megatron_vppo.conversion import hf_writer, to_megatron, verify
from megatron_vppo.conversion.to_hf import megatron_to_hf
from megatron_vppo.conversion.to_megatron import hf_to_megatron
from megatron_vppo.weights.stream import save_hf
from tests.conversion.folders import CONFIGS, SIDE_FILES, MarksIfLoaded, same_bits, shard, tensors_of

SMALL_PIECES = 3000
"""Bytes: most parameters are cut, some in the middle of gate or up, and QKV by key-value heads."""


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (to_megatron, hf_writer, verify):
        monkeypatch.setattr(module, "PIECE_BYTES", SMALL_PIECES)
    monkeypatch.setattr(to_megatron, "FILE_BYTES", 20 * SMALL_PIECES)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_bit_comes_back(name: str, hf_folders: dict[str, Path], tmp_path: Path, small_pieces: None) -> None:
    source = hf_folders[name]
    hf_to_megatron(source, tmp_path / "megatron")
    assert len(list((tmp_path / "megatron" / "dist_ckpt").glob("*.distcp"))) > 10
    assert not list((tmp_path / "megatron").rglob("*.safetensors"))
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert same_bits(tensors_of(source), tensors_of(tmp_path / "back"))
    for folder in ("megatron", "back"):
        for file in (*SIDE_FILES, "config.json", "generation_config.json"):
            assert (tmp_path / folder / file).read_bytes() == (source / file).read_bytes(), file
    assert not (tmp_path / "back" / "dist_ckpt").exists()


def test_transformers_loads_what_comes_back(converted: dict[str, Path], tmp_path: Path) -> None:
    megatron_to_hf(converted["Qwen2.5 tied"], tmp_path / "back", shard_bytes=200_000)
    model, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()), info
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_shards_have_the_size_asked_for(converted: dict[str, Path], tmp_path: Path) -> None:
    limit = 150_000
    megatron_to_hf(converted["Qwen3 untied"], tmp_path / "back", shard_bytes=limit)
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    tensors = tensors_of(tmp_path / "back")
    held = [[tensors[name].nbytes for name, where in index["weight_map"].items() if where == f.name] for f in files]
    assert sum(map(sum, held)) == index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert all(sum(sizes) <= limit or len(sizes) == 1 for sizes in held)
    assert [len(sizes) for sizes in held if sum(sizes) > limit] == [1], "one tensor is larger than a file may be"
    assert len(files) < 2 * sum(map(sum, held)) / limit + 2, "files that could be one"


def test_a_folder_of_several_files_gives_the_same(hf_folders: dict[str, Path], tmp_path: Path) -> None:
    source = hf_folders["Qwen3 tied"]
    shutil.copytree(source, tmp_path / "sharded")
    shard(tmp_path / "sharded", parts=3)
    hf_to_megatron(tmp_path / "sharded", tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert same_bits(tensors_of(source), tensors_of(tmp_path / "back"))


@pytest.mark.distributed
@pytest.mark.extended
def test_several_processes_give_the_same(hf_folders: dict[str, Path], tmp_path: Path, small_pieces: None) -> None:
    source = hf_folders["Qwen2.5 untied"]
    hf_to_megatron(source, tmp_path / "megatron", processes=3)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", shard_bytes=200_000, processes=2)
    assert same_bits(tensors_of(source), tensors_of(tmp_path / "back"))


def test_dtype_is_that_asked_for(hf_folders: dict[str, Path], tmp_path: Path) -> None:
    source = hf_folders["Qwen2.5 untied"]
    expected: dict[str, Tensor] = {name: tensor.bfloat16() for name, tensor in tensors_of(source).items()}
    hf_to_megatron(source, tmp_path / "there", dtype=torch.bfloat16)
    megatron_to_hf(tmp_path / "there", tmp_path / "there_back")
    hf_to_megatron(source, tmp_path / "plain")
    megatron_to_hf(tmp_path / "plain", tmp_path / "back", dtype=torch.bfloat16)
    for folder in ("there_back", "back"):
        assert same_bits(expected, tensors_of(tmp_path / folder))
        assert AutoConfig.from_pretrained(tmp_path / folder).dtype == torch.bfloat16
    assert AutoConfig.from_pretrained(tmp_path / "plain").dtype == torch.float32
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "back", dtype="auto").dtype == torch.bfloat16


def test_pickles_are_neither_loaded_nor_copied(hf_folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(hf_folders["Qwen3 untied"], tmp_path / "source")
    marker = tmp_path / "was_loaded"
    pickles = ("pytorch_model.bin", "training_args.pt", "optimizer.pth", "a.ckpt", "a.pkl", "a.pickle", "a.joblib")
    for file in pickles:
        (tmp_path / "source" / file).write_bytes(pickle.dumps(MarksIfLoaded(marker)))
    hf_to_megatron(tmp_path / "source", tmp_path / "megatron")
    assert not marker.exists()
    pickle.loads((tmp_path / "source" / "pytorch_model.bin").read_bytes())
    assert marker.exists(), "the pickle would have left its mark"
    names = {path.name for path in (tmp_path / "megatron").iterdir()}
    assert names.isdisjoint(pickles)


@pytest.mark.parametrize("program", ["vppo convert", "checkpoints_conversion"])
def test_programs_convert_there_and_back(
    program: str, hf_folders: dict[str, Path], tmp_path: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(direction: str, *arguments: object) -> int:
        if program == "vppo convert":
            return main(["convert", direction, *map(str, arguments)])
        path = repo_root / "checkpoints_conversion" / f"{direction.replace('-', '_')}.py"
        monkeypatch.setattr("sys.argv", [str(path), *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            exec(compile(path.read_text(), str(path), "exec"), {"__name__": "__main__"})
        return int(left.value.code)  # type: ignore[arg-type]

    source = hf_folders["Qwen3 tied"]
    assert run("hf-to-megatron", source, tmp_path / "megatron") == 0
    assert run("megatron-to-hf", tmp_path / "megatron", tmp_path / "back", "--shard-size", "1MB") == 0
    assert run("verify", source, tmp_path / "megatron") == 0
    assert run("verify", source, tmp_path / "back") == 0
    assert same_bits(tensors_of(source), tensors_of(tmp_path / "back"))


def test_an_export_of_a_run_has_the_files_beside_the_weights(hf_folders: dict[str, Path], tmp_path: Path) -> None:
    source = hf_folders[next(iter(CONFIGS))]
    tensors = tensors_of(source)
    target = tmp_path / "huggingface" / "step_1"
    save_hf(iter(tensors.items()), target, source=source, is_writer=True, shard_bytes=100_000)
    assert same_bits(tensors, tensors_of(target))
    assert len(list(target.glob("*.safetensors"))) > 1
    assert all((target / file).read_bytes() == (source / file).read_bytes() for file in (*SIDE_FILES, "config.json"))
    assert [path.name for path in target.parent.iterdir()] == ["step_1"]
