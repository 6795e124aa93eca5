"""An evaluation with a real vLLM and a tiny model: its samples are those of transformers, and a killed one goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from megatron_vppo.cli.main import main
from megatron_vppo.evaluation.responses import read_records, response_path
from megatron_vppo.models.hf_config import vision_token_ids
from tests.evaluation.suites import record, tiny_model, write_records, write_suite

GREEDY = {"rollout": {
    "n": 1, "temperature": 0, "top_p": 1.0, "top_k": -1, "cpu_kv_cache_gib": 0.125, "max_num_seqs": 16,
    "threads_per_engine": 1,
}}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    tiny_model(folder / "model")
    return folder


def command(folder: Path, suite: Path, out: str, *more: str) -> list[str]:
    return ["eval", "--model", str(folder / "model"), "--suite", str(suite), "--out", str(folder / out), *more]


def records(folder: Path, out: str, name: str) -> list[dict[str, Any]]:
    found = read_records(response_path(folder / out, name))
    return sorted(found, key=lambda one: (one["question"], one["sample"]))


def greedy_by_transformers(folder: Path, name: str, number: int) -> list[str]:
    """The texts of the tokens that `generate` chooses for a question of the suite."""
    processor = AutoProcessor.from_pretrained(folder / "model")
    model = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32).eval()
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"Which? {number}"}]}]
    text = processor.apply_chat_template(turn, add_generation_prompt=True)
    image, size = Image.open(folder / f"{name}_{number}.png"), {"shortest_edge": 3136, "longest_edge": 12544}
    inputs = processor(text=[text], images=[image], images_kwargs={"size": size}, return_tensors="pt")
    banned = [[token] for token in vision_token_ids(model.config)]
    eos = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False, bad_words_ids=banned, eos_token_id=eos)
    return processor.tokenizer.batch_decode([[token] for token in output[0, inputs["input_ids"].shape[1] :]])


@pytest.mark.slow
@pytest.mark.distributed
def test_greedy_responses_are_those_of_transformers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second run has nothing to do and starts no engine. One response was recorded before the first, and stays."""
    suite = write_suite(folder, "one", "two", **GREEDY)
    assert main(command(folder, suite, "greedy")) == 0
    engines = list((folder / "greedy" / "logs").iterdir())
    expected = {(name, k): greedy_by_transformers(folder, name, k) for name in ("one", "two") for k in range(3)}
    for (name, number), tokens in expected.items():
        assert records(folder, "greedy", name)[number]["tokens"] == tokens
    assert len({*map(tuple, expected.values())}) > 1, "the images and questions tell responses apart"

    before = {path: path.read_bytes() for path in (folder / "greedy" / "responses").iterdir()}
    for path in engines:
        path.unlink()
    capsys.readouterr()
    assert main(command(folder, suite, "greedy", "rollout.num_engines=2")) == 0
    assert "every response is recorded" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before
    assert list((folder / "greedy" / "logs").iterdir()) == []
    summary = json.loads((folder / "greedy" / "summary.json").read_text())
    assert list(summary["runs"][0]["benchmarks"]) == ["one", "two"]
    assert (folder / "greedy" / "report.html").stat().st_size < 200_000


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.extended
def test_a_killed_evaluation_goes_on_where_it_was(folder: Path) -> None:
    """SIGKILL after the first response; what was recorded stays as it is, and nothing is recorded twice."""
    suite = write_suite(folder, "one", "two")
    words = [sys.executable, "-m", "megatron_vppo.cli.main", *command(folder, suite, "killed", "rollout.n=40")]
    path = response_path(folder / "killed", "one")
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while not (path.exists() and path.read_bytes().count(b"\n")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
    before = list(read_records(path))
    assert 0 < len(before) < 120, "killed too late to go on with"
    assert main(command(folder, suite, "killed", "rollout.n=40")) == 0
    assert list(read_records(path))[: len(before)] == before
    for name in ("one", "two"):
        found = [(one["question"], one["sample"]) for one in records(folder, "killed", name)]
        assert found == [(str(question), sample) for question in range(3) for sample in range(40)]


# --- Refusals, which need no engine -----------------------------------------------------------------------------------


def refusal(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main([*words]) == 2
    return capsys.readouterr().err


def test_responses_to_questions_that_have_changed_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = write_suite(folder, "one")
    write_records(folder / "changed", "one", [record("1", "0123456789abcdef", 0, 1.0)])
    message = refusal(folder, capsys, *command(folder, suite, "changed"))
    assert "recorded to 1 of 3 questions that are others now; question 1 has changed since" in message
    write_records(folder / "gone", "one", [record("7", "0123456789abcdef", 0, 1.0)])
    assert "question 7 is not in the benchmark any more" in refusal(folder, capsys, *command(folder, suite, "gone"))


def test_mistakes_are_told_before_anything_is_made(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = write_suite(folder, "one")
    words = command(folder, suite, "unmade")
    assert "holds no evaluation" in refusal(folder, capsys, *words, "--against", str(folder / "model"))
    assert "did you mean rollout.top_k" in refusal(folder, capsys, *words, "rollout.topk=3")
    text_model = folder / "text"
    text_model.mkdir(exist_ok=True)
    (text_model / "config.json").write_text('{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}')
    message = refusal(folder, capsys, "eval", "--model", str(text_model), *words[3:])
    assert "qwen2" in message and "qwen2_5_vl" in message
    missing = refusal(folder, capsys, "eval", "--model", str(folder / "nowhere"), *words[3:])
    assert f"--model={folder / 'nowhere'}: no such folder" in missing
    assert not (folder / "unmade").exists()
