"""The checkpoint that a run goes on from. What a checkpoint holds is shown in tests/parallel and tests/proofs."""

from __future__ import annotations

import json
import shutil
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vppo.algorithm.types import Prompt, Response
from megatron_vppo.config.schema import TrainerConfig
from megatron_vppo.data.prompt_sets import PromptSets
from megatron_vppo.data.stream import PromptStream, StreamPosition
from megatron_vppo.parallel.checkpoint_folder import STATE, checkpoint_steps, saved_state, set_aside_after
from megatron_vppo.parallel.checkpoint_keep import BEST
from megatron_vppo.parallel.layout import Layout, single_rank
from megatron_vppo.parallel.policy import MegatronPolicy
from megatron_vppo.rollout.carry import CarriedGroup, Carry
from megatron_vppo.rollout.records import UNFINISHED
from megatron_vppo.setup.run_folder import RunFolder
from megatron_vppo.trainer.checkpointer import Checkpointer
from megatron_vppo.trainer.keep_rate import KeepRate
from tests.models.tiny import save_tiny_model, tiny_config
from tests.parallel.damage import FILES, PLACE, STATES, STEPS, save_run, state_with
from tests.parallel.optimizer_rig import update_counts
from tests.parallel.policy_rig import make_batch, make_policy, make_responses

OLDER, NEWEST = STEPS


def checkpointer(folder: Path, *, resume: bool) -> Checkpointer:
    config = TrainerConfig(runs_dir=str(folder), project_name="p", experiment_name="e", resume=resume)
    unused: Any = None  # nothing is loaded
    return Checkpointer(
        config,
        RunFolder.of(config),
        layout=unused,
        trainable=unused,
        stream=None,
        keep_rate=KeepRate(),
        carry=Carry(None),
        say=print,
    )


@pytest.mark.parametrize("resume", [True, False])
def test_a_new_run_starts_at_step_zero(tmp_path: Path, resume: bool) -> None:
    with single_rank():
        assert checkpointer(tmp_path, resume=resume).resume().step == 0


def test_a_run_that_must_not_go_on_names_its_checkpoint(tmp_path: Path) -> None:
    whole = tmp_path / "p" / "e" / "checkpoints" / "global_step_4"
    whole.mkdir(parents=True)
    (whole / STATE).write_text("{}")
    with single_rank(), pytest.raises(ValueError, match=r"trainer\.resume=false, but .*p/e holds .* step 4"):
        checkpointer(tmp_path, resume=False).resume()


# --- A run with two checkpoints ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Saved:
    """A folder of runs, and the policy that wrote its checkpoints."""

    model: Path
    runs: Path
    layout: Layout
    policy: MegatronPolicy


@dataclass(frozen=True)
class Resumed:
    """A fresh policy and its checkpointer."""

    policy: MegatronPolicy
    stream: PromptStream
    checkpointer: Checkpointer
    said: list[str]

    @property
    def checkpoints(self) -> Path:
        return self.checkpointer.folder.checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    root = tmp_path_factory.mktemp("saved")
    save_tiny_model(root / "model", tiny_config(tied=False, vocab=299))
    with single_rank() as layout:
        policy = make_policy(root / "model", layout, rows=2)
        save_run(root / "runs" / "p" / "e" / "checkpoints", policy, layout)
        yield Saved(root / "model", root / "runs", layout, policy)


def start(saved: Saved, runs: Path, *, seed: int = 1, **settings: object) -> Resumed:
    config = TrainerConfig.model_validate(
        {"runs_dir": str(runs), "project_name": "p", "experiment_name": "e", "save_limit": 2, **settings}
    )
    policy = make_policy(saved.model, saved.layout, rows=2)
    prompts: Any = range(PLACE["num_prompts"])  # only their number counts
    stream = PromptStream(PromptSets([prompts]), seed=seed, shuffle=True)
    said: list[str] = []
    made = Checkpointer(
        config,
        RunFolder.of(config),
        saved.layout,
        policy.trainable,
        stream,
        KeepRate(),
        Carry(OneRow()),
        said.append,
    )
    return Resumed(policy, stream, made, said)


