"""Log-probs, hidden states and gradients of every parameter, against transformers, for every split of the model."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from safetensors.torch import load_file, save_file

from megatron_vppo.models.families import family_of, weight_map
from megatron_vppo.parallel.layout import init_layout
from megatron_vppo.weights.kinds import merge
from tests.gloo import run_gloo
from tests.models.tiny import Expected, save_tiny_model, tiny_config, tiny_qwen3_config, transformers_says
from tests.proofs.stage_run import ONE_BY_ONE, PACKED, StageResult, load, run

LOGP_TOLERANCE = 1e-5
HIDDEN_TOLERANCE = 1e-4
"""Hidden states are larger than log-probs: about 10 at most."""
GRADIENT_TOLERANCE = 1e-4
"""Relative, of each tensor's norm."""

TIMEOUT_SECONDS = 600.0
"""Starting four processes on two busy cores takes minutes; the comparison itself takes seconds."""

PADDING = 79
"""A token that the rows hold three times. As `pad_token_id` it leaves its embedding without a gradient."""

MODELS = {
    "untied": tiny_config(tied=False, vocab=301),
    "tied": tiny_config(tied=True, vocab=299, pad_token_id=PADDING),
    "Qwen3 untied": tiny_qwen3_config(tied=False, vocab=301, taps=(0, 2), pad_token_id=PADDING),
    "Qwen3 tied": tiny_qwen3_config(tied=True, vocab=299, taps=(1,)),
}
"""No vocabulary is divisible by 2."""
SPLITS = {"untied": (2, 1), "tied": (1, 2), "Qwen3 untied": (2, 1), "Qwen3 tied": (1, 2)}
"""Uneven pipeline stages of three layers."""
RUNS = {
    "packed": (PACKED, "none"),
    "one by one": (ONE_BY_ONE, "none"),
    "packed, recomputed": (PACKED, "full"),
    "packed, attention recomputed": (PACKED, "selective"),
}

ROUNDED = ("tied", "Qwen3 untied")
"""Also run in bfloat16."""

Case = tuple[str, str]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Expected]]:
    made = {}
    for name, config in MODELS.items():
        folder = tmp_path_factory.mktemp(name.replace(" ", "_"))
        save_tiny_model(folder, config)
        made[name] = (folder, transformers_says(folder))
    return made


def _rank(
    rank: int, world: int, layouts: list[tuple[int, int]], folders: dict[str, Path]
) -> dict[tuple[int, int], dict[Case, StageResult]]:
    results: dict[tuple[int, int], dict[Case, StageResult]] = {}
    for tensor, pipeline in layouts:
        layout = init_layout(tensor=tensor, pipeline=pipeline, timeout_seconds=300)
        results[tensor, pipeline] = {}
        for name, folder in folders.items():
            for case, (micro_batches, recompute) in RUNS.items():
                split = SPLITS[name] if pipeline > 1 else None
                model = load(folder, layout, pipeline_layers=split, recompute=recompute)
                repeats = Counter(row for members in micro_batches for row in members)
                results[tensor, pipeline][name, case] = run(
                    model, micro_batches, vocab=MODELS[name].text_config.vocab_size, repeats=dict(repeats)
                )
        parallel_state.destroy_model_parallel()
    return results


@pytest.mark.distributed
@pytest.mark.parametrize(
    "layouts",
    [
        pytest.param([(1, 1)], id="one"),
        pytest.param([(2, 1), (1, 2)], id="two ranks", marks=pytest.mark.extended),
        pytest.param([(2, 2)], id="four ranks", marks=pytest.mark.extended),
    ],
)
def test_equals_transformers(layouts: list[tuple[int, int]], models: dict[str, tuple[Path, Expected]]) -> None:
    world = layouts[0][0] * layouts[0][1]
    folders = {name: folder for name, (folder, _) in models.items()}
    by_rank = run_gloo(_rank, world, layouts, folders, timeout_seconds=TIMEOUT_SECONDS)
    for tensor, pipeline in layouts:
        for name, (_, expected) in models.items():
            for case in RUNS:
                results = [ranks[tensor, pipeline][name, case] for ranks in by_rank]
                where = f"TP {tensor} PP {pipeline} {name} {case}"
                _compare(results, expected, tensor=tensor, pipeline=pipeline, name=name, where=where)


