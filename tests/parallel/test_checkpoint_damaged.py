"""A damaged checkpoint is refused with the file and what is wrong with it, before anything of it is loaded."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vppo.config.choices import ModelPart
from megatron_vppo.models.options import ModelOptions
from megatron_vppo.parallel.checkpoint import LATEST, check_checkpoint, load_checkpoint, save_checkpoint
from megatron_vppo.parallel.layout import Layout, init_layout, single_rank
from megatron_vppo.parallel.policy import MegatronPolicy
from tests.gloo import run_gloo
from tests.models.tiny import save_tiny_model, tiny_config
from tests.parallel.damage import (
    DESCRIPTIONS,
    FILES,
    MAIN,
    MOMENT,
    NORM,
    PLACE,
    STATES,
    STEPS,
    Spoil,
    description,
    save_run,
    with_value,
)
from tests.parallel.optimizer_rig import update_counts, whole_state
from tests.parallel.policy_rig import make_batch, make_policy, make_responses

NEWEST = STEPS[-1]


@dataclass(frozen=True)
class Saved:
    """A run of one rank with checkpoints, and a policy that nothing has been loaded into."""

    model: Path
    checkpoints: Path
    layout: Layout
    policy: MegatronPolicy

    def damaged(self, place: Path, spoil: Spoil) -> Path:
        """Copies the checkpoints to `place` and damages the newest one."""
        shutil.copytree(self.checkpoints, place)
        spoil(place / f"global_step_{NEWEST}")
        return place

    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.policy.hf_weights()}


def bfloat16_policy(model: Path, layout: Layout) -> MegatronPolicy:
    """Its weights and those of the optimizer are different memory. In float32 they are the same, and a number that is
    none in one of the two files may be read over by the other.
    """
    return make_policy(model, layout, rows=2, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    root = tmp_path_factory.mktemp("run")
    save_tiny_model(root / "model", tiny_config(tied=False, vocab=299))
    with single_rank() as layout:
        save_run(root / "checkpoints", bfloat16_policy(root / "model", layout), layout)
        yield Saved(root / "model", root / "checkpoints", layout, bfloat16_policy(root / "model", layout))


DAMAGE = {
    f"{kind}: {name}": case
    for kind, cases in {"files": FILES, "descriptions": DESCRIPTIONS, "state": STATES}.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named_and_nothing_is_loaded(what: str, run: Saved, tmp_path: Path) -> None:
    spoil, message = DAMAGE[what]
    place = run.damaged(tmp_path / "checkpoints", spoil)
    before = run.weights()
    with pytest.raises(ValueError, match=message) as refused:
        load_checkpoint(place, step=NEWEST, trainable=run.policy.trainable, layout=run.layout)
    assert "\n" not in str(refused.value) and str(place / f"global_step_{NEWEST}") in str(refused.value)
    after = run.weights()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    check_checkpoint(place, step=STEPS[0], trainable=run.policy.trainable, layout=run.layout)


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("-inf"), "infinity")])
def test_a_weight_that_is_no_number_is_named_with_its_file(value: float, word: str, run: Saved, tmp_path: Path) -> None:
    layer = "language.decoder.layers.mlp.linear_fc1.weight"
    for key, name in ((NORM, NORM), (layer, rf"{layer} \(layer \d\)")):
        place = run.damaged(tmp_path / key, with_value(value, key))
        with pytest.raises(ValueError, match=rf"^{name} in \S+/global_step_4/dist_ckpt/__0_\d\.distcp holds {word}$"):
            load_checkpoint(place, step=NEWEST, trainable=run.policy.trainable, layout=run.layout)


@pytest.mark.parametrize("key", [MOMENT, MAIN])
def test_a_number_of_the_optimizer_that_is_none(key: str, run: Saved, tmp_path: Path) -> None:
    place = run.damaged(tmp_path / "checkpoints", with_value(float("nan"), key))
    with pytest.raises(ValueError, match=r"^the optimizer's state in \S+/global_step_4/dist_ckpt holds NaN$"):
        load_checkpoint(place, step=NEWEST, trainable=run.policy.trainable, layout=run.layout)


def test_a_checkpoint_of_another_model(run: Saved, tmp_path: Path) -> None:
    """A wider one, one with a larger vocabulary, and one of another dtype, either way round."""
    save_tiny_model(tmp_path / "wide", tiny_config(tied=False, vocab=299, intermediate_size=100))
    save_tiny_model(tmp_path / "large", tiny_config(tied=False, vocab=305))
    save_run(tmp_path / "float32", make_policy(run.model, run.layout, rows=2), run.layout)
    for checkpoints, policy, message in (
        (
            run.checkpoints,
            bfloat16_policy(tmp_path / "wide", run.layout),
            r"mlp\.linear_fc1\.weight in \S+ has shape .*,",
        ),
        (
            run.checkpoints,
            bfloat16_policy(tmp_path / "large", run.layout),
            r"embeddings\.weight in \S+ has shape \(299",
        ),
        (run.checkpoints, make_policy(run.model, run.layout, rows=2), r"dist_ckpt holds rounded weights.*model\.dtype"),
        (tmp_path / "float32", run.policy, r"dist_ckpt lacks optimizer\.state\.fp32_param\..*model\.dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            load_checkpoint(checkpoints, step=NEWEST, trainable=policy.trainable, layout=run.layout)


def test_a_part_that_is_newly_trained(run: Saved, tmp_path: Path) -> None:
    """Its moments would be zero, but a fused Adam counts the updates of all parameters together."""
    frozen: frozenset[ModelPart] = frozenset({"vision_tower", "projector"})
    save_run(tmp_path, make_policy(run.model, run.layout, rows=2, options=ModelOptions(frozen=frozen)), run.layout)
    fewer = make_policy(run.model, run.layout, rows=2, options=ModelOptions(frozen=frozenset({"vision_tower"})))
    with pytest.raises(ValueError, match=r"has no optimizer state for projector: it was written with model\.freeze=\["):
        load_checkpoint(tmp_path, step=NEWEST, trainable=fewer.trainable, layout=run.layout)


def test_a_part_that_is_newly_frozen(run: Saved) -> None:
    """Its moments are left in the file."""
    frozen = make_policy(
        run.model, run.layout, rows=2, dtype=torch.bfloat16, options=ModelOptions(frozen=frozenset({"projector"}))
    )
    load_checkpoint(run.checkpoints, step=NEWEST, trainable=frozen.trainable, layout=run.layout)
    assert update_counts(frozen) == {1.0}


def test_weights_alone(run: Saved, tmp_path: Path) -> None:
    """The optimizer starts from them: with moments of zero, and with weights as the model has them."""
    first = bfloat16_policy(run.model, run.layout)
    first.update(make_batch(make_responses(), "nll"))
    save_checkpoint(tmp_path, step=1, trainable=first.trainable, layout=run.layout, state={}, keep=1, model_only=True)
    assert not any("optimizer" in index.fqn for index in description(tmp_path / "global_step_1").storage_data)
    loaded = bfloat16_policy(run.model, run.layout)
    assert load_checkpoint(tmp_path, step=1, trainable=loaded.trainable, layout=run.layout) == {"step": 1}
    state, weights = whole_state(loaded), dict(first.hf_weights())
    assert update_counts(loaded) == {0.0} and state["param"].keys() == weights.keys()
    assert all(torch.equal(state["param"][name], tensor.float()) for name, tensor in weights.items())
    assert not any(tensor.any() for name in ("exp_avg", "exp_avg_sq") for tensor in state[name].values())


def test_the_file_that_names_the_newest_says_nothing(run: Saved, tmp_path: Path) -> None:
    place = run.damaged(tmp_path / "checkpoints", lambda source: None)
    (place / LATEST).write_bytes(b"\xff\x00 what")
    policy = bfloat16_policy(run.model, run.layout)
    state = load_checkpoint(place, step=NEWEST, trainable=policy.trainable, layout=run.layout)
    assert state == {"step": NEWEST, "data": PLACE}


# --- Several ranks ----------------------------------------------------------------------------------------------------

SPLIT = "language.decoder.layers.mlp.linear_fc2.weight"
SEVERAL: dict[str, tuple[Spoil, str]] = {
    "empty": FILES["empty"],
    "state": STATES["a brace"],
    "description": DESCRIPTIONS[".metadata cut"],
    "what_rank_1_alone_reads": (
        with_value(float("nan"), SPLIT, which=-1),
        rf"^{SPLIT} \(layer \d\) in \S+__1_\d\.distcp holds NaN$",
    ),
}
UNSHARED = r"elsewhere/global_step_4 is there for rank 0, but not for rank 1 on \S+; set trainer\.runs_dir to"


def _rank(rank: int, world: int, model: Path, root: Path) -> list[str]:
    layout = init_layout(tensor=2, pipeline=1, timeout_seconds=60)
    policy = bfloat16_policy(model, layout)
    save_run(root / "whole", policy, layout)
    for name, (spoil, _) in SEVERAL.items():
        if rank == 0:
            shutil.copytree(root / "whole", root / name)
            spoil(root / name / f"global_step_{NEWEST}")
    dist.barrier()
    messages = []
    for place in (*SEVERAL, "whole" if rank == 0 else "elsewhere"):
        with pytest.raises(ValueError, match=r".") as refused:
            load_checkpoint(root / place, step=NEWEST, trainable=policy.trainable, layout=layout)
        messages.append(str(refused.value))
    return messages


@pytest.mark.distributed
def test_all_ranks_say_the_same(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", tiny_config(tied=False, vocab=299))
    first, second = run_gloo(_rank, 2, tmp_path / "model", tmp_path)
    assert first == second
    for message, said in zip([*(message for _, message in SEVERAL.values()), UNSHARED], first, strict=True):
        assert re.search(message, said)
