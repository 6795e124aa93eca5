"""`vppo convert`: checkpoints from Hugging Face's format to Megatron's and back, and a check that nothing changed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vppo.cli.arguments import positive
from megatron_vppo.cli.launch import quieten_libraries
from megatron_vppo.cli.output import say

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_commands(convert: argparse.ArgumentParser) -> None:
    """Adds the subcommands of `vppo convert`."""
    directions = convert.add_subparsers(required=True, metavar="DIRECTION")

    to_megatron = directions.add_parser("hf-to-megatron", help="Hugging Face folder -> folder to train from")
    to_megatron.add_argument("source", type=Path, help="folder with safetensors files and config.json")
    to_megatron.add_argument("target", type=Path, help="must not exist")
    _add_shared(to_megatron)
    to_megatron.set_defaults(run=_hf_to_megatron)

    to_hf = directions.add_parser("megatron-to-hf", help="converted folder or training checkpoint -> Hugging Face")
    to_hf.add_argument("checkpoint", type=Path, help="converted folder, or checkpoints/global_step_N of a run")
    to_hf.add_argument("target", type=Path, help="must not exist")
    to_hf.add_argument("--source", type=Path, help="Hugging Face folder with configuration, tokenizer and processor")
    to_hf.add_argument(
        "--shard-size", type=_bytes, default="5GB", metavar="SIZE", help="size of a file at most (default: 5GB)"
    )
    _add_shared(to_hf)
    to_hf.set_defaults(run=_megatron_to_hf)

    verify = directions.add_parser("verify", help="compare a conversion with its source, bit by bit")
    verify.add_argument("source", type=Path, help="Hugging Face folder")
    verify.add_argument("other", type=Path, help="its conversion: a converted folder, or a Hugging Face folder")
    verify.add_argument("--logprobs", action="store_true", help="also compare Megatron's log-probs with transformers'")
    verify.add_argument("--vllm", action="store_true", help="and with vLLM's (implies --logprobs)")
    verify.set_defaults(run=_verify)


def _add_shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the written weights (default: as they are)")
    parser.add_argument(
        "--processes", type=positive, default=1, metavar="N", help="processes that share the work (default: 1)"
    )


def _hf_to_megatron(options: argparse.Namespace) -> int:
    quieten_libraries()
    from megatron_vppo.conversion.to_megatron import hf_to_megatron

    return _interruptible(
        lambda: hf_to_megatron(options.source, options.target, dtype=_dtype(options.dtype), processes=options.processes)
    )


def _megatron_to_hf(options: argparse.Namespace) -> int:
    quieten_libraries()
    from megatron_vppo.conversion.to_hf import megatron_to_hf

    return _interruptible(
        lambda: megatron_to_hf(
            options.checkpoint,
            options.target,
            source=options.source,
            dtype=_dtype(options.dtype),
            shard_bytes=options.shard_size,
            processes=options.processes,
            change=_tokenizer_of_training(options.checkpoint),
        )
    )


def _tokenizer_of_training(checkpoint: Path) -> Callable[[Path], None] | None:
    """Returns what gives a model's folder the tokenizer that a run was trained with; None if that is the folder's own.

    The returned function raises ValueError if the folder has no such tokenizer.
    """
    from megatron_vppo.data.plain_think import THINK_TAGS, save_plain_tokenizer, think_token_ids, with_plain_think
    from megatron_vppo.models.model_files import open_without_weights
    from megatron_vppo.parallel.checkpoint_folder import saved_state

    state = saved_state(checkpoint)
    if state is None or not state.plain_think_tokens:
        return None

    def change(folder: Path) -> None:
        processor = open_without_weights(folder).processor
        if own := think_token_ids(processor.tokenizer):  # the folder of an earlier export has none
            save_plain_tokenizer(with_plain_think(processor).tokenizer, folder, own_ids=own)
        say(f"data.plain_think_tokens: the tokenizer has no tokens for {' and '.join(THINK_TAGS)}, as in training")

    return change


def _verify(options: argparse.Namespace) -> int:
    quieten_libraries()
    from megatron_vppo.conversion.verify import compare_checkpoints

    found = compare_checkpoints(options.source, options.other)
    for cast in found.casts:
        say(f"stored in another dtype; the source was cast: {cast}")
    for name in found.copies:
        say(f"{name} equals the embedding that it is tied to; a conversion writes it once")
    for name in found.differing:
        say(f"differs: {name}")
    say(f"{found.tensors} tensors, {found.num_bytes / 1e9:.2f} GB: {len(found.differing) or 'none'} differ in any bit")
    if found.differing:
        return 1
    return _logprobs(options) if options.logprobs or options.vllm else 0


def _logprobs(options: argparse.Namespace) -> int:
    from megatron_vppo.conversion.logprobs import compare_logprobs

    differences, tolerance = compare_logprobs(options.source, options.other, with_vllm=options.vllm)
    for found in differences:
        say(f"row {found.row}, {found.engines}: mean {found.mean:.2e}, largest {found.largest:.2e} nats")
    worst = max(found.mean for found in differences)
    say(f"largest mean {worst:.2e} nats, tolerance {tolerance:.0e}")
    return int(not worst <= tolerance)


def _interruptible(convert: Callable[[], None]) -> int:
    try:
        convert()
    except KeyboardInterrupt:
        print("\nvppo: interrupted; nothing was left behind", file=sys.stderr)
        return 130
    return 0


def _dtype(name: str | None) -> torch.dtype | None:
    import torch

    return None if name is None else getattr(torch, name)


def _bytes(text: str) -> int:
    unit = text[-2:].upper()
    if unit not in _UNITS or not text[:-2].isdecimal() or int(text[:-2]) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: write a size such as 5GB or 500MB")
    return int(text[:-2]) * _UNITS[unit]
