"""Every YAML file under examples/ is a run configuration, or the base of one, that loads without a problem; or the file
of a sweep, all of whose runs do; or of a suite of benchmarks.

Those of examples/slurm/ come with the batch script that `vppo slurm` writes for them, and a layout that `vppo plan`
says fits. Those of examples/recipes/ are each a model and a method.
"""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from megatron_vppo.cli.main import main
from megatron_vppo.config.load import load_config
from megatron_vppo.evaluation.settings import load_suite
from megatron_vppo.models.hf_config import pixels_per_token
from megatron_vppo.planning.candidate import GIB, Cluster, PlanRequest, Workload
from megatron_vppo.planning.layouts import make_plan
from megatron_vppo.planning.published import PUBLISHED, published_config
from megatron_vppo.setup.by_machine import by_machine
from megatron_vppo.sweep.plan import plan_sweep
from megatron_vppo.sweep.sweep_file import read_sweep_file

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
RECIPES = EXAMPLES / "recipes"
SWEEPS = sorted(EXAMPLES.rglob("sweep*.yaml"))
SUITES = sorted(EXAMPLES.glob("eval/*.yaml"))
CONFIGS = [
    path
    for path in sorted({*EXAMPLES.rglob("*.yaml"), *EXAMPLES.rglob("*.yml")} - {*SWEEPS, *SUITES})
    if path.parent.name != "methods"
]
METHODS = ("vppo", "reference", "dapo", "dapo_penalty", "grpo", "papo_d")
MODELS = {
    "qwen2_5_vl_3b": ("Qwen/Qwen2.5-VL-3B-Instruct", 1),
    "qwen2_5_vl_7b": ("Qwen/Qwen2.5-VL-7B-Instruct", 1),
    "qwen2_5_vl_32b": ("Qwen/Qwen2.5-VL-32B-Instruct", 4),
    "qwen3_vl_8b": ("Qwen/Qwen3-VL-8B-Instruct", 1),
}
"""The recipes: their model on the hub, and their nodes of 8 GPUs."""
READY = {
    "qwen2_5_vl_7b_8gpus": ("Qwen/Qwen2.5-VL-7B-Instruct", 8),
    "qwen3_vl_8b_8gpus": ("Qwen/Qwen3-VL-8B-Instruct", 8),
    "qwen2_5_vl_32b_32gpus": ("Qwen/Qwen2.5-VL-32B-Instruct", 32),
    "qwen2_5_vl_72b_64gpus": ("Qwen/Qwen2.5-VL-72B-Instruct", 64),
}
"""The runs of examples/slurm/: their model on the hub, and their GPUs."""
GPU_GIB = 79.1
"""The least that cards which are sold with 80 GB report."""


def test_the_digits_example_ships_its_configs() -> None:
    assert any(path.is_relative_to(EXAMPLES / "digits_cpu") for path in CONFIGS)


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_shipped_suite_loads(path: Path) -> None:
    assert load_suite(path).benchmarks


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_config_loads(path: Path) -> None:
    config = load_config(path)
    assert config.data.rollout_batch_size % config.actor.global_batch_size == 0


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_sweep_loads(path: Path) -> None:
    sweep = plan_sweep(read_sweep_file(path))
    assert len(sweep.runs) == len(sweep.variants) * len(sweep.seeds) and len(sweep.seeds) > 1


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_shipped_config_sets_nothing_twice_the_same(path: Path) -> None:
    """A file over a base is a small diff: it repeats no value that the base has already."""
    own = yaml.safe_load(path.read_text()) or {}
    bases = own.pop("base", [])
    for base in [bases] if isinstance(bases, str) else bases:
        assert repeated(own, yaml.safe_load((path.parent / base).read_text()) or {}) == []


def repeated(own: dict, base: dict, prefix: str = "") -> list[str]:
    found = []
    for key, value in own.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            found += repeated(value, base[key], f"{prefix}{key}.")
        elif key in base and base[key] == value:
            found.append(f"{prefix}{key}")
    return found


# --- Runs for SLURM ---------------------------------------------------------------------------------------------------


