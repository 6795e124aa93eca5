"""The answer to a wrong command: one message that names the fix, exit status 2, and no rank started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import Qwen2Config

from megatron_vppo.cli.launch import take_rank_from_slurm
from megatron_vppo.cli.main import main
from tests.models.whole import save_whole_folder

CONFIG = """
data: {train_files: FOLDER/rows.jsonl, rollout_batch_size: 8}
model: {path: FOLDER/model, dtype: float32}
actor: {global_batch_size: 8}
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    save_whole_folder(tmp_path / "model", positions=32768)
    (tmp_path / "rows.jsonl").write_text('{"problem": "?", "answer": "1"}\n')
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.replace("FOLDER", str(tmp_path)))
    return path


@pytest.mark.parametrize(
    "override, message",
    [
        ("rolout.n=4", "rollout"),
        ("rollout.n=many", "rollout.n"),
        ("actor.global_batch_size=3", "rollout_batch_size"),
        ("parallel.tensor_model_parallel_size=4", "6 attention heads cannot be split"),
        ("parallel.pipeline_model_parallel_size=8", "layers"),
        ("rollout.num_engines=3", "num_engines=3"),
        ("rollout.tensor_parallel_size=8", "tensor_parallel_size=8: vLLM cannot split 6 attention heads over 8 ranks"),
        ("model.path=/no/such/folder", "no such folder"),
        ("data.train_files=nowhere.parquet", "nowhere.parquet does not exist"),
        ("data.val_files=/no/val.jsonl@test", "/no/val.jsonl does not exist"),
        ("data.format_prompt=no.jinja", "data.format_prompt: there is no file"),
        ("reward.reward_function=no.py:score", "reward.reward_function: there is no file"),
        ("rollout.temperature=2.5", "rollout.temperature"),
        ("rollout.top_k=300", "rollout.top_k 300 is more than the 109 tokens"),
        ("data.max_prompt_length=32768", "32768 + data.max_response_length 2048 = 34816 tokens"),
        ("data.max_prompt_length=256", "data.min_pixels 200704 makes 256 tokens at least of every image"),
        ("rollout.cpu_kv_cache_gib=0.001", "rollout.cpu_kv_cache_gib 0.001 is too small"),
        ("rollout.cpu_kv_cache_gib=1e5", "rollout.cpu_kv_cache_gib 100000 each) need 100000.2 GiB, but this machine"),
        ("parallel.data_parallel_size=100000", "100000 trainer ranks (parallel.*_size) of 0.25 GiB at least"),
        ("trainer.experiment_name=../x", "trainer.experiment_name"),
        ("rollout.val.n=true", "should be a number, not true or false"),
        ("fp8.bf16_layers_at_ends=2", "set fp8.recipe or rollout.quantization"),
    ],
)
def test_mistakes_end_in_one_message(
    override: str, message: str, config_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--config", str(config_file), override]) == 2
    error = capfd.readouterr().err
    assert error.startswith("vppo: ") and message in error
    assert "Traceback" not in error


def test_missing_config_and_run_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for arguments in (["train", "--config", str(tmp_path / "no.yaml")], ["report", str(tmp_path / "no_run")]):
        assert main(arguments) == 2
        error = capfd.readouterr().err
        assert error.startswith("vppo: ") and str(tmp_path) in error and error.count("\n") == 1


def test_a_name_in_a_message_sends_nothing_to_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name = str(tmp_path / "run\x1b[2J\u202e")
    for arguments in (["report", name], ["summary", name], ["train", "--config", name]):
        assert main(arguments) == 2
        error = capfd.readouterr().err
        assert "run␛[2J<U+202E>" in error and not {"\x1b", "\u202e"} & set(error)


def test_the_report_of_a_folder_with_any_name(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A name that is not UTF-8 is read with a half of a pair in it."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/run\xff\x1b[2J"))
    folder.mkdir()
    (folder / "metrics.jsonl").touch()
    assert main(["report", str(folder)]) == 0
    assert capfd.readouterr().out == f"{tmp_path}/run<U+DCFF>␛[2J/report.html\n"
    assert (folder / "report.html").stat().st_size > 10_000


def test_a_folder_without_a_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for command in ("report", "summary"):
        assert main([command, str(tmp_path)]) == 2
        error = capfd.readouterr().err
        assert error.startswith(f"vppo: {tmp_path} has no metrics.jsonl") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [["report"], ["summary"], ["train", "--config"]], ids=lambda command: command[0])
def test_files_that_cannot_be_read(command: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A folder in place of a file, and a name longer than file systems allow."""
    (tmp_path / "metrics.jsonl").mkdir()
    for path in (tmp_path, tmp_path / ("x" * 300)):
        assert main([*command, str(path)]) == 2
        error = capfd.readouterr().err
        assert error.startswith("vppo: ") and str(path) in error and error.count("\n") == 1


@pytest.mark.parametrize("command, unbuffered", [("report", ""), ("summary", ""), ("summary", "1"), ("help", "")])
def test_a_full_disk_behind_standard_output(command: str, unbuffered: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "timing_s/step": 2.0}) + "\n")
    arguments = ["convert", "--help"] if command == "help" else [command, str(tmp_path)]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "megatron_vppo.cli.main", *arguments],
            stdout=full, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    what = "" if unbuffered else "standard output: "
    assert (ended.returncode, ended.stderr) == (2, f"vppo: {what}No space left on device\n")


def test_ctrl_c_ends_a_command_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_vppo.cli.doctor.run_doctor", interrupt)
    assert main(["doctor"]) == 130
    assert capfd.readouterr().err == ""


def test_another_architecture_is_named(config_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Qwen2Config(num_hidden_layers=1).save_pretrained(tmp_path / "text_only")
    assert main(["train", "--config", str(config_file), f"model.path={tmp_path}/text_only"]) == 2
    assert "config.json: a model of type 'qwen2' is not supported; qwen2_5_vl, qwen3_vl are" in capfd.readouterr().err


def test_slurm_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what is set below is taken back
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "0")
    take_rank_from_slurm()
    assert "RANK" not in os.environ, "the shell of a batch script is no rank"
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    task = take_rank_from_slurm()
    assert task is not None and (task.rank, task.size) == (3, 4)
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")] == [
        "3",
        "4",
        "1",
        "127.0.0.1",
    ]
