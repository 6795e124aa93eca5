"""`vppo import-config`: a configuration of VPPO-RL or EasyR1 in, our YAML file and a report out."""

from __future__ import annotations

import argparse
import os
import shlex
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_vppo.cli.output import say
from megatron_vppo.importing.import_config import ImportedConfig, import_config
from megatron_vppo.importing.sources import TheirConfig, read_source
from megatron_vppo.system.whole import write_new_text

WIDTH = 100
"""The characters of a line of the report."""


def add_import_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "source", type=Path, metavar="FILE", help="their YAML file, or the script that starts verl.trainer.main"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="keys of theirs that replace those of the file or script, such as worker.rollout.n=8; config=FILE "
        "replaces the YAML file of a script",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the file to write (default: here, named like theirs, _vppo.yaml)"
    )
    parser.add_argument("--verbose", action="store_true", help="list every key, those without a counterpart included")


def run_import(options: argparse.Namespace) -> int:
    """Writes our file and says what became of each key.

    Raises:
        ValueError: keys or values that cannot be imported, or another file where this one belongs.
        OSError: a file that is not there or cannot be written.
    """
    out: Path = options.out or Path(f"{options.source.stem}_vppo.yaml")
    source = read_source(options.source, options.overrides, environment=os.environ)
    imported = import_config(source, name=str(options.source))
    command = "\n# ".join(shlex.join(["vppo", *options.words]).splitlines())
    write_new_text(out, f"# Written by: {command}\n{imported.text}", option="--out")
    say("\n".join(_report(out, source, imported, verbose=options.verbose)))
    return 0


# --- The report -------------------------------------------------------------------------------------------------------


def _report(out: Path, source: TheirConfig, imported: ImportedConfig, *, verbose: bool) -> Iterator[str]:
    yield f"{out}: {len(imported.translated)} keys translated, {len(imported.dropped)} without a setting here"
    yield f"their file: {source.base}" if source.base else "their file: none, so their defaults hold"
    yield "algorithm: preset 'reference', which computes what the authors' code computes (docs/algorithm.md)"
    if verbose:
        yield from _block("Translated", imported.translated)
        yield from _block("Without a setting here", imported.dropped)
    else:
        yield "--verbose lists them"
    yield from _block("Notes on their values", source.notes)
    yield from _block("What differs from their run", imported.differs)
    gpus = (source.values["trainer.nnodes"], source.values["trainer.n_gpus_per_node"])
    yield ""
    yield "Theirs has FSDP and no parallel.* settings. A dry run says if it fits, and which of these would:"
    yield f"  vppo train --config {shlex.quote(str(out))} --dry-run --nodes {gpus[0]} --gpus-per-node {gpus[1]}"


def _block(title: str, lines: Sequence[str]) -> Iterator[str]:
    """Yields an empty line, the title and the lines below it; nothing if there are no lines."""
    if lines:
        yield ""
        yield title
    for line in lines:
        yield textwrap.fill(
            line, width=WIDTH, initial_indent="  ", subsequent_indent="    ", break_long_words=False,
            break_on_hyphens=False,
        )  # fmt: skip