def test_every_ready_run_has_its_two_files() -> None:
    names = {path.name for path in (EXAMPLES / "slurm").iterdir()}
    assert names == {f"{name}.{kind}" for name in READY for kind in ("yaml", "sbatch")}


@pytest.mark.parametrize("name", READY)
def test_a_ready_script_is_what_the_command_writes(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The command in its head writes it again; it would refuse to write over another text."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "bash").symlink_to("/bin/bash")
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch, so no question to it
    script = EXAMPLES / "slurm" / f"{name}.sbatch"
    (command,) = (line for line in script.read_text().splitlines() if line.startswith("# Written by: "))
    program, *words = shlex.split(command.removeprefix("# Written by: "))
    assert program == "vppo" and f"examples/slurm/{name}.yaml" in words
    assert words[words.index("--output") + 1] == f"examples/slurm/{name}.sbatch"
    nodes, gpus = (int(words[words.index(option) + 1]) for option in ("--nodes", "--gpus-per-node"))
    assert nodes * gpus == READY[name][1]
    assert main(words) == 0


@pytest.mark.parametrize("name", READY)
def test_a_ready_layout_is_among_those_that_fit(name: str) -> None:
    config = load_config(EXAMPLES / "slurm" / f"{name}.yaml")
    hub_id, gpus = READY[name]
    assert config.model.path == hub_id
    (model,) = (model.name for model in PUBLISHED.values() if model.hub_id == hub_id)
    hf_config = published_config(model)
    actor, parallel = config.actor, config.parallel
    plan = make_plan(
        PlanRequest(
            hf_config,
            Cluster(gpus=gpus, gpu_bytes=GPU_GIB * GIB, gpus_per_node=8),
            Workload(
                prompt_tokens=config.data.max_prompt_length,
                response_tokens=config.data.max_response_length,
                images_per_row=1,
                image_tokens=config.data.max_pixels // pixels_per_token(hf_config),
                rows_per_micro_batch=4,  # the plan knows no tokens; the dry run counts these micro-batches
                responses_per_prompt=config.rollout.n,
                head_chunk_tokens=by_machine(config, on_gpu=True).head_chunk_tokens,
            ),
            rollout_tensor=config.rollout.tensor_parallel_size,
            engine_sequences=16,
            offload=frozenset(actor.offload),
        )
    )
    layout = (
        parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, parallel.context_parallel_size,
        parallel.data_parallel_size, parallel.recompute, parallel.sequence_parallel, parallel.pipeline_layers,
    )  # fmt: skip
    engines = {
        (c.tensor, c.pipeline, c.context, c.data, c.recompute, c.sequence_parallel, uneven(c.layers)): c.engine
        for c in plan.fitting
    }
    assert layout in engines
    engine = engines[layout]
    assert engine is not None and config.rollout.gpu_memory_utilization <= engine.utilization + 1e-9


def uneven(layers: tuple[int, ...]) -> tuple[int, ...] | None:
    """The value of parallel.pipeline_layers: needed only where the stages differ."""
    return layers if len(set(layers)) > 1 else None


@pytest.mark.parametrize("name", READY)
def test_a_ready_run_has_the_settings_of_the_paper(name: str) -> None:
    """Table 9 of the paper, as far as it goes; the 8B has the numbers of the authors' script, where they differ."""
    config = load_config(EXAMPLES / "slurm" / f"{name}.yaml")
    algorithm, actor, rollout = config.algorithm, config.actor, config.rollout
    assert (config.data.rollout_batch_size, actor.global_batch_size, rollout.n) == (384, 128, 8)
    assert (algorithm.top_p_perception_tokens, algorithm.advantage_scaling_min) == (0.4, 0.9)
    assert (algorithm.clip_ratio_low, algorithm.clip_ratio_high, algorithm.clip_ratio_dual) == (0.2, 0.28, 3.0)
    assert (algorithm.filter_low, algorithm.filter_high, algorithm.loss_avg_mode) == (0.01, 0.99, "token")
    assert (actor.optim.lr, actor.optim.lr_scheduler_type, actor.optim.weight_decay) == (1e-6, "constant", 0.01)
    assert (rollout.temperature, rollout.top_p, rollout.val.temperature, rollout.val.n) == (1.0, 0.99, 1.0, 8)
    assert (config.model.dtype, config.model.freeze, config.data.max_prompt_length) == ("bfloat16", (), 4096)
    assert config.data.max_response_length == {"7b": 2048, "8b": 8192, "32": 4096, "72": 4096}[size_of(name)]
    assert algorithm.entropy_penalty_coef == (0.12 if size_of(name) == "8b" else 0.06)
    assert config.trainer.total_steps == (130 if size_of(name) == "8b" else None)
    assert config.trainer.total_epochs == 2


def size_of(name: str) -> str:
    return name.partition("_vl_")[2][:2]


# --- Recipes ----------------------------------------------------------------------------------------------------------


def test_every_model_has_every_method() -> None:
    folders = {path.name for path in RECIPES.iterdir() if path.is_dir()} - {"methods"}
    assert folders == MODELS.keys()
    for model in MODELS:
        assert {path.stem for path in (RECIPES / model).iterdir()} == set(METHODS)
    assert {path.stem for path in (RECIPES / "methods").iterdir()} == set(METHODS)


@pytest.mark.parametrize("model", MODELS)
def test_methods_differ_in_the_algorithm_alone(model: str) -> None:
    """And in what the preset 'reference' says of rollouts. No two runs share a folder."""
    by_method = {method: load_config(RECIPES / model / f"{method}.yaml").model_dump() for method in METHODS}
    assert {settings["trainer"].pop("experiment_name") for settings in by_method.values()} == {
        f"{model}_{method}" for method in METHODS
    }
    ours = by_method["vppo"]
    assert ours["model"]["path"] == MODELS[model][0] and ours["reward"]["reward_function"] == "math_verify"
    for method, settings in by_method.items():
        other = {section for section in ours if settings[section] != ours[section]} - {"algorithm"}
        assert other == ({"rollout"} if method == "reference" else set())
        algorithm = settings["algorithm"]
        assert (
            algorithm["use_vppo_on_perception"]
            == algorithm["use_advantage_shaping"]
            == (method in ("vppo", "reference"))
        )
        assert algorithm["use_entropy_penalty"] == (method not in ("dapo", "grpo"))
        assert (algorithm["perception_loss_coef"] > 0) == (method == "papo_d")
        assert algorithm["online_filtering"] == (method != "grpo")
        assert algorithm["clip_ratio_high"] == (0.2 if method == "grpo" else 0.28)


@pytest.mark.extended
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.filterwarnings("ignore:When using async grad allreduce:UserWarning")
def test_a_recipe_fits_by_its_dry_run(
    model: str, method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    nodes = MODELS[model][1]
    words = ["train", "--config", f"examples/recipes/{model}/{method}.yaml", "--dry-run", "--nodes", str(nodes)]
    settings = [f"trainer.runs_dir={tmp_path}"]
    assert main([*words, "--gpus-per-node", "8", "--gpu-memory", str(GPU_GIB), *settings]) == 0
    assert "It fits. Nothing was started." in capsys.readouterr().out


@pytest.mark.parametrize("script", ["local.sh", "submit.sh"])
def test_a_script_passes_recipe_and_settings_on(script: str, tmp_path: Path) -> None:
    (tmp_path / "vppo").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "vppo").chmod(0o755)
    done = subprocess.run(
        [RECIPES / script, "qwen2_5_vl_32b/grpo", "trainer.seed=2"], capture_output=True, text=True, check=True,
        cwd=tmp_path, env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
    )  # fmt: skip
    words = done.stdout.split()
    assert words[1:3] == ["--config", "examples/recipes/qwen2_5_vl_32b/grpo.yaml"] and words[-1] == "trainer.seed=2"
    assert words[0] == ("train" if script == "local.sh" else "slurm")
    assert script == "local.sh" or words[words.index("--nodes") + 1] == "4"
