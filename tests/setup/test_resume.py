"""The checkpoint that a run goes on from, found and checked before anything is started."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_vppo.config.schema import TrainerConfig
from megatron_vppo.parallel.checkpoint_keep import BEST
from megatron_vppo.parallel.layout import single_rank
from megatron_vppo.setup.attempts import begin_attempt
from megatron_vppo.setup.resume import check_resume, chosen_step
from megatron_vppo.setup.run_folder import RunFolder
from tests.models.tiny import save_tiny_model, tiny_config
from tests.parallel.damage import DESCRIPTIONS, FILES, POSITIONS, STATES, STEPS, save_run, state, state_with
from tests.parallel.policy_rig import make_policy

OLDER, NEWEST = STEPS


def config_of(runs: Path, **settings: object) -> TrainerConfig:
    return TrainerConfig.model_validate(
        {"runs_dir": str(runs), "project_name": "p", "experiment_name": "e", **settings}
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with one of two checkpoints."""
    root = tmp_path_factory.mktemp("saved")
    save_tiny_model(root / "model", tiny_config(tied=False, vocab=299))
    with single_rank() as layout:
        save_run(root / "runs" / "p" / "e" / "checkpoints", make_policy(root / "model", layout, rows=2), layout)
    return root / "runs"


@pytest.fixture
def runs(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "runs")


def checkpoint(runs: Path, step: int) -> Path:
    return runs / "p" / "e" / "checkpoints" / f"global_step_{step}"


# --- The step ---------------------------------------------------------------------------------------------------------


