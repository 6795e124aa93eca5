"""Made-up rows of realistic sizes: prompts with one picture, several answers each, and a loss on them."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_vppo.algorithm.types import ImageRef, LossSpec, PerturbKey, Prompt, Response, TrainBatch

CLIP = LossSpec(clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_dual=3.0, entropy_kind="nll")
KEPT_TOKENS = 0.4
"""Share of the response tokens that have a policy gradient; the authors' setting."""
ENTROPY_COEFFICIENT = 0.06


@dataclass(frozen=True)
class WorkSizes:
    prompts: int
    responses_per_prompt: int
    text_tokens: int
    """Of a prompt, besides its picture."""
    response_median: int
    response_sigma: float
    """Lengths are log-normal: of the log of a length."""
    response_limit: int
    pictures: tuple[tuple[int, int], ...]
    """(height, width) in pixels, dealt to the prompts in turn."""
    seed: int = 0


@dataclass(frozen=True)
class Workload:
    responses: tuple[Response, ...]
    """The answers to a prompt lie together."""
    pixels: tuple[Tensor, ...]
    """Of each prompt's picture, float32 [patches, values], in host memory, as the trainer has them."""

    def patches(self, ref: ImageRef, perturb: PerturbKey | None) -> Tensor:
        """A perturbed picture has other values in training, not here; it is another picture for the model all the same.

        Makes a workload the Pixels of megatron_vppo/parallel/batching.py.
        """
        return self.pixels[ref.row]

    def train_batch(self, *, vocabulary: int) -> TrainBatch:
        """A mini-batch of all rows, with random advantages; the old policy is what random weights are near: uniform."""
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
    words = min(media)  # token ids below are text
    responses, pixels = [], []
    for number in range(sizes.prompts):
        height, width = sizes.pictures[number % len(sizes.pictures)]
        grid = (1, height // vision.patch_size, width // vision.patch_size)
        picture = [hf_config.image_token_id] * (math.prod(grid) // vision.spatial_merge_size**2)
        text = [draw.randrange(1, words) for _ in range(sizes.text_tokens)]
        prompt = Prompt(
            split="train", row=number, problem="", answer="",
            token_ids=(hf_config.vision_start_token_id, *picture, hf_config.vision_end_token_id, *text),
            compact_token_ids=(), images=(ImageRef("train", number, 0),), grids_thw=(grid,),
        )  # fmt: skip
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        pixels.append(torch.randn(math.prod(grid), values, generator=generator))
        for sample in range(sizes.responses_per_prompt):
            length = round(draw.lognormvariate(math.log(sizes.response_median), sizes.response_sigma))
            length = max(2, min(length, sizes.response_limit))
            tokens = tuple(draw.randrange(1, words) for _ in range(length))
            responses.append(Response(prompt, number, sample, tokens, (0.0,) * length, "stop", 0))
    return Workload(tuple(responses), tuple(pixels))


def with_layers(hf_config: Any, layers: int) -> Any:
    """The same model with its first `layers` language layers."""
    if not 1 <= layers <= hf_config.text_config.num_hidden_layers:
        raise ValueError(f"{layers} layers of a model of {hf_config.text_config.num_hidden_layers}")
    cut = copy.deepcopy(hf_config)
    cut.text_config.num_hidden_layers = layers
    cut.text_config.layer_types = cut.text_config.layer_types[:layers]
    return cut


@torch.no_grad()
def fill_with_noise(model: torch.nn.Module, *, seed: int) -> None:
    """Matrices small and normal, the scales of norms one, biases zero: nothing overflows or dies out."""
    for number, (name, parameter) in enumerate(model.named_parameters()):
        generator = torch.Generator(parameter.device).manual_seed(seed + number)
        if parameter.dim() > 1:
            parameter.normal_(0.0, 0.02, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