@pytest.fixture
def runs(saved: Saved, tmp_path: Path) -> Path:
    return shutil.copytree(saved.runs, tmp_path / "runs")


def newest(runs: Path) -> Path:
    return runs / "p" / "e" / "checkpoints" / f"global_step_{NEWEST}"


def weights(policy: MegatronPolicy) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in policy.hf_weights()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("settings", [{}, {"resume_step": OLDER}, {"resume_step": NEWEST}])
def test_model_and_place_in_the_data_are_those_of_the_step(settings: dict[str, int], saved: Saved, runs: Path) -> None:
    run = start(saved, runs, **settings)
    assert not same(weights(run.policy), weights(saved.policy))
    assert run.checkpointer.resume().step == settings.get("resume_step", NEWEST)
    assert same(weights(run.policy), weights(saved.policy))
    assert run.stream.position == StreamPosition(PLACE["epoch"], PLACE["offset"])
    assert run.said == []


@pytest.mark.parametrize("plain", [False, True])
def test_a_checkpoint_tells_of_the_tokenizer_that_it_was_trained_with(saved: Saved, runs: Path, plain: bool) -> None:
    run = start(saved, runs)
    run.checkpointer.plain_think_tokens = plain
    run.checkpointer.resume()
    run.checkpointer.save(6)
    state = saved_state(newest(runs).with_name("global_step_6"))
    assert state is not None and state.plain_think_tokens is plain


def test_the_keep_rate_goes_on_and_may_be_missing(saved: Saved, runs: Path) -> None:
    run = start(saved, runs)
    run.checkpointer.resume()
    assert run.checkpointer.keep_rate.seen == (0.0, 0.0), "a checkpoint of before has none"
    run.checkpointer.keep_rate.note(kept=3, sampled=7)
    run.checkpointer.save(6)
    again = start(saved, runs)
    assert again.checkpointer.resume().step == 6
    assert again.checkpointer.keep_rate.seen == (3.0, 7.0)
    state_with(keep_rate={"kept": 3.0})(newest(runs).with_name("global_step_6"))
    with pytest.raises(ValueError, match=rf"'keep_rate' in it lacks sampled.*step {NEWEST} is whole"):
        start(saved, runs).checkpointer.resume()


FIFTH = Prompt("train", 5, "q", "a", (1, 2), (1, 2), (), ())


class OneRow:
    """A data set of which one row makes a prompt."""

    def prompt_of_row(self, split: str, row: int) -> Prompt:
        return {("train", 5): FIFTH}[split, row]


