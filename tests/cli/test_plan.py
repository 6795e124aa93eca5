"""`vppo plan` as a user sees it."""

from __future__ import annotations

import json
import re
import typing
from pathlib import Path

import pytest
import yaml

from megatron_vppo.cli.main import main
from megatron_vppo.config.load import load_config
from megatron_vppo.config.schema import ParallelConfig
from megatron_vppo.planning.layouts import RECOMPUTES
from tests.models.tiny import tiny_config

EXAMPLE = ["plan", "--model", "qwen2.5-vl-32b", "--gpus", "32", "--gpu-memory", "80"]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    assert main(arguments) == status
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines()) <= 100
    return out


def rows_of(out: str) -> list[list[str]]:
    lines = [
        line.replace("|", "")
        for line in out.splitlines()
        if re.match(r" +\d+ +\d+ +\d+ +\d+ (none|selective|full)", line)
    ]
    return [line.split() for line in lines]


def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, *EXAMPLE)
    assert out.startswith("Model: qwen2.5-vl-32b (Qwen/Qwen2.5-VL-32B-Instruct), 33.45 B parameters")
    rows = rows_of(out)
    assert len(rows) > 3
    for tensor, pipeline, context, data, _, *memory in rows:
        assert int(tensor) * int(pipeline) * int(context) * int(data) == 32
        weights, grads, optimizer, activations, head, trainer = map(float, memory[:6])
        assert weights + grads + optimizer + activations + head + 3 == pytest.approx(trainer, abs=0.3)
        assert trainer <= 79 and weights + grads + optimizer + 3 + float(memory[7]) <= 80.2
    # TP 8: an eighth of 33.45 B values at 2 and 4 bytes, and at 12 over the data-parallel ranks.
    eighth = next(row for row in rows if row[:2] == ["8", "1"])
    gib = 33_452_718_336 / 8 / 2**30
    assert [float(number) for number in eighth[5:8]] == pytest.approx([2 * gib, 4 * gib, 12 * gib / 4], abs=0.06)


def test_the_settings_of_the_best_layout_are_a_configuration(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = printed(
        capsys, *EXAMPLE, "--rows-per-micro-batch", "2", "--image-tokens", "600", "--freeze", "vision_tower",
        "--offload", "optimizer", "grads",
    )  # fmt: skip
    lines = out.partition("Settings of the first layout:\n")[2]
    path = tmp_path / "config.yaml"
    values = yaml.safe_load(lines)
    values["data"]["train_files"] = "train.parquet"
    values["model"]["path"] = "folder"
    path.write_text(yaml.safe_dump(values))
    config = load_config(path)
    tensor, pipeline, context, data, recompute, *memory = rows_of(out)[0]
    parallel, rollout = config.parallel, config.rollout
    assert (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size) == (int(tensor), int(pipeline))
    assert (parallel.data_parallel_size, parallel.recompute) == (int(data), recompute)
    assert (parallel.context_parallel_size, parallel.sequence_parallel) == (int(context), int(tensor) > 1)
    assert config.model.freeze == ("vision_tower",)
    assert config.actor.offload == ("grads", "optimizer")
    assert rollout.tensor_parallel_size == int(memory[6])
    assert rollout.gpu_memory_utilization * 80 == pytest.approx(float(memory[7]), abs=0.06)
    assert (rollout.max_num_seqs, rollout.enforce_eager, config.actor.head_chunk_tokens) == (1024, False, 4096)
    assert config.actor.micro_batch_size_per_device_for_update == 2
    assert config.actor.micro_batch_size_per_device_for_experience == 2
    assert config.data.max_pixels == 600 * 28 * 28
    assert (config.data.max_prompt_length, config.data.max_response_length) == (4096, 2048)


def test_a_plan_for_more_tokens_than_the_model_has_positions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*EXAMPLE, "--prompt-tokens", "120000", "--response-tokens", "8001"]) == 2
    error = capsys.readouterr().err
    assert "--prompt-tokens 120000 + --response-tokens 8001 = 128001 tokens, but the model has 128000" in error


def test_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "plan", "--model", "qwen2.5-vl-72b", "--gpus", "16", "--gpu-memory", "80", status=1)
    assert "Nothing fits" in out and not rows_of(out)
    assert re.search(r"takes [\d.]+ of 80 GiB: weights [\d.]+, gradients [\d.]+, optimizer", " ".join(out.split()))
    gpus = int(re.search(r"What would fit: (\d+) such GPUs", out)[1])  # type: ignore[index]
    assert rows_of(printed(capsys, "plan", "--model", "qwen2.5-vl-72b", "--gpus", str(gpus), "--gpu-memory", "80"))


