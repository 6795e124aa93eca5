"""The command line of `vppo plan`, apart from the plan itself, whose imports take seconds."""

from __future__ import annotations

import argparse
import typing

from megatron_vppo.cli.arguments import gibibytes, gpu_counts, positive
from megatron_vppo.config.schema import ActorConfig, DataConfig, ModelConfig


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options. Lengths and rows have the defaults of the settings that they stand for."""

    def number(flag: str, value: int | None, text: str) -> None:
        shown = "" if value is None else " (default: %(default)s)"
        parser.add_argument(flag, type=positive, default=value, metavar="N", help=text + shown)

    data, actor = DataConfig.model_fields, ActorConfig.model_fields
    parser.add_argument(
        "--model",
        required=True,
        help="Hugging Face folder (its config.json is enough), or a released size such as qwen2.5-vl-32b",
    )
    parser.add_argument("--gpus", required=True, type=positive, metavar="N", help="number of GPUs, over all nodes")
    parser.add_argument(
        "--gpu-memory", required=True, type=gibibytes, metavar="GIB", help="memory of one GPU in GiB, such as 79.6"
    )
    number("--gpus-per-node", 8, "GPUs of a node; tensor parallelism and an engine stay within one")
    number("--prompt-tokens", data["max_prompt_length"].default, "longest prompt, image tokens included")
    number("--response-tokens", data["max_response_length"].default, "longest response")
    number("--images-per-row", 1, "images of a prompt")
    number("--image-tokens", None, "tokens of an image (default: as many as data.max_pixels allows)")
    number(
        "--rows-per-micro-batch",
        actor["micro_batch_size_per_device_for_update"].default,
        "responses of a micro-batch on one GPU",
    )
    for flag, setting, text in (
        ("--freeze", ModelConfig.model_fields["freeze"], "parts of the model that are not trained"),
        ("--offload", actor["offload"], "trainer state that waits in host memory while engines sample"),
    ):
        parts = typing.get_args(typing.get_args(setting.annotation)[0])
        parser.add_argument(
            flag, nargs="+", choices=parts, default=[], metavar="PART", help=f"{text}; any of {', '.join(parts)}"
        )
    parser.add_argument(
        "--perception-loss",
        action="store_true",
        help="a run with PAPO's perception loss instead of VPPO: the perturbed view is read in the update, and not in "
        "scoring",
    )
    number("--rollout-tp", None, "GPUs of one vLLM engine (default: the fewest that fit)")
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help="also model the seconds of a step and order layouts by them: h100, h800, h200, a100, or a JSON file of "
        "measured ceilings (tools/bench/ceilings.py)",
    )
    number("--mean-prompt-tokens", None, "mean prompt, for --gpu (default: the images and 120)")
    number("--mean-response-tokens", None, "mean response, for --gpu (default: 450)")
    parser.add_argument(
        "--simulate",
        type=gpu_counts,
        metavar="N,N,...",
        help="the same step on these numbers of GPUs, for --gpu, such as 8,64,512",
    )
    number("--answers", 16, "sequences of full length, prompt and response, that an engine must hold at once")
