"""A damaged converted folder is refused with the file, before anything of it is loaded."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_vppo.conversion.to_megatron import hf_to_megatron
from megatron_vppo.models.build import build_model
from megatron_vppo.models.qwen_vl import QwenVLModel
from megatron_vppo.models.read_config import read_hf_config
from megatron_vppo.parallel.layout import single_rank
from megatron_vppo.weights.load import load_weights
from tests.models.tiny import save_tiny_model, tiny_config
from tests.parallel.damage import DESCRIPTIONS, FILES, NORM, Spoil, with_value

UNTOUCHED = 7.0
LAYERS = "language.decoder.layers.mlp.linear_fc1.weight"
NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("converted")
    save_tiny_model(root / "source", tiny_config(tied=False, vocab=299))
    hf_to_megatron(root / "source", root / "converted")
    return root / "converted"


@pytest.fixture(scope="module")
def model(converted: Path) -> Iterator[QwenVLModel]:
    with single_rank() as layout:
        yield build_model(
            read_hf_config(converted), groups=layout.groups, vision_groups=layout.vision_groups, dtype=torch.float32,
            device=layout.device,
        )  # fmt: skip


CASES: dict[str, tuple[Spoil, str]] = {
    **{what: FILES[what] for what in ("empty", "cut", "missing", "zeros", "zeros at its beginning", "a weight")},
    **{what: case for what, case in DESCRIPTIONS.items() if what != "dist_ckpt missing"},
}


@pytest.mark.parametrize("what", CASES)
def test_damage_is_named_and_nothing_is_loaded(what: str, converted: Path, model: QwenVLModel, tmp_path: Path) -> None:
    spoil, message = CASES[what]
    folder = shutil.copytree(converted, tmp_path / "converted")
    spoil(folder)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, UNTOUCHED)
    with pytest.raises(ValueError, match=message.replace("__0_", r"__\d_")) as refused:
        load_weights(model, folder)
    assert "\n" not in str(refused.value) and str(folder) in str(refused.value)
    assert all((parameter == UNTOUCHED).all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (with_value(NAN, NORM), rf"^{NORM} in \S+/dist_ckpt/__\d_0\.distcp holds NaN$"),
        (with_value(NAN, LAYERS, which=-1), rf"^{LAYERS} \(layer 2\) in \S+/dist_ckpt/__\d_0\.distcp holds NaN$"),
        (with_value(-INFINITY, LAYERS), rf"^{LAYERS} \(layer 0\) in \S+/dist_ckpt/__\d_0\.distcp holds infinity$"),
    ],
)
def test_a_weight_that_is_no_number(
    spoil: Spoil, message: str, converted: Path, model: QwenVLModel, tmp_path: Path
) -> None:
    folder = shutil.copytree(converted, tmp_path / "converted")
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        load_weights(model, folder)