def test_the_newest_is_taken_or_the_one_that_is_set(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert chosen_step(config_of(tmp_path), folder, []) == 0
    assert chosen_step(config_of(tmp_path), folder, [2, 4, 10]) == 10
    assert chosen_step(config_of(tmp_path, resume_step=4), folder, [2, 4, 10]) == 4


def test_a_step_that_is_not_there(tmp_path: Path) -> None:
    folder, config = RunFolder(tmp_path), config_of(tmp_path, resume_step=3)
    with pytest.raises(ValueError, match=r"resume_step=3: there is no such.*checkpoints has those of steps 2, 4; set"):
        chosen_step(config, folder, [2, 4])
    with pytest.raises(ValueError, match=r"resume_step=3: there is no such.*checkpoints has none, or leave the setti"):
        chosen_step(config, folder, [])


# --- Its check --------------------------------------------------------------------------------------------------------


def test_whole_checkpoints_and_new_runs_pass(runs: Path, tmp_path: Path) -> None:
    check_resume(config_of(runs))
    check_resume(config_of(runs, resume_step=OLDER))
    check_resume(config_of(tmp_path / "nothing yet"))


DAMAGE = {
    f"{kind}: {name}": case
    for kind, cases in {"files": FILES, "descriptions": DESCRIPTIONS, "state": STATES, "place": POSITIONS}.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named_with_the_checkpoint_that_is_whole(what: str, runs: Path) -> None:
    spoil, message = DAMAGE[what]
    spoil(checkpoint(runs, NEWEST))
    offer = rf"{message}.*\. The checkpoint of step {OLDER} is whole; trainer\.resume_step={OLDER} takes it$"
    with pytest.raises(ValueError, match=offer) as refused:
        check_resume(config_of(runs))
    assert "\n" not in str(refused.value) and str(checkpoint(runs, NEWEST)) in str(refused.value)
    check_resume(config_of(runs, resume_step=OLDER))


def test_a_requeued_job_passes_where_an_older_one_is_whole(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    FILES["empty"][0](checkpoint(runs, NEWEST))
    check_resume(config_of(runs))
    FILES["empty"][0](checkpoint(runs, OLDER))
    with pytest.raises(ValueError, match="There is no other whole checkpoint"):
        check_resume(config_of(runs))


def test_the_newest_is_offered_for_an_older_one(runs: Path) -> None:
    FILES["cut"][0](checkpoint(runs, OLDER))
    with pytest.raises(
        ValueError, match=r"is incomplete\. The checkpoint of step 4 is whole; trainer\.resume_step=4 ta"
    ):
        check_resume(config_of(runs, resume_step=OLDER))


def test_nothing_whole_is_left(runs: Path) -> None:
    FILES["empty"][0](checkpoint(runs, NEWEST))
    state(b"{")(checkpoint(runs, OLDER))
    with pytest.raises(ValueError, match=r"incomplete\. There is no other whole checkpoint; set another trainer\.exp"):
        check_resume(config_of(runs))


def test_a_checkpoint_without_its_state_is_not_passed_over(runs: Path) -> None:
    """The run would go on from an older one without a word, and save over it."""
    shutil.rmtree(checkpoint(runs, OLDER))
    STATES["missing"][0](checkpoint(runs, NEWEST))
    with pytest.raises(ValueError, match=r"trainer_state\.json is missing.*There is no other whole checkpoint"):
        check_resume(config_of(runs))


def test_a_damaged_note_of_the_best_checkpoint(runs: Path) -> None:
    (checkpoint(runs, NEWEST).parent / BEST).write_text("[]")
    with pytest.raises(ValueError, match=r"best\.json is damaged \(holds list.*\); remove it"):
        check_resume(config_of(runs))


# --- A checkpoint of another run --------------------------------------------------------------------------------------


def starting(runs: Path, given: Path) -> TrainerConfig:
    return config_of(runs, experiment_name="new", load_checkpoint_path=str(given))


def test_the_given_checkpoint_is_checked_as_any_other(runs: Path) -> None:
    given = checkpoint(runs, NEWEST)
    check_resume(starting(runs, given))
    FILES["cut"][0](given)
    with pytest.raises(ValueError, match=FILES["cut"][1]):
        check_resume(starting(runs, given))
    POSITIONS["no place"][0](checkpoint(runs, OLDER))
    with pytest.raises(ValueError, match=POSITIONS["no place"][1]):
        check_resume(starting(runs, checkpoint(runs, OLDER)))


def test_a_path_that_is_not_that_of_a_checkpoint(runs: Path) -> None:
    folder = checkpoint(runs, NEWEST).parent
    for given in (folder, folder.parent):
        with pytest.raises(ValueError, match=rf"{given} is not the folder of .*; it has {folder}/global_step_4; set"):
            check_resume(starting(runs, given))
    for given in (folder / "global_step_5", folder / "global_step_4" / "dist_ckpt"):
        with pytest.raises(ValueError, match=rf"{given} is not the folder of .*; set a folder \S+/global_step_N"):
            check_resume(starting(runs, given))


def test_a_run_of_its_own_wins_if_it_began_with_the_given_one(runs: Path) -> None:
    given, own = checkpoint(runs, OLDER), checkpoint(runs, NEWEST)
    with pytest.raises(ValueError, match=r"of a run that began with model\.path; .*another trainer\.experiment_name"):
        check_resume(config_of(runs, load_checkpoint_path=str(given)))
    state_with(started_from=str(given))(own)
    check_resume(config_of(runs, load_checkpoint_path=str(given)))
    shutil.move(given, runs / "elsewhere")
    check_resume(config_of(runs, load_checkpoint_path=str(given)))  # it is not needed any more


# --- Permissions ------------------------------------------------------------------------------------------------------


@contextmanager
def as_somebody_else() -> Iterator[None]:
    """Gives up root's right to read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


UNREADABLE = {
    "global_step_4/dist_ckpt/__0_0.distcp": "global_step_4/dist_ckpt/__0_0.distcp",
    "global_step_4/dist_ckpt/.metadata": "global_step_4/dist_ckpt/.metadata",
    "global_step_4/dist_ckpt/common.pt": "global_step_4/dist_ckpt/common.pt",
    "global_step_4/dist_ckpt": "global_step_4/dist_ckpt/metadata.json",
    "global_step_4": "global_step_4/trainer_state.json",
    "": "checkpoints",
}
"""The path that is closed, and the name in the message."""


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_must_not_be_read(name: str, saved: Path) -> None:
    """A run that could not see its checkpoints would start from the beginning, and cut its lines and records."""
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders are closed to others
        runs = shutil.copytree(saved, Path(place) / "runs")
        Path(place).chmod(0o755)
        locked = checkpoint(runs, NEWEST).parent / name
        mode = locked.stat().st_mode
        locked.chmod(0)
        with as_somebody_else(), pytest.raises(ValueError, match=rf"/{UNREADABLE[name]} cannot be read: Permission"):
            check_resume(config_of(runs))
        locked.chmod(mode)


@pytest.mark.parametrize("setting", [{"resume": False}, {"resume_step": 2}])
def test_a_job_that_restarts_goes_on_from_its_own_work(
    setting: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settings that chose where the job began do not throw away what it has done since."""
    config = TrainerConfig.model_validate({"runs_dir": str(tmp_path), **setting})
    folder = RunFolder.of(config)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    begin_attempt(folder.root, 0, most_without_progress=3)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert chosen_step(config, folder, [2, 4, 6]) == 6
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    if "resume_step" in setting:
        assert chosen_step(config, folder, [2, 4, 6]) == 2
    else:
        with pytest.raises(ValueError, match=r"trainer\.resume=false"):
            chosen_step(config, folder, [2, 4, 6])
