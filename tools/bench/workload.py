"""Synthetic rows of realistic sizes: prompts with one image, several responses each, and a loss on them.

Shape suffix legend: B = responses; T = response tokens, right-padded.
"""

from __future__ import annotations

import copy
import math
import random
from dataclasses import dataclass
from typing import Any

import torch

from megatron_vppo.algorithm.patches import Patches, PatchValues
from megatron_vppo.algorithm.types import ImageRef, LossSpec, PerturbKey, Prompt, Response, TrainBatch

CLIP = LossSpec(
    clip_ratio_low=0.2,
    clip_ratio_high=0.28,
    clip_ratio_dual=3.0,
    entropy_kind="nll",
    kl_kind="k3",
    policy_loss="clip",
    sapo_tau_positive=1.0,
    sapo_tau_negative=1.05,
)
KEPT_TOKENS = 0.4
"""The share of response tokens with policy gradient, as the authors set it."""
ENTROPY_COEFFICIENT = 0.06


@dataclass(frozen=True)
class WorkSizes:
    prompts: int
    responses_per_prompt: int
    text_tokens: int
    """The tokens of a prompt, apart from its image."""
    response_median: int
    response_sigma: float
    """The standard deviation of the logarithm of a length. Lengths are log-normal."""
    response_limit: int
    images: tuple[tuple[int, int], ...]
    """The images' (height, width) in pixels, given to the prompts in turn."""
    seed: int = 0


@dataclass(frozen=True)
class Workload:
    responses: tuple[Response, ...]
    """The responses to a prompt are neighbours."""
    pixels: tuple[Patches, ...]
    """The patches of each prompt's image, in host memory as in the trainer."""
    values: PatchValues

    def patches(self, ref: ImageRef, perturb: PerturbKey | None) -> Patches:
        """Returns the same patches for an original and a perturbed image. The model treats them as two images anyway.

        Makes a workload the Pixels of megatron_vppo/parallel/batching.py.
        """
        return self.pixels[ref.row]

    def train_batch(self, *, vocabulary: int) -> TrainBatch:
        """Makes a mini-batch of all rows, with random advantages and a uniform old policy, as random weights have."""
        generator = torch.Generator().manual_seed(1)
        shape = (len(self.responses), max(len(response.token_ids) for response in self.responses))
        mask_BT = torch.zeros(shape)
        for row, response in enumerate(self.responses):
            mask_BT[row, : len(response.token_ids)] = 1.0
        kept_BT = mask_BT * (torch.rand(shape, generator=generator) < KEPT_TOKENS)
        return TrainBatch(
            responses=self.responses,
            old_logp_BT=-math.log(vocabulary) * mask_BT,
            advantage_BT=torch.randn(shape[0], 1, generator=generator) * mask_BT,
            pg_weight_BT=kept_BT / mask_BT.sum(),
            entropy_weight_BT=ENTROPY_COEFFICIENT * mask_BT / mask_BT.sum(),
            response_mask_BT=mask_BT,
            loss=CLIP,
        )

    def shape(self) -> dict[str, Any]:
        lengths = sorted(len(response.token_ids) for response in self.responses)
        prompts = {response.group_id: response.prompt for response in self.responses}
        return {
            "rows": len(self.responses),
            "prompt_tokens": [len(prompt.token_ids) for prompt in prompts.values()],
            "response_tokens": {
                "mean": round(sum(lengths) / len(lengths), 1),
                "least": lengths[0],
                "most": lengths[-1],
            },
            "patches": [math.prod(prompt.grids_thw[0]) for prompt in prompts.values()],
        }


def make_workload(hf_config: Any, sizes: WorkSizes) -> Workload:
    draw, generator = random.Random(sizes.seed), torch.Generator().manual_seed(sizes.seed)
    vision = hf_config.vision_config
    media = (hf_config.image_token_id, hf_config.video_token_id, hf_config.vision_start_token_id)
    words = min(media)  # smaller token ids are text
    responses, pixels = [], []
    for number in range(sizes.prompts):
        height, width = sizes.images[number % len(sizes.images)]
        grid = (1, height // vision.patch_size, width // vision.patch_size)
        image = [hf_config.image_token_id] * (math.prod(grid) // vision.spatial_merge_size**2)
        text = [draw.randrange(1, words) for _ in range(sizes.text_tokens)]
        prompt = Prompt(
            split="train", row=number, problem="", answer="",
            token_ids=(hf_config.vision_start_token_id, *image, hf_config.vision_end_token_id, *text),
            compact_token_ids=(), images=(ImageRef("train", number, 0),), grids_thw=(grid,),
        )  # fmt: skip
        size = (math.prod(grid), vision.in_channels * vision.patch_size**2)
        pixels.append(Patches(torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)))
        for sample in range(sizes.responses_per_prompt):
            length = round(draw.lognormvariate(math.log(sizes.response_median), sizes.response_sigma))
            length = max(2, min(length, sizes.response_limit))
            tokens = tuple(draw.randrange(1, words) for _ in range(length))
            responses.append(Response(prompt, number, sample, tokens, (0.0,) * length, "stop", 0))
    of_bytes = (torch.arange(256) / 64.0 - 2.0).expand(vision.in_channels, -1).contiguous()
    return Workload(tuple(responses), tuple(pixels), PatchValues(of_bytes, frames=vision.temporal_patch_size))


def with_layers(hf_config: Any, layers: int) -> Any:
    """Cuts a model to its first `layers` language layers."""
    if not 1 <= layers <= hf_config.text_config.num_hidden_layers:
        raise ValueError(f"--layers {layers}: the model has {hf_config.text_config.num_hidden_layers} language layers")
    cut = copy.deepcopy(hf_config)
    cut.text_config.num_hidden_layers = layers
    if hasattr(cut.text_config, "layer_types"):
        cut.text_config.layer_types = cut.text_config.layer_types[:layers]
    return cut


@torch.no_grad()
def fill_with_noise(model: torch.nn.Module, *, seed: int) -> None:
    """Fills matrices with small normal numbers, norm weights with ones, biases with zeros: nothing overflows."""
    for number, (name, parameter) in enumerate(model.named_parameters()):
        generator = torch.Generator(parameter.device).manual_seed(seed + number)
        if parameter.dim() > 1:
            parameter.normal_(0.0, 0.02, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
