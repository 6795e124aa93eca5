"""The file of a sweep: what its variants are, and what is refused, all at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vppo.sweep.sweep_file import SweepFile, Variant, read_sweep_file


def read(folder: Path, text: str) -> SweepFile:
    path = folder / "lr.yaml"
    path.write_text(text)
    return read_sweep_file(path)


def test_variants_and_their_settings(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        """
        config: base.yaml
        overrides: [trainer.val_freq=2]
        seeds: [3, 1]
        variants:
          vppo:
          dapo: [algorithm.use_vppo_on_perception=false, "actor.optim.betas=[0.9, 0.95]"]
          grpo: {config: ../grpo.yaml, overrides: [rollout.n=4]}
        baseline: dapo
        """,
    )
    assert (found.name, found.seeds, found.baseline) == ("lr", (3, 1), "dapo")
    assert found.variants == (
        Variant("vppo", tmp_path / "base.yaml", ("trainer.val_freq=2",)),
        Variant(
            "dapo", tmp_path / "base.yaml",
            ("trainer.val_freq=2", "algorithm.use_vppo_on_perception=false", "actor.optim.betas=[0.9, 0.95]"),
        ),
        Variant("grpo", tmp_path / "../grpo.yaml", ("trainer.val_freq=2", "rollout.n=4")),
    )  # fmt: skip


def test_a_grid_is_every_combination_named_by_its_values(tmp_path: Path) -> None:
    grid = "grid: {actor.optim.betas: [[0.9, 0.95]], algorithm.preset: [global, reference], actor.optim.lr: [1e-6]}"
    found = read(tmp_path, f"config: base.yaml\nname: a\nseeds: [1]\n{grid}")
    assert [(variant.name, variant.overrides) for variant in found.variants] == [
        (f"betas_0.9_0.95-preset_{preset}-lr_1e-06",
         ("actor.optim.betas=[0.9, 0.95]", f'algorithm.preset="{preset}"', "actor.optim.lr=1e-06"))
        for preset in ("global", "reference")
    ]  # fmt: skip
    assert found.baseline == found.variants[0].name and found.name == "a"
    both = read(tmp_path, "config: b.yaml\nseeds: [1]\nvariants: {x: [], y: []}\ngrid: {rollout.n: [4, 8]}")
    assert [variant.name for variant in both.variants] == ["x-n_4", "x-n_8", "y-n_4", "y-n_8"]


WHOLE = "config: b.yaml\nseeds: [1]\nvariants: {x: [], y: []}\n"
SEEDS = "config: b.yaml\nvariants: {x: []}\nseeds: "
ONE = "config: b.yaml\nseeds: [1]\n"


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        (WHOLE + "baselin: x", ["baselin is no key; did you mean baseline?"]),
        (WHOLE + "colour: x", ["colour is no key; there are name, config, "]),
        (ONE + "variants: {x: {overides: []}}", ["overides is no key; did you mean overrides?"]),
        ("seeds: [1]\nvariants: {x: []}", ["config must be set"]),
        ("config: b.yaml\nvariants: {x: []}", ["seeds must be set"]),
        (SEEDS + "[]", ["seeds = []"]),
        (SEEDS + "[-1, 1.5, yes]", ["seeds.0 = -1", "seeds.1 = 1.5", "seeds.2 = True"]),
        (SEEDS + "[1, 2, 1]", ["seeds: 1 is there twice"]),
        (ONE, ["variants and grid are both empty"]),
        (ONE + "variants: {x: [3]}", ["variants.x.overrides.0 = 3: should be"]),
        (ONE + "grid: {rollout.n: []}", ["grid.rollout.n = []"]),
        (ONE + "grid: {rollout.n: [4, 4]}", ["variants: n_4 is there twice"]),
        (WHOLE + "baseline: z", ["baseline: 'z' is no variant; there are x, y"]),
        (WHOLE + "name: a/b", ["'a/b' names a folder"]),
        (ONE + "variants: {'-x y': []}", ["'-x y' names a folder"]),
        (WHOLE + "overrides: [trainer.seed=3]\nname: ..", ["2 problems", "'trainer.seed=3': the sweep", "'..' n"]),
        ("- x", ["holds no sections"]),
        ("a: [", ["lr.yaml is not valid YAML"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_what_to_write(tmp_path: Path, text: str, messages: list[str]) -> None:
    with pytest.raises(ValueError) as refused:
        read(tmp_path, text)
    assert str(tmp_path / "lr.yaml") in str(refused.value)
    assert [message for message in messages if message not in str(refused.value)] == []


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no sweep file"):
        read_sweep_file(tmp_path / "none.yaml")
