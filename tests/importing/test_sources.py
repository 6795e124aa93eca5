"""Defaults, file, script and overrides, each over the one before; what none of theirs can be is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vppo.importing.sources import TheirConfig, read_source
from tests.importing.authors import make_repository


def read(folder: Path, text: str, *overrides: str, name: str = "theirs.yaml", **environment: str) -> TheirConfig:
    (folder / name).write_text(text)
    return read_source(folder / name, overrides, environment=environment)


def test_later_values_win(tmp_path: Path) -> None:
    found = read(
        tmp_path, "worker: {rollout: {n: 5, top_p: 0.9}}", "worker.rollout.n=6", "worker.rollout.n=8", "data.seed=2"
    )
    values = found.values
    assert (values["worker.rollout.n"], values["worker.rollout.top_p"], values["data.seed"]) == (8, 0.9, 2)
    assert values["worker.rollout.temperature"] == 1.0
    assert (found.problems, found.notes, found.base) == ((), (), tmp_path / "theirs.yaml")


def test_sections_and_mappings_are_merged(tmp_path: Path) -> None:
    text = "worker: {rollout: {val_override_config: {n: 8, temperature: 0.5}}}"
    found = read(
        tmp_path, text, "worker.rollout.val_override_config.n=4", "worker.actor={optim: {lr: 1e-5}, ppo_epochs: 2}",
        "worker.rollout.val_override_config={top_p: 0.9}",
    )  # fmt: skip
    values = found.values
    assert values["worker.rollout.val_override_config"] == {"n": 4, "temperature": 0.5, "top_p": 0.9}
    assert (values["worker.actor.optim.lr"], values["worker.actor.ppo_epochs"]) == (1e-5, 2)
    assert found.problems == ()


def test_an_empty_section_changes_nothing(tmp_path: Path) -> None:
    found = read(tmp_path, "worker:\n  rollout:\ndata:\n")
    assert found.problems == () and found.values["worker.rollout.n"] == 1


@pytest.mark.parametrize(
    ("text", "override", "problem"),
    [
        ("data: {max_prompt_lenght: 5}", "", "data.max_prompt_lenght (FILE) is no key of VPPO-RL or EasyR1 0.3.3; did "
         "you mean data.max_prompt_length?"),
        ("", "worker.actor.lr=1e-6", "worker.actor.lr (override 'worker.actor.lr=1e-6') is no key of VPPO-RL or EasyR1 "
         "0.3.3; did you mean worker.actor.optim.lr?"),
        ("", "zzz=1", "zzz (override 'zzz=1') is no key of VPPO-RL or EasyR1 0.3.3; leave it out"),
        ("{data: 5}", "", "data = 5 (FILE): data is a section"),
        ("", "worker.rollout.n=many", "worker.rollout.n = many (override 'worker.rollout.n=many'): should be a whole "
         "number"),
        ("data: {shuffle: null}", "", "data.shuffle = null (FILE): should be true or false"),
        ("data: {prompt_key: '${data.answer_key}'}", "", "data.prompt_key = ${data.answer_key} (FILE): refers to "
         "another key by ${...}; write its value"),
        ("", "--verbose2", "override '--verbose2' is not of the form section.key=value"),
        ("", "+data.seed=1", "override '+data.seed=1' is not of the form section.key=value"),
        ("", "data.seed=[", "override 'data.seed=[' is not valid YAML"),
    ],
)  # fmt: skip
def test_what_theirs_cannot_be_is_a_problem(tmp_path: Path, text: str, override: str, problem: str) -> None:
    found = read(tmp_path, text, *([override] if override else []))
    (said,) = found.problems
    assert said.startswith(problem.replace("FILE", str(tmp_path / "theirs.yaml")))


def test_a_long_value_is_cut_in_a_message(tmp_path: Path) -> None:
    for length, shown in ((80, "x" * 80), (81, "x" * 77 + "...")):
        (problem,) = read(tmp_path, f"data: {{seed: {'x' * length}}}").problems
        assert problem.startswith(f"data.seed = {shown} (")


def test_all_problems_are_collected(tmp_path: Path) -> None:
    found = read(tmp_path, "data: {a: 1, seed: x}\nother: 2", "b=3")
    assert [problem.split()[0] for problem in found.problems] == ["data.a", "data.seed", "other", "b"]


# --- Scripts ----------------------------------------------------------------------------------------------------------

CALL = "python3 -m verl.trainer.main"


def test_the_authors_script_without_a_number_of_epochs(tmp_path: Path) -> None:
    root = make_repository(tmp_path)
    found = read_source(root / "train_vppo_8b.sh", [], environment={})
    assert found.problems == ()
    assert found.notes == (
        "trainer.total_epochs=: TOTAL_EPOCHES has no value; their program would refuse that. Left out: it stays 15",
    )
    assert found.base == root / "examples" / "configs" / "config.yaml"
    assert (found.values["trainer.max_steps"], found.values["data.max_response_length"]) == (130, 8192)


def test_the_environment_may_have_the_number(tmp_path: Path) -> None:
    path = make_repository(tmp_path) / "train_vppo_8b.sh"
    found = read_source(path, [], environment={"TOTAL_EPOCHES": "3"})
    assert found.notes == () and found.values["trainer.total_epochs"] == 3


def test_an_empty_value_is_null_where_null_is_one(tmp_path: Path) -> None:
    script = f"{CALL} trainer.max_steps=$STEPS data.image_dir= data.shuffle= trainer.experiment_name=a_${{NAME}}_b x="
    found = read(tmp_path, script, name="run.sh")
    assert found.notes == (
        "trainer.max_steps=: STEPS has no value; taken for null",
        "data.image_dir= is empty; taken for null",
        "data.shuffle= is empty; their program would refuse that. Left out: it stays true",
        "trainer.experiment_name=a__b: NAME has no value; nothing stands in its place",
        "x= is empty; taken for null",
    )
    assert found.values["trainer.max_steps"] is None and found.values["trainer.experiment_name"] == "a__b"
    assert len(found.problems) == 1 and found.problems[0].startswith("x (override 'x=') is no key")


def test_a_script_without_a_file_has_their_defaults(tmp_path: Path) -> None:
    found = read(tmp_path, f"{CALL} data.seed=4", "data.seed=5", name="run.sh")
    assert found.base is None
    assert (found.values["data.seed"], found.values["data.prompt_key"]) == (5, "prompt")


def test_the_file_of_a_script_can_be_replaced(tmp_path: Path) -> None:
    root = make_repository(tmp_path)
    (tmp_path / "other.yaml").write_text("data: {prompt_key: question}")
    found = read_source(root / "train_vppo_7b.sh", [f"config={tmp_path}/other.yaml"], environment={})
    assert found.base == tmp_path / "other.yaml"
    assert (found.values["data.prompt_key"], found.values["worker.rollout.n"]) == ("question", 8)


def test_a_script_is_known_by_its_name_or_its_call(tmp_path: Path) -> None:
    for name in ("run.sh", "run", "run.slurm"):
        assert read(tmp_path, f"{CALL} data.seed=4", name=name).values["data.seed"] == 4
    assert read(tmp_path, "# python3 -m verl.trainer.main\ndata: {seed: 4}", name="x.yml").values["data.seed"] == 4
    assert read(tmp_path, "data: {seed: 4}", name="settings").values["data.seed"] == 4


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*/nothing\.yaml"):
        read_source(tmp_path / "nothing.yaml", [], environment={})
    script = f"{CALL} config=examples/nowhere/config.yaml"
    with pytest.raises(
        FileNotFoundError, match=r"config=examples/nowhere/config\.yaml: there is no such file, neither"
    ):
        read(tmp_path, script, name="run.sh")
    with pytest.raises(FileNotFoundError, match=r"config= \(CONFIG has no value\): there is no such file"):
        read(tmp_path, f"{CALL} config=$CONFIG", name="run.sh")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"theirs\.yaml holds list; it should hold sections"):
        read(tmp_path, "[1, 2]")
    with pytest.raises(ValueError, match=r"theirs\.yaml is not valid YAML"):
        read(tmp_path, "data: [")
    (tmp_path / "latin.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"latin\.yaml is not UTF-8 text"):
        read_source(tmp_path / "latin.yaml", [], environment={})
