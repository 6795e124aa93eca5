"""The `vppo` command: parses the command line and calls the function that does the work.

Modules that take seconds to import are imported when their command runs, so that `vppo --help` answers at once.
"""

from __future__ import annotations

import argparse
import functools
import os
import signal
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from megatron_vppo.cli.arguments import positive
from megatron_vppo.cli.convert import add_commands as add_convert_commands
from megatron_vppo.cli.data_check import add_data_check_options, run_data_check
from megatron_vppo.cli.dry_run_options import add_dry_run_options, check_dry_run_options
from megatron_vppo.cli.errors import DO_NOT_RESTART, MISTAKE, STOPPED, error_text, is_mistake, mistake_status
from megatron_vppo.cli.eval import add_eval_options, run_eval
from megatron_vppo.cli.import_config import add_import_options, run_import
from megatron_vppo.cli.launch import (
    check_rank,
    end_with_torchrun,
    is_first_on_host,
    is_trainer_rank,
    launch_ranks,
    quieten_libraries,
    refuse_several_processes,
    stop_signals,
    take_rank_from_slurm,
    wait_for_other_tasks,
)
from megatron_vppo.cli.output import (
    READER_LEFT,
    discard,
    flush_output,
    open_closed_streams,
    output_is_full,
    reader_left,
    say,
)
from megatron_vppo.cli.plan_options import add_plan_options
from megatron_vppo.cli.slurm import add_slurm_options, run_slurm
from megatron_vppo.cli.trainer_rank import is_launched_by_us, run_rank
from megatron_vppo.config.choices import Fp8Recipe
from megatron_vppo.system.requeue import do_not_requeue
from megatron_vppo.system.stop_signals import StopSignals
from megatron_vppo.system.visible import visible

if typing.TYPE_CHECKING:
    from megatron_vppo.config.schema import RunConfig
    from megatron_vppo.system.slurm import SlurmTask

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
INTERRUPTED = 128 + signal.SIGINT
"""The exit status after Ctrl-C: what a shell reports for a program that SIGINT ended."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    A reader that leaves early (`vppo plan ... | head`) is no error: the command stops without a message, with status
    READER_LEFT.
    """
    open_closed_streams()
    try:
        try:
            status = _run(arguments)
        except SystemExit as end:  # argparse: --help, or a mistake in the command line
            flush_output()
            if end.code == MISTAKE and mistake_status() == DO_NOT_RESTART:
                do_not_requeue(None, "a mistake in the command line")
                wait_for_other_tasks()
                return mistake_status()
            raise
        flush_output()
        return status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        unread = [stream for stream in (sys.stdout, sys.stderr) if reader_left(stream)]
        if not unread:  # another pipe: to an engine, to a reward worker
            raise
        for stream in unread:
            discard(stream)
        return READER_LEFT
    except OSError as error:
        if not output_is_full():
            raise
        discard(sys.stdout)
        print(visible(f"vppo: standard output: {error_text(error)}"), file=sys.stderr, flush=True)
        return MISTAKE


def _run(arguments: Sequence[str] | None) -> int:
    """Parses and calls. A user's mistake ends in one message on stderr, and the status of one."""
    options = _parser().parse_args(arguments)
    options.words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        status: int = options.run(options)
    except (ValueError, OSError) as error:
        if not is_mistake(error) or (isinstance(error, OSError) and output_is_full()):
            raise
        status = mistake_status(error)
        if status == DO_NOT_RESTART:
            do_not_requeue(None, error_text(error))
        if is_first_on_host():
            print(visible(f"vppo: {error_text(error)}"), file=sys.stderr, flush=True)
        wait_for_other_tasks()
        return status
    return status


# --- The command line -------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vppo",
        description="Trains Qwen-VL models with VPPO, a reinforcement learning method that favours tokens which depend "
        "on the image. Megatron Core trains, vLLM samples the responses.",
        epilog="'vppo COMMAND --help' describes a command. megatron_vppo/config/schema.py describes every setting.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (
        _add_train,
        _add_sweep,
        _add_eval,
        _add_slurm,
        _add_import_config,
        _add_data,
        _add_plan,
        _add_doctor,
        _add_convert,
        _add_report,
        _add_summary,
        _add_fp8_fidelity,
    ):
        add(commands)
    return parser


def _add_train(commands: Commands) -> None:
    train = commands.add_parser(
        "train",
        help="train a model",
        description="Trains a model as the configuration file says. Starts one process per trainer rank, unless "
        "torchrun or srun has started them already. A run that was stopped goes on from its last checkpoint "
        "(trainer.resume).",
    )
    _add_settings(train)
    add_dry_run_options(train)
    train.set_defaults(run=_train)


