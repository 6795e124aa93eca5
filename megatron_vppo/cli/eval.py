"""`vppo eval`: benchmarks, sampled by engines alone, graded, and compared with other models."""

from __future__ import annotations

import argparse
import typing
from pathlib import Path

from megatron_vppo.cli.launch import quieten_libraries, refuse_several_processes
from megatron_vppo.cli.output import say
from megatron_vppo.observability.json_lines import dump_line

if typing.TYPE_CHECKING:
    from megatron_vppo.evaluation.inputs import EvalInputs


def add_eval_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="FOLDER", help="Hugging Face folder or hub id")
    parser.add_argument("--suite", required=True, type=Path, metavar="FILE", help="YAML file of the suite")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="folder for responses and results")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace those of the file, such as rollout.n=4"
    )
    parser.add_argument(
        "--against", nargs="+", default=[], type=Path, metavar="OTHER",
        help="--out folders of other evaluations, to compare question by question; settings come before this option",
    )  # fmt: skip


def run_eval(options: argparse.Namespace) -> int:
    """Samples and grades what is not recorded yet, then writes and prints the results.

    Raises ValueError for a model, a suite or settings that cannot be used, and for an `--out` that was made otherwise.
    """
    refuse_several_processes("vppo eval")
    quieten_libraries()
    from megatron_vppo.evaluation.folder import read_settings
    from megatron_vppo.evaluation.run import evaluate
    from megatron_vppo.evaluation.settings import load_suite
    from megatron_vppo.system.whole import exit_on_sigterm

    config = load_suite(options.suite, options.overrides)
    for other in options.against:
        read_settings(other)  # before hours of sampling
    with exit_on_sigterm():
        inputs = evaluate(config, options.model, options.out, say=say)
        _write_results(options, inputs)
    return 0


def _write_results(options: argparse.Namespace, inputs: EvalInputs) -> None:
    """Writes summary.json, summary.md and report.html into the folder, and prints the tables."""
    from megatron_vppo.evaluation.browser import pick_shown
    from megatron_vppo.evaluation.page import render_evaluation
    from megatron_vppo.evaluation.results import gather_results, read_run
    from megatron_vppo.evaluation.table import as_json, markdown, short_markdown
    from megatron_vppo.system.whole import whole_file

    ours, *others = [read_run(folder, inputs.benchmarks) for folder in (options.out, *options.against)]
    results = gather_results(options.suite.stem, inputs.benchmarks, ours, others)
    page = render_evaluation(results, pick_shown(inputs.benchmarks, inputs.images, [ours, *others]))
    for name, text in (
        ("summary.json", dump_line(as_json(results))),
        ("summary.md", markdown(results)),
        ("report.html", page),
    ):
        with whole_file(options.out / name) as file:
            file.write(text.encode("utf-8"))
    say(short_markdown(results))
    say(f"page: {options.out / 'report.html'}")
