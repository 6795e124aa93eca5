"""Whole configurations: the authors' two runs, and one of nothing but defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_vppo.config.load import load_config
from megatron_vppo.config.schema import RunConfig, Section
from megatron_vppo.importing.import_config import ImportedConfig, import_config
from megatron_vppo.importing.sources import read_source
from tests.importing.authors import make_repository
from tests.importing.least import VPPO, import_keys

ROOT = Path(__file__).resolve().parents[2]


def settings_of(section: Section, prefix: str = "") -> dict[str, Any]:
    """Every setting by its dotted name."""
    found: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        found |= settings_of(value, f"{prefix}{name}.") if isinstance(value, Section) else {f"{prefix}{name}": value}
    return found


# --- The authors' runs ------------------------------------------------------------------------------------------------

EXPECTED_7B = """
data:
  train_files: chamber111/VPPO_ViRL39K_train
  val_files: chamber111/VPPO_MMK12_validation
  format_prompt: examples/format_prompt/math_format_perception.jinja
  max_prompt_length: 4096
  max_response_length: 2048
  min_pixels: 200704
  max_pixels: 1003520
  rollout_batch_size: 384
  num_workers: 16
model:
  path: Qwen/Qwen2.5-VL-7B-Instruct
parallel:
  recompute: full
algorithm:
  preset: reference
  use_vppo_on_perception: true
  use_advantage_shaping: true
  use_entropy_penalty: true
  top_p_perception_tokens: 0.4
  advantage_scaling_min: 0.9
  entropy_penalty_coef: 0.06
  online_filtering: true
  max_try_make_batch: 1000
  reference_devices: 8
actor:
  global_batch_size: 128
  micro_batch_size_per_device_for_update: 16
  micro_batch_size_per_device_for_experience: 16
  offload: [params, grads, optimizer]
  optim: {lr: 0.000001}
rollout:
  n: 8
  top_p: 0.99
  gpu_memory_utilization: 0.9
  enforce_eager: false
  val: {n: 8, top_p: 0.99}
trainer:
  project_name: 7b_vppo
  experiment_name: perc0.4_advsc0.9_pen0.06_ep2_rollout8
  total_epochs: 2
  val_freq: 5
  save_freq: 5
  loggers: [swanlab]
"""


def authors_run(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImportedConfig:
    monkeypatch.chdir(ROOT)
    path = make_repository(tmp_path) / script
    return import_config(read_source(path, [], environment={}), name=script)


def test_the_7b_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = authors_run("train_vppo_7b.sh", tmp_path, monkeypatch)
    assert yaml.safe_load(imported.text) == yaml.safe_load(EXPECTED_7B)
    (tmp_path / "ours.yaml").write_text(imported.text)
    assert load_config(tmp_path / "ours.yaml") == imported.config
    shared = ("seeds", "shared"), ("temperature", 1.0), ("tensor_parallel_size", 1)
    assert [getattr(imported.config.rollout, name) for name, _ in shared] == [value for _, value in shared]
    assert imported.config.reward.reward_function == "mathruler"


def test_the_8b_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the 7B's with its own model, lengths, batches, coefficient and number of steps."""
    imported = authors_run("train_vppo_8b.sh", tmp_path, monkeypatch)
    expected = yaml.safe_load(EXPECTED_7B)
    expected["data"]["max_response_length"] = 8192
    expected["model"]["path"] = "Qwen/Qwen3-VL-8B-Instruct"
    expected["algorithm"]["entropy_penalty_coef"] = 0.12
    expected["actor"]["micro_batch_size_per_device_for_update"] = 4
    expected["actor"]["micro_batch_size_per_device_for_experience"] = 4
    del expected["trainer"]["total_epochs"]
    expected["trainer"] |= {"project_name": "8b_vppo", "experiment_name": "perc0.4_pen0.12", "total_steps": 130}
    assert yaml.safe_load(imported.text) == expected
    assert any("max_num_batched_tokens = 12289" in line for line in imported.differs)


