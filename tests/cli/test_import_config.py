"""`vppo import-config` as a user sees it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from megatron_vppo.cli.main import main
from megatron_vppo.config.load import load_config
from tests.importing.authors import make_repository


@pytest.fixture
def imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the command in a folder next to the authors' repository."""
    make_repository(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("TOTAL_EPOCHES", raising=False)
    return lambda *words: main(["import-config", *words])


def test_a_script_becomes_a_file_that_loads(imports, capsys: pytest.CaptureFixture[str]) -> None:
    assert imports("../VPPO-RL/train_vppo_7b.sh", "trainer.total_epochs=3", "--out", "run.yaml") == 0
    text = Path("run.yaml").read_text()
    first = "# Written by: vppo import-config ../VPPO-RL/train_vppo_7b.sh trainer.total_epochs=3 --out run.yaml\n"
    assert text.startswith(f"{first}data:\n") and "\n  train_files: chamber111/VPPO_ViRL39K_train\n" in text
    config = load_config("run.yaml")
    assert (config.trainer.total_epochs, config.rollout.n, config.algorithm.preset) == (3, 8, "reference")
    assert Path(str(config.data.format_prompt)).is_file()
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == "run.yaml: 74 keys translated, 126 without a setting here"
    assert lines[1].endswith("/VPPO-RL/examples/configs/config.yaml") and lines[3] == "--verbose lists them"
    assert lines[2].startswith("algorithm: preset 'reference', which computes what the authors' code computes")
    assert "  trainer.val_generations_to_log = 3: responses of validation are not recorded here\n" in out
    assert lines[-1] == "  vppo train --config run.yaml --dry-run --nodes 1 --gpus-per-node 8"
    assert "Notes on their values" not in out and "Translated" not in out


def test_the_script_with_an_undefined_variable(imports, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --out the file is here, and named like theirs."""
    assert imports("../VPPO-RL/train_vppo_8b.sh") == 0
    assert load_config("train_vppo_8b_vppo.yaml").trainer.total_steps == 130
    out = " ".join(capsys.readouterr().out.split())
    assert "Notes on their values trainer.total_epochs=: TOTAL_EPOCHES has no value" in out


def test_a_yaml_file_with_overrides(imports, capsys: pytest.CaptureFixture[str]) -> None:
    reward = "worker.reward.reward_function=examples/reward_function/math.py:compute_score_wo_format"
    assert imports("../VPPO-RL/examples/configs/config.yaml", reward, "trainer.nnodes=2", "--out", "run.yaml") == 0
    assert yaml.safe_load(Path("run.yaml").read_text())["rollout"]["n"] == 5
    assert "--nodes 2 --gpus-per-node 2" in capsys.readouterr().out


def test_every_key_is_listed_if_asked(imports, capsys: pytest.CaptureFixture[str]) -> None:
    assert imports("../VPPO-RL/train_vppo_7b.sh", "--verbose") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  worker.rollout.n = 8 -> rollout.n" in lines
    assert "  data.val_batch_size = 512: validation goes to the engines whole" in lines
    assert sum(line.startswith("  worker.critic.") for line in lines) == 38


def test_lines_of_the_report_are_wrapped_between_words(imports, capsys: pytest.CaptureFixture[str]) -> None:
    name = "-".join(["word"] * 30)
    assert imports("../VPPO-RL/train_vppo_7b.sh", f"trainer.experiment_name={name}", "--verbose") == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(name in line for line in lines)
    assert max(len(line) for line in lines[3:] if name not in line) in range(95, 101)


def test_a_file_that_is_there_is_not_written_over(imports, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("../VPPO-RL/train_vppo_7b.sh", "--out", "run.yaml")
    assert imports(*words) == imports(*words) == 0
    before = Path("run.yaml").read_text() + "# mine\n"
    Path("run.yaml").write_text(before)
    assert imports(*words) == 2
    assert "run.yaml is there already and says something else" in capsys.readouterr().err
    assert Path("run.yaml").read_text() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["worker.rollout.seed=7", "algorithm.adv_estimator=gae"],
            "2 keys cannot be imported; nothing is written\n  - ",
        ),
        (["worker.rollout.sed=7"], "worker.rollout.sed (override 'worker.rollout.sed=7') is no key of VPPO-RL"),
        (["worker.rollout.n=1"], "rollout.n = 1 (worker.rollout.n): should be greater than 1"),
        (["data.rollout_batch_size=100"], "actor.global_batch_size 128 is more than data.rollout_batch_size 100"),
        (["config=nowhere.yaml"], "config=nowhere.yaml: there is no such file"),
        (["--out", "nowhere/run.yaml"], "--out nowhere/run.yaml: there is no folder nowhere"),
    ],
)
def test_what_cannot_be_imported_writes_nothing(
    imports, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert imports("../VPPO-RL/train_vppo_7b.sh", *words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("vppo: ") and message in captured.err and captured.out == ""
    assert list((tmp_path / "here").iterdir()) == []


def test_a_value_of_several_lines_stays_in_the_head(imports) -> None:
    assert imports("../VPPO-RL/train_vppo_7b.sh", "worker.rollout.n=\n4", "--out", "run.yaml") == 0
    head = Path("run.yaml").read_text().splitlines()[:3]
    assert head[1] == "# 4' --out run.yaml" and head[2] == "data:"
    assert load_config("run.yaml").rollout.n == 4


@pytest.mark.extended
@pytest.mark.filterwarnings("ignore:When using async grad allreduce:UserWarning")
def test_a_dry_run_takes_the_7b(imports, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Their FSDP has no tensor parallelism; with it the run fits the authors' eight GPUs of 80 GiB."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert imports("../VPPO-RL/train_vppo_7b.sh", "--out", "run.yaml") == 0
    assert main(["train", "--config", "run.yaml", "--dry-run", "parallel.tensor_model_parallel_size=2"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "384 prompts x 8 responses = 3072 rows, 3 optimizer steps of 128 prompts; 2 passes over the data" in out
    assert "update: up to 256 rows on a data-parallel rank = 16 micro-batches" in out
    assert out.endswith("It fits. Nothing was started.")


def test_a_file_that_is_not_there(imports, capsys: pytest.CaptureFixture[str]) -> None:
    assert imports("nothing.sh") == 2
    assert capsys.readouterr().err == "vppo: no file nothing.sh\n"
