"""The folder of an evaluation: who may go on with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_vppo.evaluation.folder import EvalSettings, claimed, read_settings, take_over
from megatron_vppo.evaluation.settings import EvalConfig, load_suite
from tests.evaluation.suites import SETTINGS, record, write_records


def settings(
    folder: Path, *names: str, fingerprint: str = "f", template: str | None = None, **benchmark: Any
) -> EvalSettings:
    benchmarks = [{"name": name, "source": "rows", "path": f"{name}.jsonl", **benchmark} for name in names]
    (folder / "suite.yaml").write_text(yaml.safe_dump({**SETTINGS, "benchmarks": benchmarks}))
    return EvalSettings("/m", fingerprint, template, load_suite(folder / "suite.yaml"))


def changed(one: EvalSettings, **rollout: Any) -> EvalSettings:
    values = one.config.model_dump()
    values["rollout"] |= rollout
    return replace(one, config=EvalConfig.model_validate(values))


def take_over_and_record(out: Path, one: EvalSettings) -> None:
    take_over(out, one)
    write_records(out, "a", [record("0", "d", 0, 1.0)])


def test_settings_are_read_back(tmp_path: Path) -> None:
    ours = settings(tmp_path, "a", "b", template="t")
    take_over(tmp_path, ours)
    assert read_settings(tmp_path) == ours


def test_other_settings_are_refused_with_both_values(tmp_path: Path) -> None:
    ours = settings(tmp_path, "a")
    take_over_and_record(tmp_path, ours)
    take_over(tmp_path, changed(ours, num_engines=4, gpu_memory_utilization=0.5))
    with pytest.raises(ValueError, match=r"rollout\.temperature was 1\.0 and is 0\.5"):
        take_over(tmp_path, changed(ours, temperature=0.5))
    with pytest.raises(ValueError, match=r"the model was /m \(f\) and is /m \(g\)"):
        take_over(tmp_path, settings(tmp_path, "a", fingerprint="g"))
    with pytest.raises(ValueError, match=r"the digest of data\.format_prompt was None and is 't'"):
        take_over(tmp_path, settings(tmp_path, "a", template="t"))
    with pytest.raises(ValueError, match=r"grader of benchmark a was None and is 'choice'"):
        take_over(tmp_path, settings(tmp_path, "a", grader="choice"))


def test_benchmarks_come_and_go(tmp_path: Path) -> None:
    """One that is left out and comes back still has to be the same."""
    take_over_and_record(tmp_path, settings(tmp_path, "a"))
    take_over(tmp_path, settings(tmp_path, "a", "b"))
    take_over(tmp_path, settings(tmp_path, "b"))
    assert [one.name for one in read_settings(tmp_path).config.benchmarks] == ["a", "b"]
    with pytest.raises(ValueError, match="image_key of benchmark a was 'images' and is 'image'"):
        take_over(tmp_path, settings(tmp_path, "a", image_key="image"))


def test_settings_may_change_until_a_response_is_recorded(tmp_path: Path) -> None:
    """Engines that never sampled leave empty files."""
    ours = settings(tmp_path, "a", "b")
    take_over(tmp_path, ours)
    write_records(tmp_path, "a", [])
    other = settings(tmp_path, "a", fingerprint="g", grader="choice")
    take_over(tmp_path, other)
    assert read_settings(tmp_path) == other


def test_a_mark_of_selection_may_come_later(tmp_path: Path) -> None:
    take_over_and_record(tmp_path, settings(tmp_path, "a"))
    take_over(tmp_path, settings(tmp_path, "a", selection_leak=True))
    assert read_settings(tmp_path).config.benchmarks[0].selection_leak


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    with claimed(tmp_path / "new"), pytest.raises(ValueError, match="another evaluation is writing"):  # noqa: SIM117
        with claimed(tmp_path / "new"):
            pass
    with claimed(tmp_path / "new"):
        pass


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no evaluation"):
        read_settings(tmp_path)
    (tmp_path / "settings.yaml").write_text("model_folder: 3\n")
    with pytest.raises(ValueError, match=r"settings\.yaml is not what an evaluation writes"):
        read_settings(tmp_path)