def test_fewer_rows_are_named_where_they_help(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--model", "qwen2.5-vl-7b", "--gpus", "4", "--gpu-memory", "80"]
    assert "What would fit: these GPUs with --rows-per-micro-batch 1." in printed(
        capsys, *command, "--rows-per-micro-batch", "96", status=1
    )
    assert rows_of(printed(capsys, *command, "--rows-per-micro-batch", "1"))


@pytest.mark.parametrize(("model", "gpus"), [("qwen3-vl-2b", 1), ("qwen2.5-vl-7b", 2), ("qwen3-vl-8b", 3)])
def test_more_gpus_fill_their_node(model: str, gpus: int, capsys: pytest.CaptureFixture[str]) -> None:
    """These models fit by tensor parallelism over more GPUs than there are."""
    command = ["plan", "--model", model, "--gpu-memory", "24"]
    out = printed(capsys, *command, "--gpus", str(gpus), status=1)
    enough = int(re.search(r"What would fit: (\d+) such GPUs", out)[1])  # type: ignore[index]
    assert enough > gpus and not enough % gpus
    assert rows_of(printed(capsys, *command, "--gpus", str(enough)))
    assert not rows_of(printed(capsys, *command, "--gpus", str(enough // 2), status=1)), "half as many are too few"


@pytest.mark.parametrize(("memory", "per_node"), [("4", "8"), ("24", "1")])
def test_more_gpus_that_do_not_help(memory: str, per_node: str, capsys: pytest.CaptureFixture[str]) -> None:
    """More GPUs do not help if the engine's 3 GiB and weights are too much, or if a node has one GPU."""
    command = ["plan", "--model", "qwen3-vl-2b", "--gpu-memory", memory, "--gpus-per-node", per_node]
    out = printed(capsys, *command, "--gpus", "1", status=1)
    assert "2, 4, 8, 16 or 32 times as many GPUs would not help." in out
    for gpus in ("2", "4", "8", "16", "32"):
        assert not rows_of(printed(capsys, *command, "--gpus", gpus, status=1))


def test_an_engine_too_small_for_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    """73.4 B values of two bytes are 137 GiB."""
    command = ["plan", "--model", "qwen2.5-vl-72b", "--gpus", "64", "--gpu-memory", "80"]
    out = printed(capsys, *command, "--rollout-tp", "1", status=1)
    assert "times as many GPUs would not help" in out
    assert "What would fit: these GPUs without --rollout-tp." in out
    assert "--rollout-tp" not in printed(capsys, *command)


def test_engines_that_do_not_divide_larger_nodes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Three of three or of six GPUs are a node's share, but not of twelve in nodes of eight."""
    config = tiny_config(tied=True, vocab=299, num_attention_heads=6, num_key_value_heads=3, hidden_size=96)
    config.vision_config.num_heads, config.vision_config.intermediate_size = 6, 96
    config.vision_config.out_hidden_size = 96
    config.save_pretrained(tmp_path / "tiny")
    command = ["plan", "--model", str(tmp_path / "tiny"), "--rollout-tp", "3", "--gpus"]
    assert rows_of(printed(capsys, *command, "3", "--gpu-memory", "12"))
    assert rows_of(printed(capsys, *command, "6", "--gpu-memory", "12"))
    assert main([*command, "12", "--gpu-memory", "12"]) == 2
    assert "12 GPUs in nodes of 8 do not divide into engines of 3; possible: 1\n" in capsys.readouterr().err
    assert "times as many GPUs would not help" in printed(capsys, *command, "3", "--gpu-memory", "4", status=1)


@pytest.mark.parametrize(("memory", "status"), [("79.6", 0), ("80", 0), ("80.0", 0), ("11.25", 1)])
def test_memory_as_a_card_reports_it(memory: str, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Printed as given; utilization is a share of exactly that."""
    command = ["plan", "--model", "qwen2.5-vl-7b", "--gpus", "8", "--rollout-tp", "1"]
    out = printed(capsys, *command, "--gpu-memory", memory, status=status)
    assert f"8 GPUs of {float(memory):g} GiB, " in out
    if status:
        assert " of 11.25 GiB: weights" in " ".join(out.split())
    else:
        utilization = float(re.search(r"gpu_memory_utilization: ([\d.]+)", out)[1])  # type: ignore[index]
        assert float(rows_of(out)[0][12]) == pytest.approx(utilization * float(memory), abs=0.05)


def test_a_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tiny_config(tied=True, vocab=299).save_pretrained(tmp_path)
    command = ["plan", "--model", str(tmp_path), "--gpus", "2", "--gpu-memory", "40", "--gpus-per-node", "1"]
    rows = rows_of(printed(capsys, *command))
    assert {row[0] for row in rows} == {"1"}, "tensor parallelism stays within a node of one GPU"
    assert {row[1] for row in rows} == {"1", "2"}, "3 layers over two stages are 1 and 2"


# --- Seconds ----------------------------------------------------------------------------------------------------------


def seconds_of(out: str) -> list[list[float]]:
    """Reads step, sampling, scoring, update, sync and rank 0 of each layout, then tokens/s and MFU."""
    lines = [line for line in out.splitlines() if line.endswith(" %")]
    return [[float(word) for word in line.replace("|", " ").replace("%", "").split()[5:]] for line in lines]


def test_seconds_of_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, *EXAMPLE, "--gpu", "h800")
    memory, seconds = out.split("Modelled seconds of a step with these layouts")
    rows, times = rows_of(memory), seconds_of(seconds)
    assert len(rows) == len(times) == 12
    assert [row[:5] for row in rows] == [line.split()[:5] for line in seconds.splitlines() if line.endswith(" %")]
    assert [step[0] for step in times] == sorted(step[0] for step in times)
    for step, *phases in times:
        assert sum(phases[:5]) == pytest.approx(step, abs=0.3)
        # 3,072 rows of 1,400 + 450 tokens on 32 GPUs.
        assert phases[5] == pytest.approx(3072 * 1850 / step / 32, abs=1)
    (first,) = re.findall(r"First layout: (\d+) s, and ", out)
    assert int(first) == pytest.approx(times[0][0], abs=0.55), "the table is rounded, too"
    assert "by the modelled seconds of a step" in memory and "replicas (TP x PP x CP GPUs) within a node" not in out
    assert "Modelled, not measured" in " ".join(out.split())
    assert f"tensor_model_parallel_size: {rows[0][0]}\n" in out, "settings of the fastest"


def test_without_a_gpu_there_are_no_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    """Memory is the same with and without; the order is not."""
    plain, timed = printed(capsys, *EXAMPLE), printed(capsys, *EXAMPLE, "--gpu", "h800")
    assert "econds" not in plain and "odelled" not in plain
    assert "and 17 more" in plain
    memory = timed.split("Modelled seconds")[0]
    known = [row for row in rows_of(memory) if row in rows_of(plain)]
    assert len(known) >= 6, "layouts that both print have the same numbers"


def test_measured_ceilings(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """One device a thousand times slower than an H100, without neighbours."""
    path = tmp_path / "slow.json"
    ceilings = {"name": "slow", "product_tflops": 0.72, "memory_gb_per_s": 3, "to_host_gb_per_s": 1}
    path.write_text(json.dumps(ceilings))
    command = ["plan", "--model", "qwen3-vl-2b", "--gpus", "1", "--gpu-memory", "80", "--rows-per-micro-batch", "1"]
    out = printed(capsys, *command, "--gpu", str(path))
    assert "Ceilings: slow, measured by tools/bench/ceilings.py: products 0.72 TFLOP/s, memory 3 GB/s\n" in out
    fast = printed(capsys, *command, "--gpu", "h100")
    assert seconds_of(out)[0][3] > 100 * seconds_of(fast)[0][3], "the update"
    assert main([*command, "--gpus", "2", "--gpu", str(path)]) == 2
    assert "node_gb_per_s is null, but 2 GPUs talk to each other" in capsys.readouterr().err


def test_the_step_on_more_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, *EXAMPLE, "--gpu", "h800", "--simulate", "8,32,512")
    growth = out.partition("with more or fewer replicas of the first layout")[2].partition("Settings")[0]
    lines = [line.replace("|", " ").split() for line in growth.splitlines() if re.match(r" +\d", line)]
    rows = {int(line[0]): line for line in lines}
    assert "does not fit the memory" in " ".join(rows[8])
    assert float(rows[32][2]) == pytest.approx(seconds_of(out)[0][0], abs=0.2), "the plan itself"
    assert int(rows[512][1]) == 16 * int(rows[32][1])
    assert float(rows[512][9]) == pytest.approx(float(rows[32][9]) / 16, abs=0.1)
    assert rows[512][7] == rows[32][7], "rank 0's work"


def test_lengths_that_change_the_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    base = seconds_of(printed(capsys, *EXAMPLE, "--gpu", "h800"))[0][0]
    out = printed(capsys, *EXAMPLE, "--gpu", "h800", "--mean-response-tokens", "900", "--mean-prompt-tokens", "1300")
    assert "384 prompts of 1300 tokens, 8 responses of 900 each on average, 2 prompts sampled for each" in " ".join(
        out.split()
    )
    assert seconds_of(out)[0][0] > base


def test_a_plan_for_the_perception_loss(capsys: pytest.CaptureFixture[str]) -> None:
    """The update reads twice the views, and scoring half of them."""
    command = ["plan", "--model", "qwen2.5-vl-7b", "--gpus", "8", "--gpu-memory", "80", "--gpu", "h100"]
    plain, out = printed(capsys, *command), printed(capsys, *command, "--perception-loss")
    assert "both views in the update, the original ones scored" in " ".join(out.split())
    assert "both views scored" in " ".join(plain.split())
    assert "in both views in the update" in " ".join(out.split())
    ours, theirs = (
        {tuple(row[:5]): times for row, times in zip(rows_of(text.split("Modelled")[0]), seconds_of(text), strict=True)}
        for text in (plain, out)
    )
    both = [(ours[layout], theirs[layout]) for layout in ours.keys() & theirs.keys()]
    assert len(both) > 3
    for (_, _, scoring, update, *_), (_, _, scoring_then, update_then, *_) in both:
        assert 0.45 * scoring < scoring_then < 0.8 * scoring, "launches, messages and packing do not halve"
        assert 1.3 * update < update_then < 2.0 * update, "nor do collectives and the optimizer double"


def test_every_recomputation_that_can_be_set_is_looked_at() -> None:
    assert set(typing.get_args(ParallelConfig.model_fields["recompute"].annotation)) == set(RECOMPUTES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "qwen2.5-vl-8b"], "not one of qwen2.5-vl-3b, "),
        (["--model", "qwen3-vl-2b", "--images-per-row", "9"], "lower --image-tokens"),
        (["--model", "qwen2.5-vl-7b", "--gpus", "2", "--rollout-tp", "4"], "--rollout-tp 4: 2 GPUs do not divide"),
        (["--model", "qwen2.5-vl-7b", "--rollout-tp", "8"], "--rollout-tp 8: 28 attention heads cannot be split"),
        (["--model", "qwen3-vl-2b", "--gpu", "b200"], "not one of h100, h800, h200, a100"),
        (["--model", "qwen3-vl-2b", "--simulate", "8,64"], "--simulate is about seconds; name the GPU with --gpu"),
        (
            ["--model", "qwen3-vl-2b", "--gpu", "h100", "--mean-prompt-tokens", "980"],
            "--mean-prompt-tokens 980: the images of a prompt alone have",
        ),
        (
            ["--model", "qwen3-vl-2b", "--gpu", "h100", "--mean-response-tokens", "2049"],
            "--mean-response-tokens 2049 is more than --response-tokens 2048, the longest",
        ),
        (
            ["--model", "qwen3-vl-2b", "--freeze", "vision_tower", "projector", "language_model"],
            "--freeze names vision_tower, projector, language_model: nothing is left to train; drop one of them",
        ),
    ],
)
def test_mistakes(arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpus", "8", "--gpu-memory", "80", *arguments]) == 2
    error = capfd.readouterr().err
    assert error.startswith("vppo: ") and message in error and error.count("\n") == 1


def test_numbers_that_are_none(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "--model", "qwen3-vl-2b", "--gpus", "0", "--gpu-memory", "80"])
    assert "--gpus: 0 is not a whole number of at least 1" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        main(["plan", "--model", "qwen2.5-vl-7b", "--gpus", "2147483648", "--gpu-memory", "80"])
    assert "2147483648 is not a whole number of at least 1 and at most 2147483647" in capfd.readouterr().err


@pytest.mark.parametrize("memory", ["0", "-1", "0.0", "nan", "inf", "1e300", "80G"])
def test_memory_that_is_none(memory: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "--model", "qwen3-vl-2b", "--gpus", "1", "--gpu-memory", memory])
    error = capfd.readouterr().err
    assert f"--gpu-memory: {memory} is not a positive number of GiB" in error
    assert max(len(line) for line in error.splitlines()) <= 100
