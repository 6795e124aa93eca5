"""A converted checkpoint gives every rank of every layout the bits that the Hugging Face folder gives it.

So does Megatron's own loader, and what Megatron itself saves under any layout becomes the Hugging Face folder again.
"""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from megatron_vppo.conversion.to_hf import megatron_to_hf
from megatron_vppo.conversion.to_megatron import hf_to_megatron
from megatron_vppo.models.build import build_model
from megatron_vppo.models.options import ModelOptions
from megatron_vppo.models.qwen_vl import QwenVLModel
from megatron_vppo.parallel.layout import Layout, init_layout
from megatron_vppo.weights.load import load_weights
from megatron_vppo.weights.load_hf import load_hf_weights
from tests.conversion.folders import MarksIfLoaded, same_bits, tensors_of
from tests.gloo import run_gloo
from tests.models.tiny import save_tiny_model, tiny_config

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]
"""(tensor, pipeline)"""
NAMES = ("Qwen2.5 tied", "Qwen3 untied")


def build(folder: Path, layout: Layout, *, dtype: torch.dtype = torch.float32) -> QwenVLModel:
    """Every value not a number until it is loaded; an uneven split of the layers over two stages."""
    model = build_model(
        AutoConfig.from_pretrained(folder), groups=layout.groups, vision_groups=layout.vision_groups, dtype=dtype,
        device=layout.device, options=ModelOptions(pipeline_layers=(1, 2) if layout.pipeline == 2 else None),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    return model


def differing(left: QwenVLModel, right: QwenVLModel) -> list[str]:
    others = dict(right.named_parameters())
    assert len(others) >= 5
    return [name for name, parameter in left.named_parameters() if not torch.equal(parameter, others[name])]


def _compare(
    rank: int, world: int, tensor: int, pipeline: int, folders: dict[str, tuple[Path, Path]], saved: Path
) -> dict[str, list[str]]:
    layout = init_layout(tensor=tensor, pipeline=pipeline, timeout_seconds=120)
    found = {}
    for name, (source, converted) in folders.items():
        expected, ours, theirs = (build(source, layout) for _ in range(3))
        load_hf_weights(expected, source)
        load_weights(ours, converted)
        found[f"{name}: load_weights"] = differing(expected, ours)
        loaded = dist_checkpointing.load(theirs.sharded_state_dict(), str(converted / "dist_ckpt"))
        theirs.load_state_dict(loaded)
        found[f"{name}: Megatron's loader"] = differing(expected, theirs)
        lower = build(source, layout, dtype=torch.bfloat16)
        load_weights(lower, converted)
        found[f"{name}: as bfloat16"] = differing(lower, expected.bfloat16())
        if rank == 0:
            (saved / name / "dist_ckpt").mkdir(parents=True)
        torch.distributed.barrier()
        dist_checkpointing.save(ours.sharded_state_dict(), str(saved / name / "dist_ckpt"))
    parallel_state.destroy_model_parallel()
    return found


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("tensor", "pipeline"),
    [
        pytest.param(tensor, pipeline, marks=[] if tensor * pipeline == 4 else pytest.mark.extended)
        for tensor, pipeline in LAYOUTS
    ],
)
def test_ranks_get_the_bits_of_the_hf_folder(
    tensor: int, pipeline: int, hf_folders: dict[str, Path], converted: dict[str, Path], tmp_path: Path
) -> None:
    folders = {name: (hf_folders[name], converted[name]) for name in NAMES}
    for found in run_gloo(_compare, tensor * pipeline, tensor, pipeline, folders, tmp_path):
        assert len(found) == 3 * len(NAMES)
        assert found == {what: [] for what in found}
    for name in NAMES:
        megatron_to_hf(tmp_path / name, tmp_path / f"{name} back", source=hf_folders[name])
        assert same_bits(tensors_of(hf_folders[name]), tensors_of(tmp_path / f"{name} back"))


def _interleaved(rank: int, world: int, source: Path, converted: Path) -> list[list[str]]:
    """Two stages on each pipeline rank; each tensor-parallel rank holds the whole vision tower."""
    layout = init_layout(tensor=2, pipeline=2, virtual_stages=2, vision_split="images", timeout_seconds=120)
    found = []
    for virtual_stage in range(2):
        expected, ours = (
            build_model(
                AutoConfig.from_pretrained(source), groups=layout.groups, vision_groups=layout.vision_groups,
                dtype=torch.float32, device=layout.device, virtual_stage=virtual_stage,
                options=ModelOptions(virtual_stages=2, vision_split="images"),
            )
            for _ in range(2)
        )  # fmt: skip
        for parameter in ours.parameters():
            parameter.data.fill_(float("nan"))
        load_hf_weights(expected, source)
        load_weights(ours, converted)
        found.append(differing(expected, ours))
    return found


@pytest.mark.distributed
def test_interleaved_stages_and_whole_towers_too(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_tiny_model(source, tiny_config(tied=True, vocab=301, num_hidden_layers=4))
    hf_to_megatron(source, tmp_path / "converted")
    assert run_gloo(_interleaved, 4, source, tmp_path / "converted") == [[[], []]] * 4


def _refused(rank: int, world: int, source: Path, folders: dict[str, Path]) -> dict[str, str]:
    layout = init_layout(tensor=1, pipeline=1, timeout_seconds=120)
    messages = {}
    for what, folder in folders.items():
        try:
            load_weights(build(source, layout), folder)
        except Exception as error:
            messages[what] = f"{type(error).__name__}: {error}"
    return messages


@pytest.mark.distributed
def test_what_cannot_be_loaded_is_said_and_nothing_of_it_is_executed(
    hf_folders: dict[str, Path], converted: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "was_executed"
    source = hf_folders["Qwen2.5 tied"]

    def copy(name: str) -> Path:
        shutil.copytree(converted["Qwen2.5 tied"], tmp_path / name)
        return tmp_path / name

    both, metadata, common = copy("both"), copy("metadata"), copy("common")
    shutil.copy(source / "model.safetensors", both)
    (metadata / "dist_ckpt" / ".metadata").write_bytes(pickle.dumps(MarksIfLoaded(marker)))
    torch.save(MarksIfLoaded(marker), common / "dist_ckpt" / "common.pt")
    neither = copy("neither")
    shutil.rmtree(neither / "dist_ckpt")
    spoiled = shutil.copytree(source, tmp_path / "spoiled")
    tensors = load_file(spoiled / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, spoiled / "model.safetensors")
    monkeypatch.setattr("megatron_vppo.weights.hf_folder.check_finite", lambda *_, **__: None)  # only to write it
    hf_to_megatron(spoiled, tmp_path / "no number")
    folders = {"both": both, "neither": neither, "metadata": metadata, "common": common, "nan": tmp_path / "no number",
               "other": converted["Qwen2.5 untied"], "family": converted["Qwen3 tied"]}  # fmt: skip
    (messages,) = run_gloo(_refused, 1, source, folders)
    assert "holds both dist_ckpt/ and safetensors files" in messages["both"]
    assert "neither holds no weights" in messages["neither"]
    assert messages["metadata"].startswith("DamagedCheckpoint") and "was not loaded" in messages["metadata"]
    assert "common" in messages
    assert "decoder.final_layernorm.weight in" in messages["nan"] and ".distcp holds NaN" in messages["nan"]
    assert not marker.exists()
    assert "vision.segment" in messages["family"] or "lacks the tensor vision" in messages["family"]
    assert "has language.output_layer.weight, which config.json ties to model.embed_tokens.weight" in messages["other"]