def _add_sweep(commands: Commands) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="run variants of a configuration over seeds, and compare them",
        description="Runs every variant of a sweep file with every seed, one after the other, and compares them "
        "question by question. Finished runs are not run again, others go on where they were. A run that fails does "
        "not keep the next one from starting. Exit status 1: one failed. docs/sweeps.md explains file and numbers.",
    )
    sweep.add_argument("file", type=Path, metavar="FILE", help="YAML file of the sweep")
    sweep.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings for all runs; they win over the file"
    )
    instead = sweep.add_mutually_exclusive_group()
    instead.add_argument("--list", action="store_true", help="print the runs and how far each one is")
    instead.add_argument("--report", action="store_true", help="print and write the results so far")
    sweep.set_defaults(run=_sweep)


def _add_eval(commands: Commands) -> None:
    evaluation = commands.add_parser(
        "eval",
        help="evaluate a model on benchmarks, and compare it with others",
        description="Samples responses to the questions of all benchmarks of a suite with vLLM alone, grades them and "
        "writes results and a page. An evaluation that was interrupted goes on where it was; a finished one is only "
        "summarised again. docs/evaluation.md explains file and numbers.",
    )
    add_eval_options(evaluation)
    evaluation.set_defaults(run=run_eval)


def _add_slurm(commands: Commands) -> None:
    slurm = commands.add_parser(
        "slurm",
        help="write the batch script of a run for SLURM, and send it",
        description="Checks the settings of a run against the size of a job, and writes its batch script: plain bash "
        "to keep and to edit. The job saves and goes back into the queue at its time limit, and after a failure that a "
        "restart may cure. Exit status 1: SLURM would not take it. docs/slurm.md explains the script.",
    )
    settings = slurm.add_mutually_exclusive_group(required=True)
    settings.add_argument("--config", type=Path, metavar="FILE", help="YAML file with the settings")
    settings.add_argument(
        "--sweep", type=Path, metavar="FILE", help="file of `vppo sweep`: a job array with all of its runs"
    )
    _add_overrides(slurm)
    add_slurm_options(slurm)
    slurm.set_defaults(run=run_slurm)


def _add_import_config(commands: Commands) -> None:
    importing = commands.add_parser(
        "import-config",
        help="translate a configuration of VPPO-RL or EasyR1",
        description="Writes our YAML file for a YAML file or launch script of VPPO-RL or EasyR1 0.3.3. Every key is "
        "translated, or dropped where nothing depends on it, or refused by name with the reason. Their defaults hold "
        "where they differ from ours. docs/import.md has the table of keys.",
    )
    add_import_options(importing)
    importing.set_defaults(run=run_import)


def _add_data(commands: Commands) -> None:
    data = commands.add_parser("data", help="look at a data set", description="Looks at data sets.")
    subcommands = data.add_subparsers(required=True, metavar="COMMAND")
    check = subcommands.add_parser(
        "check",
        help="what is in it, what is wrong with it, and what another set has too",
        description="Reads every row of a data set and decodes every image: broken rows with their reasons, image "
        "sizes, rows that are there twice, and with --against those that another set has too, by content. Needs no "
        "model. Exit status 1: some row is broken, or both sets have some row.",
    )
    add_data_check_options(check)
    check.set_defaults(run=run_data_check)


def _add_plan(commands: Commands) -> None:
    plan = commands.add_parser(
        "plan",
        help="find parallel layouts that fit your GPUs",
        description="Computes which parallel layouts of a model fit the memory of the GPUs, and prints the settings of "
        "the best one. With --gpu it also models the seconds of a step, and the fastest is the best. Needs no GPU and "
        "no weights. Exit status 1: no layout fits.",
    )
    add_plan_options(plan)
    plan.set_defaults(run=_plan)


def _add_doctor(commands: Commands) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="check this machine and its packages",
        description="Checks the machine, the installed packages and which FP8 recipes can run here. Each line is 'ok', "
        "'note' (it works, but could be better) or 'problem' (something will fail; the line says what to do). Exit "
        "status 1: there is a problem.",
    )
    doctor.set_defaults(run=_doctor)


def _add_convert(commands: Commands) -> None:
    convert = commands.add_parser(
        "convert",
        help="convert checkpoints between Hugging Face and Megatron",
        description="Converts checkpoints between Hugging Face's and Megatron's format, and compares them.",
    )
    add_convert_commands(convert)


def _add_report(commands: Commands) -> None:
    report = commands.add_parser(
        "report",
        help="write a run's charts and samples as one HTML page",
        description="Writes RUN_DIR/report.html: charts of the metrics, and sampled responses with every token shaded "
        "by how much it depends on the image. A run that has not ended can be reported, too.",
    )
    _add_run_dir(report)
    report.set_defaults(run=_report)


def _add_summary(commands: Commands) -> None:
    summary = commands.add_parser(
        "summary",
        help="print the outcome of a run as JSON",
        description="Prints one line of JSON: validation accuracy at the start and at the end, steps, seconds, the "
        "largest difference between the log-probs of vLLM and of the trainer, and whether weight checksums agreed.",
    )
    _add_run_dir(summary)
    summary.add_argument(
        "--seconds-rl",
        type=float,
        metavar="SECONDS",
        help="value of seconds_rl, such as the wall-clock time of the whole command (default: the sum over the steps)",
    )
    summary.set_defaults(run=_summary)


