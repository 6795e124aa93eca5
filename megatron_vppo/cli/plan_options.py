"""The command line of `vppo plan`, without what takes seconds to import."""

from __future__ import annotations

import argparse
import math
import typing

from megatron_vppo.config.schema import ActorConfig, DataConfig, ModelConfig


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Lengths and rows default to those of the settings."""

    def number(flag: str, value: int | None, text: str) -> None:
        shown = "" if value is None else " (default %(default)s)"
        parser.add_argument(flag, type=positive, default=value, metavar="N", help=text + shown)

    data, actor = DataConfig.model_fields, ActorConfig.model_fields
    parser.add_argument("--model", required=True, help="Hugging Face folder, or a released size such as qwen2.5-vl-32b")
    parser.add_argument("--gpus", required=True, type=positive, metavar="N", help="GPUs in all")
    parser.add_argument("--gpu-memory", required=True, type=gibibytes, metavar="GIB", help="of one GPU, such as 79.6")
    number("--gpus-per-node", 8, "a tensor-parallel group and an engine stay within a node")
    number("--prompt-tokens", data["max_prompt_length"].default, "longest prompt, image tokens included")
    number("--response-tokens", data["max_response_length"].default, "longest response")
    number("--images-per-row", 1, "pictures of a prompt")
    number("--image-tokens", None, "tokens of a picture; default: as many as data.max_pixels allows")
    number("--rows-per-micro-batch", actor["micro_batch_size_per_device_for_update"].default, "responses")
    for flag, setting, text in (
        ("--freeze", ModelConfig.model_fields["freeze"], "parts that are not trained"),
        ("--offload", actor["offload"], "trainer state that makes room"),
    ):
        parts = typing.get_args(typing.get_args(setting.annotation)[0])
        parser.add_argument(
            flag, nargs="+", choices=parts, default=[], metavar="PART", help=f"{text}: of {', '.join(parts)}"
        )
    number("--rollout-tp", None, "GPUs of an engine; default: the fewest that will do")
    number("--answers", 16, "sequences of full length that an engine has to hold at once")


def positive(text: str) -> int:
    """For argparse: a number of something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def gibibytes(text: str) -> int:
    """For argparse: a size in GiB, as bytes."""
    try:
        size = float(text) * 2**30
    except ValueError:
        size = math.nan
    if not 1 <= size < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of GiB")
    return int(size)
