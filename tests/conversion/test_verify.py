"""That the comparison sees one differing bit, and a tensor too many, too few or stored otherwise."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch

from megatron_vppo.cli.main import main
from megatron_vppo.conversion.to_hf import megatron_to_hf
from megatron_vppo.conversion.to_megatron import hf_to_megatron
from megatron_vppo.conversion.verify import compare_checkpoints
from megatron_vppo.weights.dist_metadata import read_metadata
from tests.conversion.folders import CONFIGS, Flip, rewrite, tensors_of

NAME = "Qwen2.5 untied"
QKV = "model.layers.2.self_attn.k_proj.weight"
GATED = "visual.blocks.1.mlp.up_proj.bias"
TOKENS = "lm_head.weight"
CONVOLUTION = "visual.patch_embed.proj.weight"


@pytest.mark.parametrize("name", CONFIGS)
def test_equal(name: str, hf_folders: dict[str, Path], converted: dict[str, Path], tmp_path: Path) -> None:
    megatron_to_hf(converted[name], tmp_path / "back", shard_bytes=200_000)
    tensors = tensors_of(hf_folders[name])
    for other in (converted[name], tmp_path / "back"):
        found = compare_checkpoints(hf_folders[name], other)
        assert (found.differing, found.casts) == ((), ())
        assert found.tensors == len(tensors)
        assert found.num_bytes == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("tensor", [QKV, GATED, TOKENS, CONVOLUTION])
def test_one_bit_is_found_and_named(
    tensor: str, hf_folders: dict[str, Path], converted: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shutil.copytree(hf_folders[NAME], tmp_path / "flipped")
    rewrite(tmp_path / "flipped", Flip(tensor))
    for other in (converted[NAME], hf_folders[NAME]):
        assert main(["convert", "verify", str(tmp_path / "flipped"), str(other)]) == 1
        printed = capsys.readouterr().out
        assert f"differs: {tensor}\n" in printed
        assert printed.count("differs: ") == (2 if tensor == QKV and other == converted[NAME] else 1)


def test_one_bit_of_the_stored_bytes_is_found(
    hf_folders: dict[str, Path], converted: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(converted[NAME], tmp_path / "damaged")
    path = max((tmp_path / "damaged" / "dist_ckpt").glob("*.distcp"), key=lambda path: path.stat().st_size)
    wanted = tensors_of(hf_folders[NAME])[TOKENS].numpy().tobytes()
    data = bytearray(path.read_bytes())
    at = data.find(wanted)
    assert at > 0
    data[at + 1000] ^= 1
    path.write_bytes(data)
    try:
        assert compare_checkpoints(hf_folders[NAME], tmp_path / "damaged").differing == (TOKENS,)
    except ValueError as error:
        assert "language.output_layer.weight" in str(error)


def test_another_dtype_is_said_and_compared_after_the_cast(
    hf_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf_to_megatron(hf_folders[NAME], tmp_path / "lower", dtype=torch.bfloat16)
    assert main(["convert", "verify", str(hf_folders[NAME]), str(tmp_path / "lower")]) == 0
    assert "the source was cast: float32 -> bfloat16" in capsys.readouterr().out


def test_tensors_too_many_or_too_few(hf_folders: dict[str, Path], converted: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 tensors that the model does not know, first \['language\.output_layer"):
        compare_checkpoints(hf_folders["Qwen2.5 tied"], converted["Qwen2.5 untied"])
    with pytest.raises(ValueError, match=r"lacks the tensor language\.output_layer\.weight"):
        compare_checkpoints(hf_folders["Qwen2.5 untied"], converted["Qwen2.5 tied"])
    shutil.copytree(converted[NAME], tmp_path / "hole")
    dist_ckpt = tmp_path / "hole" / "dist_ckpt"
    metadata = read_metadata(dist_ckpt)
    stored = metadata.state_dict_metadata["language.decoder.layers.mlp.linear_fc2.weight"]
    stored.chunks.pop()
    (dist_ckpt / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"has 12288 of the 18432 values of .*linear_fc2\.weight"):
        compare_checkpoints(hf_folders[NAME], tmp_path / "hole")