def _add_fp8_fidelity(commands: Commands) -> None:
    fidelity = commands.add_parser(
        "fp8-fidelity",
        help="measure how much FP8 changes what VPPO selects",
        description="Samples responses, scores them in the configured dtype and again in FP8, and compares which "
        "tokens VPPO would train on. FP8 is emulated where no GPU has it.",
    )
    _add_settings(fidelity)
    fidelity.add_argument(
        "--prompts",
        type=positive,
        metavar="N",
        help="prompts to sample responses for (default: data.rollout_batch_size)",
    )
    fidelity.add_argument(
        "--recipe",
        action="append",
        choices=typing.get_args(Fp8Recipe),
        help="FP8 recipe to measure; repeat it for several (default: fp8.recipe, or every recipe if that is not set)",
    )
    fidelity.add_argument(
        "--out", type=Path, metavar="FOLDER", help="folder for the results (default: fp8_fidelity in the run folder)"
    )
    fidelity.set_defaults(run=_fp8_fidelity)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="YAML file with the settings")
    _add_overrides(parser)


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings that replace those of the file, such as rollout.n=8",
    )


def _add_run_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of the run, with metrics.jsonl in it")


# --- The commands -----------------------------------------------------------------------------------------------------


def _train(options: argparse.Namespace) -> int:
    check_dry_run_options(options)
    if options.dry_run:
        return _dry_run(options)
    task = take_rank_from_slurm()
    check_rank()
    end_with_torchrun()
    # Before any library starts a thread, which would be one that a signal ends.
    signals = _stop_signals() if is_trainer_rank() else None
    quieten_libraries()
    from megatron_vppo.config.checks import check_training
    from megatron_vppo.config.load import load_config
    from megatron_vppo.setup.run_folder import RunFolder
    from megatron_vppo.system.attempt import attempt_name

    config = load_config(options.config, options.overrides)
    check_training(config)
    logs = RunFolder.of(config.trainer).logs
    if signals is not None:
        work = functools.partial(_train_on_this_rank, config, task, signals)
        return run_rank(work, logs=logs / attempt_name())

    from megatron_vppo.setup.preflight import check_before_launch

    num_ranks = check_before_launch(config)
    launch_ranks(num_ranks, ["train", "--config", str(options.config), *options.overrides], logs=logs)


def _stop_signals() -> StopSignals:
    ours = is_launched_by_us()
    return StopSignals(stop_signals(launched_by_us=ours), ended_by=os.getppid() if ours else None)


def _dry_run(options: argparse.Namespace) -> int:
    refuse_several_processes("--dry-run")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: GPUs that are here have no part in it
    quieten_libraries()
    from megatron_vppo.cli.dry_run import run_dry_run
    from megatron_vppo.config.checks import check_training
    from megatron_vppo.config.load import load_config

    config = load_config(options.config, options.overrides)
    check_training(config)
    return run_dry_run(config, options)


def _train_on_this_rank(config: RunConfig, task: SlurmTask | None, signals: StopSignals) -> int:
    """Meets the other ranks and trains with them. What takes long to import comes after what can be refused before."""
    from megatron_vppo.setup.world import open_world

    check = None if is_launched_by_us() else functools.partial(_check_settings, config)
    world = open_world(config, task, check_settings=check)
    from megatron_vppo.trainer.run import run_training

    return 0 if run_training(config, world, say=say, signals=signals) else STOPPED


def _check_settings(config: RunConfig, local_ranks: int) -> None:
    from megatron_vppo.setup.preflight import check_settings

    check_settings(config, world_size=int(os.environ["WORLD_SIZE"]), local_ranks=local_ranks)


def _sweep(options: argparse.Namespace) -> int:
    from megatron_vppo.cli.sweep import run_sweep

    return run_sweep(options)


def _plan(options: argparse.Namespace) -> int:
    quieten_libraries()
    from megatron_vppo.cli.plan import run_plan

    return run_plan(options)


def _doctor(options: argparse.Namespace) -> int:
    quieten_libraries()
    from megatron_vppo.cli.doctor import run_doctor

    return run_doctor()


def _report(options: argparse.Namespace) -> int:
    from megatron_vppo.observability.report import write_report

    say(str(write_report(options.run_dir)))
    return 0


def _summary(options: argparse.Namespace) -> int:
    from megatron_vppo.observability.json_lines import dump_line
    from megatron_vppo.observability.summary import summarize

    outcome = summarize(options.run_dir)
    if options.seconds_rl is not None:
        outcome["seconds_rl"] = options.seconds_rl
    print(dump_line(outcome), end="")
    return 0


def _fp8_fidelity(options: argparse.Namespace) -> int:
    quieten_libraries()
    from megatron_vppo.cli.fp8_fidelity import run_fp8_fidelity

    return run_fp8_fidelity(options)


if __name__ == "__main__":
    sys.exit(main())
