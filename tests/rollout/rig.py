"""Helpers of the rollout tests: the running engine's description, prompts, images and the transformers oracle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessor

from megatron_vppo.rollout.engine import RolloutEngine
from megatron_vppo.rollout.records import Completion, SampleRequest
from megatron_vppo.rollout.transfer.bundle import Bundle
from tests.rollout.tiny_model import build_config, build_model, build_qwen3_config, build_tokenizer

MAX_PIXELS = 84 * 84
"""Less than the saved processor's own bound, so that the override is seen to act."""
START_SECONDS = 500


@dataclass
class Rig:
    """A running engine and the transformers model that it must agree with."""

    engine: RolloutEngine
    folder: Path
    log_path: Path
    eos: int
    banned: tuple[int, ...]
    image_token: int
    family: str

    def model(self, seed: int) -> torch.nn.Module:
        make_config = build_config if self.family == "qwen2_5_vl" else build_qwen3_config
        return build_model(make_config(build_tokenizer(), tied=True), seed=seed)


def weights(model: torch.nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """Names and tensors as `save_pretrained` writes them."""
    from safetensors.torch import load_file

    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def make_image(seed: int, *, width: int = 112, height: int = 84) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def prompt_ids(images: int, *, text: str = "look") -> tuple[int, ...]:
    slot = "<|vision_start|><|image_pad|><|vision_end|>" * images
    return tuple(build_tokenizer()(f"<|im_start|>user\n{slot}{text}<|im_end|>\n<|im_start|>assistant\n")["input_ids"])


def flip_one_bit_on_the_way(victim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lowest bit of the last value of the tensor of this name changes between the trainer and the engine."""
    update_info = Bundle.update_info

    def with_an_error(bundle: Bundle) -> dict[str, Any]:
        info = update_info(bundle)
        if victim in info["names"]:
            number = info["names"].index(victim)
            last = info["offsets"][number] + 4 * (torch.Size(info["shapes"][number]).numel() - 1)
            bundle.buffer.room(last, 1, torch.uint8)[0] ^= 1
        return info

    monkeypatch.setattr(Bundle, "update_info", with_an_error)


@torch.no_grad()
def reference_logps(
    model: torch.nn.Module,
    request: SampleRequest,
    completion: Completion,
    *,
    banned: tuple[int, ...],
    temperature: float = 1.0,
) -> torch.Tensor:
    """fp32 log-probs of the completion's tokens by transformers, banned tokens left out of the distribution."""
    image_token = model.config.image_token_id
    inputs: dict[str, torch.Tensor] = {}
    counts: list[int] = []
    if request.images:
        patch = model.config.vision_config.patch_size
        processor = Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=MAX_PIXELS, patch_size=patch)
        inputs = dict(processor(images=list(request.images), return_tensors="pt"))
        counts = [int(grid.prod()) // 4 for grid in inputs["image_grid_thw"]]
    remaining = iter(counts)
    expanded = [
        token for slot in request.token_ids for token in ([slot] * next(remaining) if slot == image_token else [slot])
    ]
    ids_1T = torch.tensor([expanded + list(completion.token_ids)])
    logits_TV = model(
        input_ids=ids_1T,
        attention_mask=torch.ones_like(ids_1T),
        mm_token_type_ids=(ids_1T == image_token).int(),
        **inputs,
    ).logits[0, len(expanded) - 1 : -1]
    logits_TV[:, list(banned)] = float("-inf")
    logps_TV = (logits_TV.float() / temperature).log_softmax(-1)
    return logps_TV.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
