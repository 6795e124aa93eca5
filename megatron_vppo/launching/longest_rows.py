"""The responses of a mini-batch in which all rows are as long or as short as they may be, with images of full size.

Shape suffix legend: P = patches of an image; D = values of one patch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from megatron_vppo.algorithm.patches import Patches, PatchValues
from megatron_vppo.algorithm.types import ImageRef, PerturbKey, Prompt, Response
from megatron_vppo.config.schema import RunConfig
from megatron_vppo.models.hf_config import HfConfig, pixels_per_token, vision_token_ids

IMAGES_PER_ROW = 1
"""The images of a prompt, as `vppo plan` assumes them by default."""


def longest_responses(config: RunConfig, hf_config: HfConfig) -> list[Response]:
    """Makes the responses of one mini-batch, group after group, of which all have the longest prompt and response."""
    data = config.data
    return _responses(config, hf_config, prompt_tokens=data.max_prompt_length, tokens=data.max_response_length)


def shortest_responses(config: RunConfig, hf_config: HfConfig) -> list[Response]:
    """Makes the same with one token for question and response, so that a micro-batch of tokens has the most images."""
    return _responses(config, hf_config, prompt_tokens=0, tokens=1)


def _responses(config: RunConfig, hf_config: HfConfig, *, prompt_tokens: int, tokens: int) -> list[Response]:
    """Makes groups with one image each. Their responses share their token ids, so they are small.

    Args:
        prompt_tokens: the tokens of a prompt; if the image, those around it and one of text are more, it has these.
    """
    grid = image_grid(image_tokens(config, hf_config), merge=hf_config.vision_config.spatial_merge_size)
    text = _text_token(hf_config)
    image = [hf_config.image_token_id] * (math.prod(grid) // hf_config.vision_config.spatial_merge_size**2)
    words = max(1, prompt_tokens - len(image) - 2)
    prompt_ids = (hf_config.vision_start_token_id, *image, hf_config.vision_end_token_id, *[text] * words)
    response_ids, logps = (text,) * tokens, (0.0,) * tokens

    def responses() -> Iterator[Response]:
        for group in range(config.actor.global_batch_size):
            prompt = Prompt("train", group, "", "", prompt_ids, (), (ImageRef("train", group, 0),), (grid,))
            for sample in range(config.rollout.n):
                yield Response(prompt, group, sample, response_ids, logps, "length", 0)

    return list(responses())


def image_tokens(config: RunConfig, hf_config: HfConfig) -> int:
    """Returns the tokens of the largest image that data.max_pixels allows and that fits a prompt.

    The two tokens around it and one of text have to fit as well.
    """
    largest = config.data.max_pixels // pixels_per_token(hf_config)
    return max(1, min(largest, config.data.max_prompt_length - 3))


def image_grid(tokens: int, *, merge: int) -> tuple[int, int, int]:
    """Returns the grid, in patches, of an image of at most `tokens` tokens: as many as possible, then most square.

    Example: 1280 tokens are 32 x 40 of them, 64 x 80 patches with `merge` 2.
    """
    root = math.isqrt(tokens)
    rows = max(range(root // 2 + 1, root + 1), key=lambda rows: (rows * (tokens // rows), rows))
    return 1, rows * merge, tokens // rows * merge


class ZeroPixels:
    """Images of zeros, for the packer: their number of patches is all that counts."""

    def __init__(self, hf_config: HfConfig, *, patches: int) -> None:
        vision = hf_config.vision_config
        self.values = PatchValues(torch.zeros(vision.in_channels, 256), frames=vision.temporal_patch_size)
        bytes_PD = torch.zeros(patches, vision.in_channels * vision.patch_size**2, dtype=torch.uint8)
        self._patches = Patches(bytes_PD)

    def patches(self, ref: ImageRef, perturb: PerturbKey | None) -> Patches:
        return self._patches


def _text_token(hf_config: HfConfig) -> int:
    """Returns a token that is no image's: the vocabulary head refuses those as responses."""
    taken = set(vision_token_ids(hf_config))
    return next(token for token in range(hf_config.text_config.vocab_size) if token not in taken)
