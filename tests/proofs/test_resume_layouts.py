"""A run goes on under another layout: with the same weights and the same optimizer state, bit by bit, and then as a run
that had this layout from its beginning. Under the same layout the resumed run has the bits of one that never stopped.

Both are tiny models of four layers. Under each layout a straight run makes two updates and saves after the first; each
pair of layouts loads what the first layout saved under the second, and makes the second update.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_vppo.models.options import ModelOptions
from megatron_vppo.observability.metrics import read_metrics
from megatron_vppo.parallel.checkpoint import load_checkpoint, save_checkpoint
from megatron_vppo.parallel.checkpoint_folder import checkpoint_steps
from megatron_vppo.parallel.layout import Layout
from megatron_vppo.parallel.policy import MegatronPolicy
from tests.gloo import run_gloo
from tests.models.tiny import save_tiny_model, tiny_config, tiny_qwen3_config
from tests.parallel.case import Case
from tests.parallel.optimizer_rig import optimizer_values, update_counts, whole_state
from tests.parallel.policy_rig import OPTIM, make_batch, make_policy, make_responses
from tests.proofs.runs import SHORT, exported, train

RANKS = 4
ROUNDING = 2e-5
"""A share of the norm of each tensor's change. The gradients of a layout are within 1e-5 of transformers' (the table of
docs/layouts.md), so those of two layouts are within twice that of each other."""
ROUNDING_BF16 = 0.1
"""The same in bfloat16, of the change of all tensors together: how far two layouts' gradients are apart."""


@dataclass(frozen=True)
class Setting:
    """A layout of four ranks with its optimizer; ranks that the sizes leave over are data-parallel."""

    case: Case
    distributed: bool = True
    dtype: torch.dtype = torch.float32


INTERLEAVED = ModelOptions(virtual_stages=2, sequence_parallel=True)
IMAGES = ModelOptions(vision_split="images", sequence_parallel=True)
UNEVEN = ModelOptions(pipeline_layers=(1, 3))
FROZEN = ModelOptions(frozen=frozenset({"vision_tower", "projector"}))
TOWER_ONLY = ModelOptions(frozen=frozenset({"language_model"}))
BF16 = torch.bfloat16
SETTINGS = {
    "TP 2 PP 2 interleaved": Setting(Case(tensor=2, pipeline=2, options=INTERLEAVED)),
    "TP 2 CP 2 images": Setting(Case(tensor=2, context=2, options=IMAGES)),
    "PP 2 uneven DP 2": Setting(Case(pipeline=2, options=UNEVEN)),
    "DP 4": Setting(Case(overlap=True)),
    "DP 4 ordinary": Setting(Case(), distributed=False),
    "TP 2 DP 2 ordinary": Setting(Case(tensor=2), distributed=False),
    "PP 2 interleaved DP 2 ordinary": Setting(
        Case(pipeline=2, options=ModelOptions(virtual_stages=2), overlap=True), distributed=False
    ),
    "CP 2 DP 2 frozen": Setting(Case(context=2, options=FROZEN)),
    "TP 2 PP 2 frozen": Setting(Case(tensor=2, pipeline=2, options=FROZEN)),
    "PP 2 DP 2 tower only": Setting(Case(pipeline=2, options=TOWER_ONLY, overlap=True)),
    "TP 2 DP 2 tower only ordinary": Setting(Case(tensor=2, options=TOWER_ONLY), distributed=False),
    "TP 2 PP 2 interleaved bf16": Setting(Case(tensor=2, pipeline=2, options=INTERLEAVED), dtype=BF16),
    "TP 2 CP 2 images bf16": Setting(Case(tensor=2, context=2, options=IMAGES), dtype=BF16),
    "DP 4 bf16": Setting(Case(), dtype=BF16),
    "DP 4 ordinary bf16": Setting(Case(), distributed=False, dtype=BF16),
}
MODELS = {
    "Qwen2.5-VL": tiny_config(tied=True, vocab=299, num_hidden_layers=4),
    "Qwen3-VL": tiny_qwen3_config(tied=False, vocab=301, taps=(1,), num_hidden_layers=4),
}
"""Vocabularies that two tensor-parallel ranks pad."""

