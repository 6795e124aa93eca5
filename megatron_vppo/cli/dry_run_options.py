"""The options of `vppo train --dry-run`, apart from the dry run itself, whose imports take seconds."""

from __future__ import annotations

import argparse

from megatron_vppo.cli.arguments import gibibytes, positive

DEFAULTS = {"nodes": 1, "gpus_per_node": 8, "gpu_memory": 80 * 2**30}
"""The cluster of a dry run, as far as the command line leaves it out."""


def add_dry_run_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--dry-run` and the options that describe the cluster. Those are None where they are not given."""
    group = parser.add_argument_group(
        "dry run",
        "Checks a run on a cluster without GPUs, weights or network: settings, process groups, batches of every rank, "
        "engines on hosts, memory of each phase, and one longest micro-batch without values. Exit status 0: it fits; "
        "1: it does not fit the memory; 2: a setting is impossible.",
    )
    group.add_argument("--dry-run", action="store_true", help="check and start nothing")
    group.add_argument("--nodes", type=positive, metavar="N", help=f"nodes (default: {DEFAULTS['nodes']})")
    group.add_argument(
        "--gpus-per-node",
        type=positive,
        metavar="N",
        help=f"GPUs of a node, each with a trainer rank (default: {DEFAULTS['gpus_per_node']})",
    )
    group.add_argument(
        "--gpu-memory",
        type=gibibytes,
        metavar="GIB",
        help=f"memory of one GPU in GiB, such as 79.6 (default: {DEFAULTS['gpu_memory'] // 2**30})",
    )


def check_dry_run_options(options: argparse.Namespace) -> None:
    """Fills in the defaults of a dry run.

    Raises:
        ValueError: options of a dry run without --dry-run.
    """
    given = [name for name in DEFAULTS if getattr(options, name) is not None]
    if given and not options.dry_run:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(
            f"{flags}: only --dry-run takes the cluster from the command line; add --dry-run, or leave it out: a run "
            "takes the nodes and GPUs that it is started on"
        )
    for name, default in DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
