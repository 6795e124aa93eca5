"""The file of a suite: what a preset sets, what has to be written out, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_vppo.evaluation.settings import EvalConfig, differing_settings, load_suite
from tests.evaluation.suites import SETTINGS

PAPER = {"preset": "paper"}
ONE = {"benchmarks": [{"name": "a", "source": "sharegpt", "path": "a.json"}]}


def load(folder: Path, content: dict[str, Any], *overrides: str) -> EvalConfig:
    (folder / "suite.yaml").write_text(yaml.safe_dump(content))
    return load_suite(folder / "suite.yaml", overrides)


def refusal(folder: Path, content: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        load(folder, content, *overrides)
    return str(caught.value)


def test_the_papers_protocol(tmp_path: Path) -> None:
    """avg@8 at temperature 1.0 and top-p 1.0, 2048 tokens, the pixels of training (arXiv 2510.09285)."""
    config = load(tmp_path, {"preset": "paper", **ONE})
    rollout, data = config.rollout, config.data
    assert (rollout.n, rollout.temperature, rollout.top_p, rollout.top_k) == (8, 1.0, 1.0, -1)
    assert (data.max_response_length, data.min_pixels, data.max_pixels) == (2048, 200704, 1003520)
    assert config.benchmarks[0].grader == "mathruler"


def test_papo_evals_protocol(tmp_path: Path) -> None:
    """Its programs sample with top-k 50, which no script overrides, and show 768 x 768 pixels."""
    config = load(tmp_path, {"preset": "papo-eval", **ONE})
    rollout, data = config.rollout, config.data
    assert (rollout.n, rollout.temperature, rollout.top_p, rollout.top_k) == (8, 1.0, 1.0, 50)
    assert (data.max_response_length, data.max_pixels, data.min_pixels) == (1024, 768 * 768, 32 * 32)


def test_what_is_written_out_wins(tmp_path: Path) -> None:
    own = {"preset": "paper", "rollout": {"top_k": 3}, "data": {"max_pixels": 50176, "min_pixels": 784}}
    graded = {"benchmarks": [{**ONE["benchmarks"][0], "grader": "choice"}]}
    config = load(tmp_path, {**own, **graded}, "rollout.n=2")
    assert (config.rollout.top_k, config.data.max_pixels, config.rollout.n) == (3, 50176, 2)
    assert config.data.max_response_length == 2048
    assert config.benchmarks[0].grader == "choice"


def test_without_a_preset_nothing_that_decides_on_responses_has_a_default(tmp_path: Path) -> None:
    message = refusal(tmp_path, ONE)
    lengths = "data.max_prompt_length and data.max_response_length and data.min_pixels and data.max_pixels must be set"
    assert lengths in message
    assert "rollout.n and rollout.temperature and rollout.top_p and rollout.top_k must be set" in message
    config = load(tmp_path, {**SETTINGS, **ONE})
    assert config.benchmarks[0].grader is None and config.rollout.gpu_memory_utilization == 0.9


@pytest.mark.parametrize(
    ("content", "overrides", "expected"),
    [
        ({"preset": "papre", **ONE}, (), "preset = 'papre'"),
        ({**PAPER, **ONE}, ("rollout.temprature=1",), "did you mean rollout.temperature?"),
        ({**PAPER, **ONE}, ("trainer.seed=1",),
         "trainer (override 'trainer.seed=1') is no setting; the sections are preset, seed,"),
        ({**PAPER, "benchmarks": [{"name": "a", "sorce": "rows"}]}, (),
         "benchmarks[0].sorce ({file}) is no setting; did you mean source?"),
        ({**PAPER, "benchmarks": [{"name": "a", "source": "rows"}]}, (),
         "benchmarks[0].path ({file}) must be set"),
        ({**PAPER, "benchmarks": [{**ONE["benchmarks"][0], "grader": "judge"}]}, (),
         "benchmarks[0].grader = 'judge' ({file}): should be 'mathruler'"),
        ({**PAPER, "benchmarks": []}, (), "benchmarks is empty"),
        ({**PAPER, "benchmarks": ONE["benchmarks"] * 2}, (), "benchmarks: a is there twice"),
        ({**PAPER, "benchmarks": [{**ONE["benchmarks"][0], "name": "../a"}]}, (), "'../a' names a file"),
        ({**PAPER, **ONE}, ("rollout.temperature=0",), "gives rollout.n=8 equal samples"),
        ({**PAPER, **ONE}, ("rollout.temperature=0.001",), "rollout.temperature=0.001: vLLM"),
        ({**PAPER, **ONE}, ("rollout.top_k=0",), "rollout.top_k=0; set -1"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, content: dict[str, Any], overrides: tuple[str, ...], expected: str) -> None:
    assert expected.replace("{file}", str(tmp_path / "suite.yaml")) in refusal(tmp_path, content, *overrides)


def test_settings_that_differ(tmp_path: Path) -> None:
    """Engines and workers make no difference, nor does a preset whose values are written out."""
    content = {"preset": "paper", **ONE}
    config = load(tmp_path, content)
    machine = load(tmp_path, content, "rollout.num_engines=2", "rollout.max_num_seqs=9", "reward.num_workers=3")
    assert list(differing_settings(config, machine)) == []
    assert list(differing_settings(config, config.model_copy(update={"preset": None}))) == []
    other = load(tmp_path, content, "seed=2", "rollout.temperature=0.5", "reward.timeout_seconds=3")
    assert list(differing_settings(config, other)) == [
        ("seed", 1, 2), ("rollout.temperature", 1.0, 0.5), ("reward.timeout_seconds", 10.0, 3.0),
    ]  # fmt: skip