Pair = tuple[str, str]
"""The layout that saves, and the one that goes on."""


@dataclass(frozen=True)
class Straight:
    """Two updates in a row."""

    saved: dict[str, dict[str, Tensor]]
    """The state after the first."""
    trained: dict[str, Tensor]
    """The weights that the optimizer steps on, after the second."""


def _policy(folder: Path, layout: Layout, setting: Setting) -> MegatronPolicy:
    optim = dataclasses.replace(
        OPTIM, use_distributed_optimizer=setting.distributed, overlap_grad_reduce=setting.case.overlap
    )
    return make_policy(folder, layout, rows=2, optim=optim, options=setting.case.options, dtype=setting.dtype)


def _straight(policy: MegatronPolicy, place: Path) -> Straight:
    batch = make_batch(make_responses(), "nll")
    policy.update(batch)
    save_checkpoint(place, step=1, trainable=policy.trainable, layout=policy.layout, state={}, keep=1)
    saved = whole_state(policy)
    policy.update(batch)
    return Straight(saved, optimizer_values(policy, "param"))


@dataclass(frozen=True)
class Found:
    differing: list[str]
    """The parts of the state that are not bit for bit as they were saved."""
    is_exact: bool
    """True if the second update has the bits of the straight run of this layout."""
    error: float
    """Its difference from that, relative to what the update changes: the largest of a tensor; in bfloat16 of all."""


def _resumed(policy: MegatronPolicy, place: Path, saved: Straight, straight: Straight) -> Found:
    load_checkpoint(place, step=1, trainable=policy.trainable, layout=policy.layout)
    state = whole_state(policy)
    assert state.keys() == saved.saved.keys()
    differing = [
        f"{quantity} of {name}"
        for quantity, tensors in saved.saved.items()
        for name, tensor in tensors.items()
        if not torch.equal(tensor, state[quantity][name])
    ]
    differing += [f"{count} updates" for count in update_counts(policy) - {1.0}]
    policy.update(make_batch(make_responses(), "nll"))
    trained = optimizer_values(policy, "param")
    is_exact = all(torch.equal(trained[name], tensor) for name, tensor in straight.trained.items())
    before = straight.saved["param"]
    names = [name for name in trained if not torch.equal(straight.trained[name], before[name])]
    assert names, "nothing was trained"
    groups = [[name] for name in names] if policy.trainable.config.params_dtype == torch.float32 else [names]
    error = max(_norm(straight.trained, trained, group) / _norm(straight.trained, before, group) for group in groups)
    return Found(differing, is_exact, error)


def _norm(left: dict[str, Tensor], right: dict[str, Tensor], names: list[str]) -> float:
    return float(torch.cat([(left[name].double() - right[name]).flatten() for name in names]).norm())


def _rank(rank: int, world: int, folder: Path, place: Path, pairs: list[Pair]) -> dict[Pair, Found]:
    straight: dict[str, Straight] = {}
    for name in dict.fromkeys(name for pair in pairs for name in pair):
        layout = SETTINGS[name].case.open()
        straight[name] = _straight(_policy(folder, layout, SETTINGS[name]), place / name)
        parallel_state.destroy_model_parallel()
    found = {}
    for saved, name in pairs:
        layout = SETTINGS[name].case.open()
        policy = _policy(folder, layout, SETTINGS[name])
        found[saved, name] = _resumed(policy, place / saved, straight[saved], straight[name])
        parallel_state.destroy_model_parallel()
    return found


