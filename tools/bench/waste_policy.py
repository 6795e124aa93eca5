"""The small policies that waste.py counts in, their groups of responses and their images.

Models are random and small, but attention is a small part of them, as it is of those that are released. Every image has
the same grid, and pixels are zeros: no count depends on values.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen3VLConfig

from bench.our_way import OPTIM
from bench.pretended_memory import DEVICE
from bench.workload import fill_with_noise
from megatron_vppo.algorithm.patches import Patches, PatchValues
from megatron_vppo.algorithm.types import ImageRef, LossSpec, PerturbKey, Prompt, Response, TrainBatch
from megatron_vppo.config.choices import PerturbUnit
from megatron_vppo.models.build import build_model
from megatron_vppo.models.hf_config import HfConfig
from megatron_vppo.models.qwen_vl import QwenVLModel
from megatron_vppo.parallel.batching import Pixels
from megatron_vppo.parallel.layout import Layout
from megatron_vppo.parallel.policy import MegatronPolicy
from megatron_vppo.parallel.schedule import PolicySettings
from megatron_vppo.parallel.training import Trainable, make_trainable

FamilyName = Literal["qwen2.5-vl", "qwen3-vl"]
FAMILIES: tuple[FamilyName, ...] = ("qwen2.5-vl", "qwen3-vl")

IMAGE_TOKEN = 290
_MEDIA = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": 291,
    "vision_start_token_id": 292,
    "vision_end_token_id": 293,
}
_MERGE, CHANNELS, FRAMES = 2, 3, 2
PATCH_SIDE = 14
"""Pixels; the side of a patch of Qwen2.5-VL."""
GRID, IMAGE_TOKENS, WORDS = (1, 24, 28), 168, 24
"""The patches of every image, its merged patches, and the other tokens of a prompt."""
LENGTHS = (72, 64, 55, 50, 44, 37, 30, 24)
"""The tokens of the responses of a group."""


def small_config(family: FamilyName, *, patch_side: int = PATCH_SIDE) -> HfConfig:
    """Returns the configuration of a model of three layers. Of `patch_side` only the values of a patch depend."""
    text = {
        "vocab_size": 300, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3,
        "num_attention_heads": 8, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    vision = {
        "depth": 3, "hidden_size": 48, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 128,
        "patch_size": patch_side, "spatial_merge_size": _MERGE, "temporal_patch_size": FRAMES,
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e4}
    if family == "qwen2.5-vl":
        return Qwen2_5_VLConfig(
            text_config={**text, "rope_parameters": {**rope, "mrope_section": [2, 3, 3]}},
            vision_config={**vision, "fullatt_block_indexes": [1], "window_size": 4 * patch_side},
            tie_word_embeddings=False,
            **_MEDIA,
        )
    return Qwen3VLConfig(
        text_config={
            **text,
            "head_dim": 24,
            "rope_parameters": {**rope, "mrope_section": [6, 3, 3], "mrope_interleaved": True},
        },
        vision_config={**vision, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        tie_word_embeddings=False,
        **_MEDIA,
    )


def make_responses(groups: int, *, lengths: tuple[int, ...] = LENGTHS) -> list[Response]:
    """Makes groups of responses, one image to each."""
    prompt_ids = (*(IMAGE_TOKEN,) * IMAGE_TOKENS, *(7,) * WORDS)
    made = []
    for group in range(groups):
        prompt = Prompt("train", group, "", "", prompt_ids, (), (ImageRef("train", group, 0),), (GRID,))
        made += [
            Response(prompt, group, sample, (8,) * length, (0.0,) * length, "stop", 0)
            for sample, length in enumerate(lengths)
        ]
    return made


def train_batch(responses: list[Response]) -> TrainBatch:
    """Makes a mini-batch in which every token has policy gradient."""
    ones_BT = torch.ones(len(responses), max(len(response.token_ids) for response in responses))
    return TrainBatch(
        responses=tuple(responses), old_logp_BT=-ones_BT, advantage_BT=ones_BT, pg_weight_BT=ones_BT,
        entropy_weight_BT=0 * ones_BT, response_mask_BT=ones_BT,
        loss=LossSpec(
            clip_ratio_low=0.2, clip_ratio_high=0.2, clip_ratio_dual=3.0, entropy_kind="nll",
            kl_kind="k3", policy_loss="clip", sapo_tau_positive=1.0, sapo_tau_negative=1.05,
        ),
    )  # fmt: skip


@dataclass
class Images:
    """The source of pixels of a policy, see Pixels in megatron_vppo/parallel/batching.py."""

    patch_side: int = PATCH_SIDE
    grid: tuple[int, int, int] = GRID
    seconds: float = 0.0
    """The time that it takes to make an image ready."""
    threads: list[int] = dataclasses.field(default_factory=list)
    """The thread of each call."""

    _kept: dict[ImageRef, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def values(self) -> PatchValues:
        return PatchValues(torch.zeros(CHANNELS, 256), frames=FRAMES)

    def patches(self, ref: ImageRef, perturb: PerturbKey | None) -> Patches:
        self.threads.append(threading.get_ident())
        time.sleep(self.seconds)
        bytes_PD = torch.zeros(math.prod(self.grid), CHANNELS * self.patch_side**2, dtype=torch.uint8)
        bytes_PD = self._kept.setdefault(ref, bytes_PD)
        return Patches(bytes_PD, None if perturb is None else torch.zeros(len(bytes_PD), dtype=torch.bool))


def distinct_image_bytes(groups: int, *, patch_side: int = PATCH_SIDE) -> int:
    """Counts the bytes of the distinct images as they are decoded: one of each channel of a pixel."""
    return groups * math.prod(GRID) * CHANNELS * patch_side**2


def make_stage(config: HfConfig, layout: Layout) -> QwenVLModel:
    """Builds a whole model with random weights."""
    stage = build_model(
        config,
        groups=layout.groups,
        vision_groups=layout.vision_groups,
        dtype=torch.float32,
        device=layout.device,
    )
    fill_with_noise(stage, seed=0)
    return stage


def make_policy(
    config: HfConfig,
    layout: Layout,
    *,
    per: PerturbUnit,
    images: Pixels,
    rows_each: int = len(LENGTHS),
    max_tokens: int | None = None,
) -> MegatronPolicy:
    """Makes a policy that shares prompts.

    Args:
        rows_each: the responses of a micro-batch, in both phases.
        max_tokens: the limit that replaces it, see PolicySettings.
    """
    optim = dataclasses.replace(OPTIM, use_distributed_optimizer=False)  # Gloo scatters by copies, which would count
    trainable = make_trainable([make_stage(config, layout)], layout=layout, settings=optim, dtype=torch.float32)
    trainable.set_step(1)
    return MegatronPolicy(
        trainable, hf_config=config, layout=layout, settings=make_settings(per, rows_each, max_tokens), pixels=images
    )


def make_settings(per: PerturbUnit, rows_each: int = len(LENGTHS), max_tokens: int | None = None) -> PolicySettings:
    return PolicySettings(
        temperature=1.0,
        banned_ids=tuple(_MEDIA.values()),
        rows_per_update=rows_each,
        rows_per_experience=rows_each,
        head_chunk_tokens=4096,
        perturb_per=per,
        shared_prefix=True,
        max_tokens_per_micro_batch=max_tokens,
    )


def on_pretended_device(layout: Layout) -> Layout:
    return dataclasses.replace(layout, device=DEVICE)


def device_tensors(trainable: Trainable) -> Iterator[Tensor]:
    """Yields everything of a policy that a GPU would hold and that Megatron makes by itself."""
    for stage in trainable.stages:
        yield from stage.parameters()
        yield from stage.buffers()
    for ddp in trainable.ddps:
        for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers):
            yield buffer.grad_data
            if buffer.param_data is not None:
                yield buffer.param_data
    for group in trainable.optimizer.param_groups:
        yield from group["params"]
