"""The runs of a sweep: their names, settings and order; every problem before the first one starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vppo.config.load import load_config
from megatron_vppo.sweep.plan import plan_sweep
from megatron_vppo.sweep.sweep_file import read_sweep_file
from tests.sweep.folders import SWEEP, make_sweep


def test_each_variant_has_a_run_per_seed(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path)
    assert [(run.variant, run.seed) for run in sweep.runs] == [("vppo", 1), ("dapo", 1), ("vppo", 2), ("dapo", 2)]
    assert sweep.folder == tmp_path / "runs" / "study"
    assert [run.folder for run in sweep.of("dapo")] == [sweep.folder / "dapo-seed1", sweep.folder / "dapo-seed2"]
    run = sweep.runs[3]
    assert (run.config.trainer.seed, run.config.trainer.project_name) == (2, "study")
    assert not run.config.algorithm.use_vppo_on_perception and sweep.runs[2].config.algorithm.use_vppo_on_perception
    assert load_config(run.config_file, run.overrides) == run.config, "what `vppo train` is given is what was checked"


def test_the_command_line_wins(tmp_path: Path) -> None:
    text = SWEEP.replace("variants:", "overrides: [rollout.n=4]\nvariants:")
    assert {run.config.rollout.n for run in make_sweep(tmp_path, text, "rollout.n=2").runs} == {2}


def test_names_that_yaml_reads_as_something_else(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, SWEEP.replace("name: study", "name: '2026'"))
    assert sweep.folder.name == "2026"
    assert load_config(sweep.runs[0].config_file, sweep.runs[0].overrides).trainer.project_name == "2026"


@pytest.mark.parametrize(
    ("old", "new", "overrides", "messages"),
    [
        ("use_vppo_on_perception", "use_vpo_on_perception", (),
         ["dapo: ", "did you mean algorithm.use_vppo_on_perception?"]),
        ("vppo: []", "vppo: [rolout.n=3]", ("data.min_pixls=4",),
         ["vppo: ", "did you mean rollout?", "dapo: ", "did you mean data.min_pixels?"]),
        ("vppo: []", "vppo: [trainer.resume=false]", (), ["trainer.resume=false, but a sweep goes on"]),
        ("vppo: []", "vppo: [fp8.bf16_layers_at_ends=2]", (), ["set fp8.recipe or rollout.quantization"]),
        ("vppo: []", "vppo: [algorithm.use_vppo_on_perception=false, algorithm.use_advantage_shaping=false]", (),
         ["vppo and dapo have the same settings"]),
        ("", "", ("trainer.seed=3", "trainer.experiment_name=x"),
         ["'trainer.seed=3': the sweep gives each run its own", "'trainer.experiment_name=x': the sweep"]),
    ],
)  # fmt: skip
def test_every_problem_is_told_at_once(
    tmp_path: Path, old: str, new: str, overrides: tuple[str, ...], messages: list[str]
) -> None:
    with pytest.raises(ValueError, match="no run was started") as refused:
        make_sweep(tmp_path, SWEEP.replace(old, new), *overrides)
    told = str(refused.value)
    assert [message for message in messages if message not in told] == []
    assert told.count("did you mean") <= 3, "once per variant, not per seed"


def test_runs_lie_in_one_folder(tmp_path: Path) -> None:
    make_sweep(tmp_path)
    (tmp_path / "sweep.yaml").write_text(SWEEP.replace("vppo: []", "vppo: [trainer.runs_dir=other]"))
    with pytest.raises(ValueError, match=r"trainer\.runs_dir is other and runs; the runs of a sweep lie in one folder"):
        plan_sweep(read_sweep_file(tmp_path / "sweep.yaml"))


def test_a_configuration_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no configuration file .*none\.yaml"):
        make_sweep(tmp_path, SWEEP.replace("config: base.yaml", "config: none.yaml"))