A, B, C, D, E, F, G = list(SETTINGS)[:7]
TOWER, TOWER_ORDINARY = "PP 2 DP 2 tower only", "TP 2 DP 2 tower only ordinary"
FROZEN_CP, FROZEN_TP = "CP 2 DP 2 frozen", "TP 2 PP 2 frozen"
PAIRS: dict[str, dict[str, list[Pair]]] = {
    "Qwen2.5-VL": {
        "telling": [(A, A), (A, E), (TOWER, TOWER)],
        "twelve": [(A, B), (A, D), (B, C), (B, G), (C, B), (C, F), (D, A), (D, E), (E, D), (E, G), (F, C), (G, A)],
        "same": [(name, name) for name in SETTINGS if name not in (A, TOWER)],
        "parts": [(FROZEN_CP, FROZEN_TP), (FROZEN_TP, FROZEN_CP), (TOWER, TOWER_ORDINARY), (TOWER_ORDINARY, TOWER)],
        "bf16": [(f"{saved} bf16", f"{name} bf16") for saved, name in ((A, E), (E, B), (B, D), (D, A))],
    },
    "Qwen3-VL": {
        "telling": [(f"{B} bf16", f"{B} bf16"), (f"{B} bf16", f"{E} bf16"), (FROZEN_CP, FROZEN_CP)],
        "twelve": [(A, C), (A, E), (B, A), (B, F), (C, A), (C, D), (D, B), (D, G), (E, A), (F, B), (F, G), (G, D)],
        "same": [(name, name) for name in SETTINGS if name not in (f"{B} bf16", FROZEN_CP)],
        "parts": [(FROZEN_CP, FROZEN_TP), (FROZEN_TP, FROZEN_CP), (TOWER, TOWER_ORDINARY), (TOWER_ORDINARY, TOWER)],
        "bf16": [(f"{saved} bf16", f"{name} bf16") for saved, name in ((A, B), (B, E), (E, D), (D, A))],
    },
}


UNMARKED = ("Qwen2.5-VL", "telling")


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("model", "which"),
    [
        pytest.param(model, which, marks=[] if (model, which) == UNMARKED else [pytest.mark.extended, pytest.mark.slow])
        for model, groups in PAIRS.items()
        for which in groups
    ],
)
def test_a_run_goes_on_under_another_layout(model: str, which: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", MODELS[model])
    pairs = PAIRS[model][which]
    for found in run_gloo(_rank, RANKS, tmp_path / "model", tmp_path / "saved", pairs, timeout_seconds=1200):
        assert list(found) == pairs
        for (saved, name), result in found.items():
            where = f"{saved} -> {name}: {result}"
            assert not result.differing, where
            assert result.is_exact or saved != name, where
            assert result.error < (ROUNDING if SETTINGS[name].dtype == torch.float32 else ROUNDING_BF16), where


@pytest.mark.slow
@pytest.mark.extended
def test_the_program_goes_on_under_another_layout_and_starts_another_run(digits: Path, tmp_path: Path) -> None:
    """Two steps on two pipeline stages; then two more on two tensor-parallel ranks, in the same folder and by a new run
    that is given the checkpoint."""
    sizes = ("parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=1")
    other = (*(setting for setting in SHORT if not setting.startswith("parallel.")), *sizes)
    first = train(digits, tmp_path, "first", *SHORT, "trainer.total_steps=2", "trainer.save_limit=-1")
    given = first / "checkpoints" / "global_step_2"
    new = train(digits, tmp_path, "new", *other, f"trainer.load_checkpoint_path={given}")
    train(digits, tmp_path, "first", *other, "trainer.save_limit=-1")
    assert checkpoint_steps(first / "checkpoints") == [2, 4] and checkpoint_steps(new / "checkpoints") == [4]
    assert [line["step"] for line in read_metrics(first)] == [1, 2, 3, 4]
    assert [line["step"] for line in read_metrics(new)] == [3, 4]
    gone_on, started = exported(first, 4), exported(new, 4)
    assert gone_on.keys() == started.keys()
    assert all(torch.equal(gone_on[name], started[name]) for name in gone_on)
    assert any(not torch.equal(gone_on[name], weight) for name, weight in exported(first, 2).items())
    assert json.loads((new / "checkpoints" / "best.json").read_text())["step"] == 4