def test_what_differs_in_the_7b_run_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = authors_run("train_vppo_7b.sh", tmp_path, monkeypatch)
    assert sorted(line.partition(":")[0] for line in imported.differs) == [
        "trainer.max_try_make_batch = -1", "trainer.val_generations_to_log = 3",
        "worker.actor.optim.strategy = adamw_bf16", "worker.rollout.gpu_memory_utilization = 0.9",
        "worker.rollout.limit_images = 0",
    ]  # fmt: skip
    assert len(imported.translated) + len(imported.dropped) == 200


def test_settings_stand_in_the_order_of_the_schema_with_comments(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = authors_run("train_vppo_7b.sh", tmp_path, monkeypatch).text
    assert list(yaml.safe_load(text)) == ["data", "model", "parallel", "algorithm", "actor", "rollout", "trainer"]
    assert "  preset: reference  # what the authors' code computes; docs/algorithm.md says how" in text
    assert "  reference_devices: 8  # theirs: 1 x 8 GPUs\n" in text
    assert "  micro_batch_size_per_device_for_experience: 16  # theirs: 32; here both views of a response" in text
    assert "    n: 8\n    top_p: 0.99  # theirs: that of training" in text


# --- Defaults ---------------------------------------------------------------------------------------------------------

EXPECTED_DEFAULTS = """
data:
  train_files: rows.parquet
  val_files: null
  prompt_key: prompt
  max_prompt_length: 512
  max_response_length: 512
  rollout_batch_size: 512
  min_pixels: 262144
  max_pixels: 4194304
  num_workers: 16
model: {path: some/model}
parallel: {recompute: full}
algorithm:
  preset: reference
  use_vppo_on_perception: false
  use_advantage_shaping: false
  use_entropy_penalty: false
  online_filtering: false
  clip_ratio_high: 0.3
actor:
  global_batch_size: 256
  micro_batch_size_per_device_for_update: 4
  max_tokens_per_micro_batch: 4096
  optim: {lr: 0.000001}
rollout:
  n: 2
  top_p: 1.0
  tensor_parallel_size: 2
  gpu_memory_utilization: 0.6
  enforce_eager: false
  val: {n: 1}
trainer:
  project_name: easy_r1
  experiment_name: demo
  total_epochs: 15
  val_freq: -1
  save_freq: -1
  save_limit: -1
  loggers: [wandb]
"""


def test_their_defaults_hold_where_they_are_not_ours(tmp_path: Path) -> None:
    imported = import_keys({}, tmp_path)
    assert yaml.safe_load(imported.text) == yaml.safe_load(EXPECTED_DEFAULTS)


def test_defaults_that_cannot_be_had_are_refused_together(tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text("")
    with pytest.raises(ValueError, match="3 keys cannot be imported; nothing is written") as caught:
        import_config(read_source(tmp_path / "theirs.yaml", [], environment={}), name="theirs.yaml")
    refused = [line.split()[1] for line in str(caught.value).splitlines()[1:]]
    assert sorted(refused) == ["data.train_files", "worker.actor.model.model_path", "worker.reward.reward_function"]


def test_a_value_that_does_not_work_here_names_both_keys(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rollout\.n = 1 \(worker\.rollout\.n\): should be greater than 1"):
        import_keys({"worker.rollout.n": "1"}, tmp_path)
    with pytest.raises(ValueError, match=r"trainer\.experiment_name = 'a/b' \(trainer\.experiment_name\)"):
        import_keys({"trainer.experiment_name": "a/b"}, tmp_path)


def test_everything_else_has_our_default(tmp_path: Path) -> None:
    """A setting that no key of theirs names stays as it is here under the preset."""
    imported = import_keys(VPPO, tmp_path)
    given = {name for line in imported.translated for name in line.partition(" -> ")[2].split(", ")}
    ours = RunConfig.model_validate(
        {"data": {"train_files": "x"}, "model": {"path": "y"}, "algorithm": {"preset": "reference"}}
    )
    defaults, values = settings_of(ours), settings_of(imported.config)
    assert {name for name in values if values[name] != defaults[name]} <= given
    assert len(given) > 50