def _compare(
    results: list[StageResult], expected: Expected, *, tensor: int, pipeline: int, name: str, where: str
) -> None:
    assert [problem for result in results for problem in result.problems] == [], where
    for result in results[tensor * (pipeline - 1) :]:  # ranks of the last stage
        assert sorted(result.logps) == list(range(len(expected.logps)))
        for row, logps in result.logps.items():
            assert (logps - expected.logps[row]).abs().max() < LOGP_TOLERANCE, f"{where}: log-probs of row {row}"
            off = (result.hidden[row] - expected.hidden[row]).abs().max()
            assert off < HIDDEN_TOLERANCE, f"{where}: hidden states of row {row}"
    stages = SPLITS[name] if pipeline > 1 else (3,)
    compared = set()
    for entry in weight_map(MODELS[name], family=family_of(MODELS[name])):
        if entry.is_copy and pipeline == 1:
            continue
        stage = entry.stage(stages)
        shards = [
            r.gradients[f"{entry.template} {entry.layer}"] for r in results[stage * tensor : (stage + 1) * tensor]
        ]
        if entry.kind.partition_dim is None:
            assert all(torch.equal(shards[0], other) for other in shards), f"{where}: {entry.template} differs by rank"
        for hf_name, gradient in zip(entry.hf_names, merge(entry.kind, torch.stack(shards)), strict=True):
            reference = expected.gradients[hf_name]
            assert reference.norm() > 1e-3, f"{hf_name} hardly matters in this test"
            relative = (gradient - reference).norm() / reference.norm()
            assert relative < GRADIENT_TOLERANCE, f"{where}: gradient of {hf_name}, layer {entry.layer}: {relative:.1e}"
            compared.add(hf_name)
    assert compared == expected.gradients.keys()


def _alone(rank: int, world: int, folders: dict[str, Path], resaved: Path) -> dict[str, Any]:
    layout = init_layout(tensor=1, pipeline=1, timeout_seconds=300)
    with torch.device("meta"):  # transformers loads models so; adapting torch for Megatron must not break it
        assert torch.arange(3).is_meta
        assert torch.empty(3).is_meta
    rows = dict(Counter(range(6)))
    rounded = {}
    for name in ROUNDED:
        model = load(folders[name], layout, dtype=torch.bfloat16, recompute="full")
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        vocab = MODELS[name].text_config.vocab_size
        rounded[name] = run(model, ONE_BY_ONE, vocab=vocab, repeats=rows).logps
    original, again = (dict(load(folder, layout).named_parameters()) for folder in (folders["untied"], resaved))
    return {
        "bfloat16": rounded,
        "different": [name for name in original if not torch.equal(original[name], again[name])],
    }


@pytest.mark.distributed
def test_bfloat16_and_other_files(models: dict[str, tuple[Path, Expected]], tmp_path: Path) -> None:
    """A model in bfloat16 is near; a checkpoint in several files, with transformers' names in memory, loads alike."""
    folders = {name: folder for name, (folder, _) in models.items()}
    _resave(folders["untied"], tmp_path)
    (found,) = run_gloo(_alone, 1, folders, tmp_path, timeout_seconds=TIMEOUT_SECONDS)
    assert found["different"] == []
    for name, logps in found["bfloat16"].items():
        expected = models[name][1].logps
        off = torch.cat([(logps[row].float() - expected[row]).abs() for row in logps])
        assert off.mean() < 0.05, name
        assert off.max() < 0.5, name


def _resave(folder: Path, target: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    renamed = {
        name.replace("visual.", "model.visual.", 1)
        if name.startswith("visual.")
        else name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in tensors.items()
    }
    names = sorted(renamed)
    files = {f"model-0000{part}-of-00003.safetensors": names[part - 1 :: 3] for part in (1, 2, 3)}
    for file, members in files.items():
        save_file({name: renamed[name] for name in members}, target / file)
    index = {name: file for file, members in files.items() for name in members}
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    shutil.copy(folder / "config.json", target)
