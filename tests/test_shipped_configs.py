"""Every YAML file under examples/ is a run configuration, or the base of one, that loads without a problem."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_vppo.config.load import load_config

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
CONFIGS = sorted([*EXAMPLES.rglob("*.yaml"), *EXAMPLES.rglob("*.yml")])


def test_the_digits_example_ships_its_configs() -> None:
    assert any(path.is_relative_to(EXAMPLES / "digits_cpu") for path in CONFIGS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_config_loads(path: Path) -> None:
    config = load_config(path)
    assert config.data.rollout_batch_size % config.actor.global_batch_size == 0


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_shipped_config_sets_nothing_twice_the_same(path: Path) -> None:
    """A file over a base is a small diff: it repeats no value that the base has already."""
    own = yaml.safe_load(path.read_text()) or {}
    if "base" not in own:
        return
    base = yaml.safe_load((path.parent / own.pop("base")).read_text()) or {}
    assert repeated(own, base) == []


def repeated(own: dict, base: dict, prefix: str = "") -> list[str]:
    found = []
    for key, value in own.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            found += repeated(value, base[key], f"{prefix}{key}.")
        elif key in base and base[key] == value:
            found.append(f"{prefix}{key}")
    return found