def test_what_is_carried_goes_on_in_every_bit_and_may_be_missing(
    saved: Saved, runs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = start(saved, runs)
    run.checkpointer.resume()
    assert run.checkpointer.carry.groups == (), "a checkpoint of before has none"
    logps = (-1 / 3, -1e-300)
    group = CarriedGroup(FIFTH, (2**62 + 1, None), {
        1: Response(FIFTH, 0, 1, array("i", (2**31 - 1, 4)), array("d", logps), UNFINISHED, 3, 2),
    })  # fmt: skip
    run.checkpointer.carry.groups = (group,)
    run.checkpointer.save(6)
    again = start(saved, runs)
    assert again.checkpointer.resume().step == 6
    assert again.checkpointer.carry.groups == (group,)
    group_saved = run.checkpointer.carry.state_dict()["groups"][0]
    state_with(carry={"groups": [{"row": 5, "prompt": "x", "seeds": [1]}]})(newest(runs).with_name("global_step_6"))
    with pytest.raises(ValueError, match=rf"'carry' in it lacks groups.0.responses.*step {NEWEST} is whole"):
        start(saved, runs).checkpointer.resume()
    for changed in ({"row": 6}, {"prompt": "another"}):
        state_with(carry={"groups": [{**group_saved, **changed}]})(newest(runs).with_name("global_step_6"))
        other = start(saved, runs)
        assert other.checkpointer.resume().step == 6 and other.checkpointer.carry.groups == ()
        assert "1 carried groups are left behind" in caplog.text
        caplog.clear()


@pytest.mark.parametrize(("what", "cases"), [("empty", FILES), ("a brace", STATES)])
def test_a_damaged_one_is_named_with_the_way_out(what: str, cases: Any, saved: Saved, runs: Path) -> None:
    spoil, message = cases[what]
    spoil(newest(runs))
    with pytest.raises(ValueError, match=rf"{message}.*The checkpoint of step 2 is whole; trainer\.resume_step=2 take"):
        start(saved, runs).checkpointer.resume()
    assert start(saved, runs, resume_step=OLDER).checkpointer.resume().step == OLDER
    assert checkpoint_steps(newest(runs).parent) == [OLDER, NEWEST], "nothing is moved before everything is loaded"


def test_a_requeued_job_goes_on_from_the_older_one(
    saved: Saved, runs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    FILES["empty"][0](newest(runs))
    expected = start(saved, runs, resume_step=OLDER)
    expected.checkpointer.resume()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    run = start(saved, runs)
    assert run.checkpointer.resume().step == OLDER
    assert same(weights(run.policy), weights(expected.policy))
    (line,) = [message for message in caplog.messages if "Nobody is there" in message]
    assert line.endswith(f". Nobody is there to choose, so the run goes on from step {OLDER}") and "\n" not in line


def test_only_one_that_fits_the_run_is_offered(saved: Saved, runs: Path) -> None:
    state_with(freeze=["projector"])(newest(runs))
    with pytest.raises(
        ValueError, match=r"no optimizer state for projector.*set the same to continue.*; trainer\.resume_step=2 takes"
    ):
        start(saved, runs).checkpointer.resume()
    with pytest.raises(ValueError, match=r"position is for seed=1, this run has seed=5: .*experiment_name$"):
        start(saved, runs, seed=5).checkpointer.resume()


def test_what_follows_an_older_one_takes_the_place_of_nothing(saved: Saved, runs: Path) -> None:
    """The damaged one is kept, is not found again, and the step is saved once more under its name."""
    FILES["cut"][0](newest(runs))
    damaged = {path.name: path.read_bytes() for path in (newest(runs) / "dist_ckpt").iterdir()}
    run = start(saved, runs, resume_step=OLDER)
    assert run.checkpointer.resume().step == OLDER
    (aside,) = set_aside_after(run.checkpoints, OLDER)
    assert start(saved, runs).checkpointer.resume().step == OLDER, "stopped before the next checkpoint"

    run.policy.update(make_batch(make_responses(), "nll"))
    run.checkpointer.save(NEWEST)
    assert {path.name: path.read_bytes() for path in (aside / "dist_ckpt").iterdir()} == damaged
    again = start(saved, runs)
    assert again.checkpointer.resume().step == NEWEST
    assert same(weights(again.policy), weights(run.policy))
    assert not same(weights(again.policy), weights(saved.policy))


# --- Which checkpoints there are --------------------------------------------------------------------------------------


def test_the_newest_and_the_best_are_kept(saved: Saved, runs: Path) -> None:
    run = start(saved, runs, save_limit=1)
    run.checkpointer.note_validation(6, 0.7)
    run.checkpointer.save(6)
    assert checkpoint_steps(run.checkpoints) == [6]
    run.checkpointer.note_validation(7, 0.9)
    run.checkpointer.save(8)
    assert checkpoint_steps(run.checkpoints) == [6, 8], "the accuracy of step 7 is not that of step 8"
    run.checkpointer.note_validation(10, 0.6)
    run.checkpointer.save(10)
    assert checkpoint_steps(run.checkpoints) == [6, 10]
    assert json.loads((run.checkpoints / BEST).read_text()) == {"step": 6, "val/accuracy": 0.7}

    kept = start(saved, runs, save_limit=-1)
    for step, accuracy in ((12, 0.8), (14, 0.1)):
        kept.checkpointer.note_validation(step, accuracy)
        kept.checkpointer.save(step)
    assert checkpoint_steps(run.checkpoints) == [6, 10, 12, 14]
    assert json.loads((run.checkpoints / BEST).read_text())["step"] == 12


def test_a_damaged_note_of_the_best_is_refused_at_the_start(saved: Saved, runs: Path) -> None:
    (newest(runs).parent / BEST).write_text("{")
    with pytest.raises(ValueError, match=r"best\.json is damaged .*; remove it"):
        start(saved, runs).checkpointer.resume()


def test_weights_alone_are_gone_on_from_with_a_word(saved: Saved, runs: Path) -> None:
    start(saved, runs, save_model_only=True).checkpointer.save(6)
    run = start(saved, runs)
    assert run.checkpointer.resume().step == 6
    (line,) = run.said
    assert "global_step_6 holds no optimizer state (trainer.save_model_only): the optimizer starts from zero" in line


# --- A run that starts from a checkpoint of another -------------------------------------------------------------------


def test_a_new_run_starts_from_the_given_one_and_goes_on_from_its_own(saved: Saved, runs: Path) -> None:
    given = {"experiment_name": "new", "load_checkpoint_path": str(newest(runs))}
    run = start(saved, runs, **given)
    assert run.checkpointer.resume().step == NEWEST
    assert run.said == [f"starts from {newest(runs)}, after step {NEWEST}"]
    assert same(weights(run.policy), weights(saved.policy)) and update_counts(run.policy) == {1.0}
    assert run.stream.position == StreamPosition(PLACE["epoch"], PLACE["offset"])
    assert checkpoint_steps(run.checkpoints) == []

    run.policy.update(make_batch(make_responses(), "nll"))
    run.checkpointer.save(5)
    for settings in (given, {"experiment_name": "new"}, given):
        again = start(saved, runs, **settings)
        assert again.checkpointer.resume().step == 5 and again.said == []
        assert same(weights(again.policy), weights(run.policy))
        again.checkpointer.save(5)  # where it began is not forgotten
    assert checkpoint_steps(newest(runs).parent) == [OLDER, NEWEST], "the other run is left as it is"


def test_a_folder_of_a_run_that_began_otherwise(saved: Saved, runs: Path) -> None:
    given = newest(runs).with_name(f"global_step_{OLDER}")
    began = rf"holds the checkpoint of step {NEWEST} of a run that began with model\.path; leave the setting out"
    with pytest.raises(ValueError, match=rf"load_checkpoint_path={given}, but \S+/p/e/checkpoints {began}"):
        start(saved, runs, load_checkpoint_path=str(given)).checkpointer.resume()


def test_the_data_of_the_given_one_have_to_be_those_of_the_run(saved: Saved, runs: Path) -> None:
    run = start(saved, runs, experiment_name="new", load_checkpoint_path=str(newest(runs)), seed=5)
    with pytest.raises(ValueError, match=r"position is for seed=1, this run has seed=5: resume with the data"):
        run.checkpointer.resume()


# --- Checkpoints that are written while training goes on --------------------------------------------------------------


def test_the_next_save_settles_the_one_before(saved: Saved, runs: Path) -> None:
    run = start(saved, runs, save_limit=-1)
    run.checkpointer.asynchronous = True
    run.checkpointer.resume()
    assert run.checkpointer.settle(wait=True) is None, "none is pending"
    run.checkpointer.save(NEWEST + 1)
    assert checkpoint_steps(run.checkpoints)[-1] == NEWEST
    run.checkpointer.save(NEWEST + 2)
    assert checkpoint_steps(run.checkpoints)[-1] == NEWEST + 1
    seconds = run.checkpointer.settle(wait=True)
    assert seconds is not None and checkpoint_steps(run.checkpoints)[-1] == NEWEST + 2
    assert run.checkpointer.settle(wait=True) is None
    assert start(saved, runs).checkpointer.resume().step == NEWEST + 2
