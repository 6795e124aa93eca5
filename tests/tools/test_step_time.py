"""The parts of the benchmark that need no run: FLOPs, tokens, phases of logged lines, memory read from /proc."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench.flops import StepShape, phase_flops
from bench.machine import commit, hardware, matmul_gflops, versions
from bench.process_memory import MemorySampler, ProcessPeak, by_role, process_tree, read_peak
from bench.random_model import IMAGE_SIZE, PROMPT_TOKENS, QUESTION, SIZES, VOCABULARY, make_config, write_rows
from bench.step_time import floor, patches_per_prompt, run_settings, step_shape, trainer_threads
from bench.timing import measured_lines, phase_seconds, startup_seconds
from digits.checkpoint import make_processor
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration

from megatron_vppo.config.load import load_config
from megatron_vppo.models.flops import model_cost
from megatron_vppo.models.hf_config import vision_token_ids
from megatron_vppo.observability.metrics import read_metrics
from megatron_vppo.planning.assumptions import Assumptions
from megatron_vppo.planning.gpus import GpuCeilings
from megatron_vppo.planning.step_flops import StepWork
from megatron_vppo.planning.step_model import Machine, TrainerLayout
from megatron_vppo.planning.timed_layouts import speed_model
from megatron_vppo.planning.training_seconds import scoring_seconds, update_seconds
from tests.planning.test_sampling_seconds import ALL, NO_HOST
from tests.planning.test_step_flops import small_config

CONFIG = Path(__file__).parents[2] / "tools/bench/configs/compute.yaml"


def shape(**changes: object) -> StepShape:
    values = {
        "sampled_groups": 3, "trained_groups": 2, "responses_per_group": 4, "prompt_tokens": 10, "response_tokens": 6,
        "patches_per_prompt": 16, "views": 2, "perturbations": 4, "epochs": 1,
        "shared_prefix": False,
    }  # fmt: skip
    return StepShape(**{**values, **changes})  # type: ignore[arg-type]


def test_tokens_of_each_phase() -> None:
    # 3 x 4 responses of 6 tokens; 2 x 4 sequences of 10 + 6 - 1 tokens, in two views.
    assert shape().phase_tokens() == {"gen": 72, "score": 240, "update_actor": 120}
    assert shape(views=1, epochs=2).phase_tokens() == {"gen": 72, "score": 120, "update_actor": 240}


def test_flops_of_each_phase_by_hand() -> None:
    cost = model_cost(small_config())
    image = 16 * cost.per_patch + 16 * cost.window_attention + 256 * cost.full_attention
    response = 15 * cost.per_token + 225 * cost.attention + 6 * cost.per_head_position
    flops = phase_flops(shape(), cost)
    # Two views of 8 responses; 2 images as they are and 8 perturbed ones.
    assert flops["score"] == 16 * response + 10 * image
    # Forward and twice that backward, each of the 2 images once.
    assert flops["update_actor"] == 3 * (8 * response + 2 * image)
    # 3 prompts with their image, then 4 times the other 5 tokens that are read; a head position for each of 6 tokens.
    prompt = 10 * cost.per_token + 100 * cost.attention + image
    rest = 5 * cost.per_token + (225 - 100) * cost.attention + 6 * cost.per_head_position
    assert flops["gen"] == 3 * (prompt + 4 * rest)
    assert phase_flops(shape(views=1), cost)["score"] == 8 * response + 2 * image
    assert phase_flops(shape(perturbations=1), cost)["score"] == 16 * response + 4 * image
    assert phase_flops(shape(epochs=2), cost)["update_actor"] == 2 * flops["update_actor"]
    # Shared prompts: in the original view 2 prompts with their images, in the perturbed one 8, or 4 of 2 kinds each.
    shared = phase_flops(shape(shared_prefix=True), cost)
    assert shared["gen"] == flops["gen"]
    assert shared["score"] == 10 * prompt + 16 * rest
    assert shared["update_actor"] == 3 * (2 * prompt + 8 * rest)
    two = phase_flops(shape(shared_prefix=True, perturbations=2), cost)
    assert two["score"] == 6 * prompt + 16 * rest
    # An update of both views reads what scoring of both reads, three times over.
    for both in (shape(updated_views=2), shape(updated_views=2, shared_prefix=True, perturbations=2)):
        assert phase_flops(both, cost)["update_actor"] == 3 * phase_flops(both, cost)["score"]
        assert both.phase_tokens()["update_actor"] == 240


def test_floor_compares_with_the_better_of_two_ceilings() -> None:
    found = floor({"score": 3e9}, {"score": {"median": 0.5}}, ceilings=[20.0, 24.0], threads=2)
    assert found["phases"]["score"] == {"gflop": 3.0, "gflops": 6.0, "floor_s": 0.125, "of_ceiling": 0.25}


COMPUTE = StepWork(
    prompts=2, responses=8, drawn=1.0, minibatches=2, prompt_tokens=PROMPT_TOKENS, response_tokens=128,
    longest_response=128, images=1, patches=16 * 14 * 4, rows_per_update=8, rows_per_scoring=8,
)  # fmt: skip
"""A step of tools/bench/configs/compute.yaml."""
TWO_THREADS = TrainerLayout(tensor=2, pipeline=1, context=1, data=1, recompute="none", node_gpus=2)


def modelled(
    works: Sequence[StepWork], *, gflops: float, memory: float, link: float | None, score: float
) -> tuple[float, list[tuple[float, float]]]:
    """The seconds of scoring and update that the model predicts for two ranks of one thread each.

    The share of the product that scoring reaches in the first work, which takes `score` seconds, goes for all of them:
    a test of the work that phases do, and not of the machine. The host's times are those of a GPU's host and are left
    out.
    """
    model = speed_model(make_config(make_processor().tokenizer), parameters=59_000_000)
    product = gflops * 1e9 / 2
    ceilings = GpuCeilings(
        "CPU", product, product, memory=memory, node=link, network=None, to_host=37e9, is_measured=True
    )

    def machine(share: float) -> Machine:
        return Machine(ceilings, Assumptions(replace(ALL, training=share, vision=share), NO_HOST))

    def seconds(work: StepWork, share: float) -> tuple[float, float]:
        at = machine(share)
        return scoring_seconds(model, work, TWO_THREADS, at).total, update_seconds(model, work, TWO_THREADS, at).total

    low, high = 0.05, 1.0
    for _ in range(40):  # exchanges do not scale with the share
        middle = (low + high) / 2
        low, high = (middle, high) if seconds(works[0], middle)[0] > score else (low, middle)
    return low, [seconds(work, low) for work in works]


def test_the_model_of_vppo_plan_against_the_first_measured_run() -> None:
    """docs/LOG.md, "Step time of a compute-bound run": scoring 13.8 s (13.3 to 14.3), update 19.3 s (19.1 to 19.4)."""
    share, ((score, update),) = modelled([COMPUTE], gflops=240, memory=10e9, link=None, score=13.8)
    assert share == pytest.approx(0.45, abs=0.01), "of the ceiling, as the log says"
    assert score == pytest.approx(13.8)
    assert update == pytest.approx(19.3, rel=0.1)


def test_the_model_of_vppo_plan_against_runs_with_and_without_shared_prompts() -> None:
    """docs/LOG.md, "Shared prompts in seconds": two runs of each on an idle machine, and its ceilings."""
    apart = replace(COMPUTE, perturbed_per_row=False)
    works = [apart, replace(apart, shared_prefix=True)]
    share, found = modelled(works, gflops=193, memory=19.3e9, link=0.889e9, score=11.1)
    assert 0.5 < share < 0.8
    assert found[0] == pytest.approx((11.1, 17.87), rel=0.15)
    assert found[1] == pytest.approx((5.33, 8.35), rel=0.15), "half of it, by the model and by the clock"


LINES = [
    {"step": 1, "time": 1030.0, "timing_s/step": 20.0, "timing_s/gen": 9.0, "timing_s/update_actor": 8.0},
    {"step": 2, "time": 1040.0, "timing_s/step": 9.0, "timing_s/gen": 4.0, "timing_s/update_actor": 3.0},
    {"step": 3, "time": 1050.0, "timing_s/step": 8.0, "timing_s/gen": 2.0, "timing_s/update_actor": 5.0},
    {"step": 4, "time": 1070.0, "timing_s/step": 11.0, "timing_s/gen": 3.0, "timing_s/update_actor": 4.5,
     "timing_s/testing": 1.0},
]  # fmt: skip


@pytest.fixture
def logged(tmp_path: Path) -> list[dict[str, float]]:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return read_metrics(tmp_path)


def test_phases_are_medians_over_the_steps_after_the_warmup(logged: list[dict[str, float]]) -> None:
    seconds = phase_seconds(measured_lines(logged, warmup=1, steps=3))
    assert seconds["gen"] == {"median": 3.0, "min": 2.0, "max": 4.0}
    assert seconds["update_actor"]["median"] == 4.5
    assert seconds["step"] == {"median": 9.0, "min": 8.0, "max": 10.0}  # the last step without its 6 s of extras
    assert seconds["other"] == {"median": 2.0, "min": 1.0, "max": 2.5}
    assert "score" not in seconds


def test_startup_ends_where_the_first_step_begins(logged: list[dict[str, float]]) -> None:
    assert startup_seconds(logged, started=997.0) == 13.0


def test_a_run_that_is_too_short_or_trained_on_nothing_is_refused(logged: list[dict[str, float]]) -> None:
    with pytest.raises(ValueError, match=r"logged 4 training steps, but 1 \+ 4"):
        measured_lines(logged, warmup=1, steps=4)
    del logged[2]["timing_s/update_actor"]
    with pytest.raises(ValueError, match=r"steps \[3\] trained on nothing"):
        measured_lines(logged, warmup=1, steps=3)


HOLD = """
import subprocess, sys
data = bytearray(64 << 20)
data[::4096] = b"x" * len(data[::4096])
del data
child = subprocess.Popen([sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"])
child.wait()
"""


def test_peak_memory_of_a_real_process_and_its_child(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], stdout=subprocess.PIPE, env={**os.environ, "RANK": "3"}
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()  # the grandchild runs: the 64 MiB are written and freed again
        sampler = MemorySampler(process.pid, interval_seconds=0.05)
        time.sleep(0.2)
        tree = process_tree(process.pid)
        resident = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        for pid in reversed(tree):
            os.kill(pid, 9)
        process.wait()
        peaks = {peak.pid: peak for peak in sampler.stop()}
    assert tree[0] == process.pid and len(tree) == 2
    assert peaks[tree[1]].parent == process.pid
    assert peaks[process.pid].peak_mib > resident + 50  # freed since, and still counted
    assert peaks[process.pid].peak_mib > peaks[tree[1]].peak_mib + 50
    assert read_peak(process.pid) is None and process_tree(process.pid) == []


@pytest.mark.parametrize(
    ("command", "rank", "role"),
    [
        (["-m", "megatron_vppo.cli.main", "train"], None, "vppo"),
        (["-m", "megatron_vppo.cli.main", "train"], "1", "trainer rank 1"),
        (["-m", "torch.distributed.run", "-m", "megatron_vppo.cli.main"], None, "launcher"),
        (["-m", "megatron_vppo.rollout.engine_process", "7"], None, "engine"),
    ],
)
def test_roles_of_real_command_lines(command: list[str], rank: str | None, role: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    environment |= {} if rank is None else {"RANK": rank}
    sleeping = [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)", *command]
    with subprocess.Popen(sleeping, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        process.stdout.readline()
        peak = read_peak(process.pid)
        process.kill()
    assert peak is not None and peak.role == role


def test_memory_by_role_keeps_the_largest_and_names_forked_helpers() -> None:
    peaks = [ProcessPeak(1, 0, "launcher", 50.0), ProcessPeak(2, 1, "engine", 900.0), ProcessPeak(3, 2, "engine", 20.0),
             ProcessPeak(4, 1, "worker", 70.0), ProcessPeak(5, 1, "worker", 80.0)]  # fmt: skip
    assert by_role(peaks) == [
        {"role": "engine", "processes": 1, "peak_mib": 900.0},
        {"role": "worker", "processes": 2, "peak_mib": 80.0},
        {"role": "launcher", "processes": 1, "peak_mib": 50.0},
        {"role": "engine (forked)", "processes": 1, "peak_mib": 20.0},
    ]


def test_the_compute_config_loads_with_the_settings_of_a_measured_run() -> None:
    config = load_config(CONFIG, run_settings("/tmp/somewhere", steps=2))
    assert config.trainer.total_steps == 3 and config.data.val_files is None
    assert not config.algorithm.online_filtering
    assert (config.data.max_prompt_length, config.data.max_response_length, config.rollout.n) == (256, 128, 8)
    assert trainer_threads(config) == 2


def test_prompts_of_the_random_model_have_256_tokens() -> None:
    processor = make_processor()
    content = [{"type": "image"}, {"type": "text", "text": QUESTION.removeprefix("<image>")}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    pixels = IMAGE_SIZE[0] * IMAGE_SIZE[1]
    inputs = processor(
        text=[text], images=[Image.new("RGB", IMAGE_SIZE)], return_tensors="pt",
        images_kwargs={"size": {"shortest_edge": 784, "longest_edge": pixels}},
    )  # fmt: skip
    assert inputs["input_ids"].shape == (1, PROMPT_TOKENS)
    assert inputs["pixel_values"].shape[0] == pixels / 14**2


@pytest.mark.parametrize(("size", "head_dim"), [("60m", 64), ("270m", 128)])
def test_the_random_model_has_the_size_of_its_name(size: str, head_dim: int) -> None:
    config = make_config(make_processor().tokenizer, size=SIZES[size])
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert millions == pytest.approx(int(size.removesuffix("m")), rel=0.05)
    assert model.lm_head.weight.shape[0] == VOCABULARY == config.text_config.vocab_size
    assert config.text_config.hidden_size // config.text_config.num_attention_heads == head_dim
    assert sum(config.text_config.rope_parameters["mrope_section"]) == head_dim // 2
    # A model whose EOS token is never sampled is refused.
    eos = config.text_config.eos_token_id
    assert 0 <= eos < VOCABULARY and eos not in vision_token_ids(config)


def test_shape_reads_the_views_and_images_of_a_config(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.parquet", rows=2, seed=0)
    make_processor().save_pretrained(tmp_path / "model")
    places = [f"data.train_files={tmp_path}/rows.parquet", f"model.path={tmp_path}/model"]
    config = load_config(CONFIG, places)
    assert patches_per_prompt(config) == 32 * 28
    found = step_shape(config, 4, 4, 256, 128)
    assert (found.views, found.perturbations, found.responses_per_group, found.epochs) == (2, 1, 8, 1)
    for per, perturbations in (("row", 8), ("3", 3), ("12", 8)):
        other = load_config(CONFIG, [*places, f"algorithm.perturb.per={per}"])
        assert step_shape(other, 4, 4, 256, 128).perturbations == perturbations
    grpo = [*places, "algorithm.use_vppo_on_perception=false", "algorithm.use_advantage_shaping=false"]
    assert step_shape(load_config(CONFIG, grpo), 4, 4, 256, 128).views == 1


def test_machine_says_where_it_was_measured(repo_root: Path, tmp_path: Path) -> None:
    assert hardware()["cores"] == len(os.sched_getaffinity(0)) and hardware()["cpu"]
    assert versions()["torch"] == torch.__version__
    head = subprocess.run(["git", "-C", repo_root, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert commit(repo_root)["commit"] == (head or None)
    assert commit(tmp_path) == {"commit": None, "changed": None}
    before = torch.get_num_threads()
    assert matmul_gflops(threads=1) > 0.5
    assert torch.get_num_threads() == before


@pytest.mark.slow
@pytest.mark.extended
@pytest.mark.distributed
def test_the_compute_run_is_measured(repo_root: Path) -> None:
    """The real command with the fewest steps: one of warm-up, one that is measured."""
    command = [sys.executable, "tools/bench/step_time.py", "--config", "compute", "--steps", "1"]
    report = json.loads(subprocess.run(command, cwd=repo_root, stdout=subprocess.PIPE, text=True, check=True).stdout)
    assert report["measured_steps"] == 1
    assert {"step", "gen", "score", "update_actor", "other"} <= set(report["seconds"])
    assert all(seconds["median"] > 0 for phase, seconds in report["seconds"].items() if phase != "other")
    assert (report["shape"]["sampled_groups"], report["shape"]["trained_groups"]) == (2, 2)
    assert report["shape"]["prompt_tokens"] == PROMPT_TOKENS and 1 <= report["shape"]["response_tokens"] <= 128
    assert report["weight_sync_mib"] == pytest.approx(59e6 * 4 / 2**20, rel=0.05)
    assert {"engine", "trainer rank 0", "trainer rank 1"} <= {role["role"] for role in report["memory"]}
