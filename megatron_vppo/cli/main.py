"""The `vppo` command."""

from __future__ import annotations

import argparse
import sys
import traceback
import typing
from collections.abc import Sequence
from pathlib import Path

from megatron_vppo.cli.convert import add_commands as add_convert_commands
from megatron_vppo.cli.launch import (
    end_with_torchrun,
    is_trainer_rank,
    launch_ranks,
    quieten_libraries,
    take_rank_from_slurm,
)
from megatron_vppo.cli.plan_options import add_plan_options, positive
from megatron_vppo.config.choices import Fp8Recipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses and calls. Mistakes of the user (ValueError, a file that is not there or may not be read) end in one line
    on stderr and exit status 2.
    """
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except (ValueError, FileNotFoundError, PermissionError) as error:
        if is_trainer_rank():  # one line among those of many ranks would not say where
            traceback.print_exc()
        print(f"vppo: {error}", file=sys.stderr, flush=True)
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vppo", description="VPPO for Qwen-VL models on Megatron Core.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train a model",
        description="Trains. Starts its own local ranks where it does not run under torchrun or srun.",
    )
    train.add_argument("--config", required=True, type=Path, help="YAML file")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="dotted settings, such as rollout.n=8")
    train.set_defaults(run=_train)

    convert = commands.add_parser(
        "convert",
        help="checkpoints: Hugging Face to Megatron and back",
        description="Converts checkpoints between Hugging Face's and Megatron's format, and compares them.",
    )
    add_convert_commands(convert)

    plan = commands.add_parser(
        "plan", help="which parallel layouts fit", description="Layouts of a model that fit the GPUs, by arithmetic."
    )
    add_plan_options(plan)
    plan.set_defaults(run=_plan)

    fidelity = commands.add_parser(
        "fp8-fidelity",
        help="how much FP8 changes what VPPO picks",
        description="Scores the same responses in the configured dtype and in FP8, emulated where there is no GPU.",
    )
    fidelity.add_argument("--config", required=True, type=Path, help="YAML file")
    fidelity.add_argument(
        "--prompts", type=positive, metavar="N", help="to answer (default: as many as a training step)"
    )
    fidelity.add_argument(
        "--recipe",
        action="append",
        choices=typing.get_args(Fp8Recipe),
        help="may come several times (default: fp8.recipe, or every recipe)",
    )
    fidelity.add_argument("--out", type=Path, metavar="FOLDER", help="default: fp8_fidelity in the run folder")
    fidelity.add_argument("overrides", nargs="*", metavar="key=value", help="dotted settings, such as rollout.n=8")
    fidelity.set_defaults(run=_fp8_fidelity)

    doctor = commands.add_parser("doctor", help="what this machine and environment can do, and what is wrong")
    doctor.set_defaults(run=_doctor)

    report = commands.add_parser("report", help="write report.html of a run folder")
    report.add_argument("run_dir", type=Path)
    report.set_defaults(run=_report)
    return parser


def _train(options: argparse.Namespace) -> int:
    from megatron_vppo.config.checks import check_training
    from megatron_vppo.config.load import load_config

    config = load_config(options.config, options.overrides)
    check_training(config)
    take_rank_from_slurm()
    if not is_trainer_rank():
        quieten_libraries()
        from megatron_vppo.cli.preflight import check_before_launch

        launch_ranks(check_before_launch(config), ["train", "--config", str(options.config), *options.overrides])
    end_with_torchrun()
    quieten_libraries()
    from megatron_vppo.trainer.run import run_training

    run_training(config)
    return 0


def _plan(options: argparse.Namespace) -> int:
    quieten_libraries()
    from megatron_vppo.cli.plan import run_plan

    return run_plan(options)


def _fp8_fidelity(options: argparse.Namespace) -> int:
    quieten_libraries()
    from megatron_vppo.cli.fp8_fidelity import run_fp8_fidelity

    return run_fp8_fidelity(options)


def _doctor(options: argparse.Namespace) -> int:
    quieten_libraries()
    from megatron_vppo.cli.doctor import run_doctor

    return run_doctor()


def _report(options: argparse.Namespace) -> int:
    from megatron_vppo.observability.report import write_report

    print(write_report(options.run_dir))
    return 0


if __name__ == "__main__":
    sys.exit(main())
