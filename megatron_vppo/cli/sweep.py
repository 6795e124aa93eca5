"""`vppo sweep`: variants of a configuration over seeds, run, listed or compared."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping

from megatron_vppo.cli.errors import STOPPED
from megatron_vppo.cli.launch import refuse_several_processes
from megatron_vppo.cli.output import say
from megatron_vppo.observability.json_lines import dump_line
from megatron_vppo.sweep.execute import SweepOutcome, execute
from megatron_vppo.sweep.page import render_sweep
from megatron_vppo.sweep.plan import Sweep, SweepRun, plan_sweep
from megatron_vppo.sweep.results import gather_results
from megatron_vppo.sweep.status import RunStatus, check_settings, status_of
from megatron_vppo.sweep.sweep_file import read_sweep_file
from megatron_vppo.sweep.table import as_json, markdown
from megatron_vppo.system.whole import whole_file


def run_sweep(options: argparse.Namespace) -> int:
    """Runs what is not finished and prints the results. Returns 1 if a run failed.

    Raises:
        ValueError: a sweep file or settings that do not load, or runs that are there with other settings.
    """
    sweep = plan_sweep(read_sweep_file(options.file), options.overrides)
    states = _states(sweep)
    if options.list:
        say("\n".join(_listed(sweep, states)))
        return 0
    check_settings(sweep.runs, states)
    outcome = SweepOutcome()
    if not options.report:
        refuse_several_processes("vppo sweep")
        left = [run for run in sweep.runs if states[run.name].state != "finished"]
        say(f"sweep: {len(left)} of {len(sweep.runs)} runs are to do, {len(sweep.runs) - len(left)} are finished")
        outcome = execute(left, train_command, stopped=STOPPED, say=say)
    _write_results(sweep)
    for name, status in outcome.failed.items():
        say(f"sweep: {name} failed (status {status}); the same command tries it again")
    if outcome.stopped_by is not None:
        return outcome.stopped_by
    return 1 if outcome.failed else 0


def train_command(run: SweepRun) -> list[str]:
    """Returns the command that does a run."""
    return [
        sys.executable, "-m", "megatron_vppo.cli.main", "train", "--config", str(run.config_file), *run.overrides,
    ]  # fmt: skip


def _states(sweep: Sweep) -> dict[str, RunStatus]:
    return {run.name: status_of(run) for run in sweep.runs}


def _listed(sweep: Sweep, states: Mapping[str, RunStatus]) -> list[str]:
    width = max(len(run.name) for run in sweep.runs)
    lines = []
    for run in sweep.runs:
        status = states[run.name]
        step = "" if status.step is None else f", step {status.step}"
        lines.append(f"{run.name:{width}}  {status.state}{step}")
        lines += [f"{'':{width}}    {difference}" for difference in status.differences]
    return lines


def _write_results(sweep: Sweep) -> None:
    """Writes results.json and report.html into the folder of the sweep, and prints the table."""
    states = _states(sweep)
    results = gather_results(sweep, states)
    sweep.folder.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("results.json", dump_line(as_json(results))),
        ("report.html", render_sweep(sweep, states, results)),
    ):
        with whole_file(sweep.folder / name) as file:
            file.write(text.encode("utf-8"))
    say(markdown(results))
    say(f"report: {sweep.folder / 'report.html'}")
