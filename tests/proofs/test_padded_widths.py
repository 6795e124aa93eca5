"""The padding of the vision tower's widths: zero for ever, and nowhere outside of a rank's memory.

That features, log-probs and gradients are those of transformers, that conversions give the same bits and that a run
goes on under another tensor-parallel size is shown where it is shown for everything else: the tiny models of these
tests have a width that is padded (tests/models/tiny.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import TensorStorageMetadata

from megatron_vppo.models.qwen_vl import QwenVLModel
from megatron_vppo.parallel.checkpoint import load_checkpoint, save_checkpoint
from megatron_vppo.parallel.layout import single_rank
from megatron_vppo.parallel.policy import MegatronPolicy
from megatron_vppo.weights import padded_widths
from megatron_vppo.weights.dist_metadata import read_metadata
from megatron_vppo.weights.stream import save_hf
from tests.conversion.folders import same_bits, tensors_of
from tests.models.tiny import save_tiny_model, tiny_config, tiny_qwen3_config
from tests.parallel.optimizer_rig import whole_state
from tests.parallel.policy_rig import RESUMED_OPTIM, make_batch, make_policy, make_responses

WIDTH, PADDED_WIDTH = 68, 72
MODELS: dict[str, Any] = {
    "Qwen2.5-VL": tiny_config(tied=True, vocab=299),
    "Qwen3-VL": tiny_qwen3_config(tied=False, vocab=301, taps=(1,)),
}


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    save_tiny_model(tmp_path / "model", MODELS[request.param])
    return tmp_path / "model"


def padding_of(model: QwenVLModel, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The zeros of every tensor that has the shape of a padded parameter."""
    for name, parameter in model.named_parameters():
        dims = [dim for dim, size in enumerate(parameter.shape) if size in (PADDED_WIDTH, 2 * PADDED_WIDTH)]
        if not name.startswith("vision.") or ".mlp.linear_fc" not in name or not dims:
            continue
        (dim,) = dims
        for block in tensors[name].view(parameter.shape).split(PADDED_WIDTH, dim):
            yield name, block.narrow(dim, WIDTH, PADDED_WIDTH - WIDTH)


def two_updates(folder: Path, layout: Any) -> MegatronPolicy:
    """With weight decay, and an epsilon of Adam that would make a step of the least gradient."""
    policy = make_policy(folder, layout, rows=2, optim=RESUMED_OPTIM)
    for _ in range(2):
        policy.update(make_batch(make_responses(), "entropy"))
    return policy


def test_padding_stays_zero_in_weights_gradients_and_moments(folder: Path) -> None:
    with single_rank() as layout:
        policy = two_updates(folder, layout)
        (model,) = policy.trainable.stages
        (part,) = policy.trainable.optimizer.chained_optimizers
        parameters = dict(model.named_parameters())
        held = {
            "weights": {name: p.detach() for name, p in parameters.items()},
            "gradients": {name: p.main_grad for name, p in parameters.items()},
            **{
                quantity: {n: part._get_main_param_and_optimizer_states(p)[quantity] for n, p in parameters.items()}
                for quantity in ("param", "exp_avg", "exp_avg_sq")
            },
        }
        for what, tensors in held.items():
            blocks = list(padding_of(model, tensors))
            # Weight and bias of the first layer, each of two blocks if it is gated, and the weight of the second.
            assert len(blocks) == 3 * (5 if "blocks" in str(list(parameters)) else 3)
            assert not [name for name, block in blocks if block.any()], what
            assert all(tensors[name].any() for name, _ in blocks), f"{what}: the rest is trained"


def test_files_have_the_widths_of_the_released_model(folder: Path, tmp_path: Path) -> None:
    with single_rank() as layout:
        policy = two_updates(folder, layout)
        save_checkpoint(tmp_path, step=2, trainable=policy.trainable, layout=layout, state={}, keep=1)
        save_hf(policy.hf_weights(), tmp_path / "hf", source=folder, is_writer=True)
    exported, source = tensors_of(tmp_path / "hf"), tensors_of(folder)
    assert {name: t.shape for name, t in exported.items()} == {name: t.shape for name, t in source.items()}
    stored = read_metadata(tmp_path / "global_step_2" / "dist_ckpt").state_dict_metadata
    widths = [
        size
        for key, found in stored.items()
        if isinstance(found, TensorStorageMetadata) and "vision" in key and ".mlp.linear_fc" in key
        for size in found.size
    ]
    assert WIDTH in widths and PADDED_WIDTH not in widths and 2 * PADDED_WIDTH not in widths


def test_a_checkpoint_of_a_version_without_padding_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with single_rank() as layout:
        with monkeypatch.context() as before:
            before.setattr(padded_widths, "WIDTH_MULTIPLE", 1)
            older = two_updates(folder, layout)
            assert WIDTH in {size for p in older.trainable.stages[0].parameters() for size in p.shape}
            save_checkpoint(tmp_path, step=2, trainable=older.trainable, layout=layout, state={}, keep=1)
            state = whole_state(older)
            save_hf(older.hf_weights(), tmp_path / "older", source=folder, is_writer=True)
        resumed = make_policy(folder, layout, rows=2, optim=RESUMED_OPTIM)
        load_checkpoint(tmp_path, step=2, trainable=resumed.trainable, layout=layout)
        found = whole_state(resumed)
        for quantity, tensors in state.items():
            assert all(torch.equal(found[quantity][name], tensor) for name, tensor in tensors.items()), quantity
        save_hf(resumed.hf_weights(), tmp_path / "resumed", source=folder, is_writer=True)
        assert same_bits(tensors_of(tmp_path / "older"), tensors_of(tmp_path / "resumed"))


def test_a_checkpoint_of_buffers_without_padding_is_refused(folder: Path, tmp_path: Path) -> None:
    """The format before ADR 0017 holds whole buffers, in which padding would move everything behind it."""
    with single_rank() as layout:
        policy = make_policy(folder, layout, rows=2, optim=RESUMED_OPTIM)
        save_checkpoint(tmp_path, step=2, trainable=policy.trainable, layout=layout, state={}, keep=1)
        path = tmp_path / "global_step_2" / "trainer_state.json"
        state = json.loads(path.read_text())
        del state["optimizer"], state["optimizer_updates"]
        path.write_text(json.dumps(state))
        with pytest.raises(ValueError, match=r"older version, which did not pad vision\..*mlp\.linear_fc"):
            load_checkpoint(tmp_path, step=2, trainable=policy.trainable, layout=layout)
