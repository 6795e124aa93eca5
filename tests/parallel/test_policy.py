"""Scoring, updates, export and checkpoints of the policy, for every layout, against transformers.

What an update should do is computed with transformers' model, autograd and torch's AdamW, row by row, without packing.
Adam's eps is 1 here, so that a weight's change is a smooth function of its gradient (g / (|g| + 1) in the first step)
and an error in the gradient shows in proportion.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from megatron_vppo.algorithm.loss import surrogate_loss
from megatron_vppo.algorithm.types import ImageRef, LossSpec, Prompt, Response, TrainBatch
from megatron_vppo.data.perturb import PerturbKey
from megatron_vppo.models.build import build_model
from megatron_vppo.models.hf_loading import load_hf_weights
from megatron_vppo.models.mrope import mrope_positions
from megatron_vppo.parallel.checkpoint import latest_step, load_checkpoint, save_checkpoint
from megatron_vppo.parallel.layout import Layout, init_layout
from megatron_vppo.parallel.lr_schedule import LrSchedule
from megatron_vppo.parallel.policy import MegatronPolicy, PolicySettings
from megatron_vppo.parallel.training import OptimSettings, make_trainable
from tests.gloo import run_gloo
from tests.models.tiny import (
    GRIDS,
    IMAGE,
    MERGE,
    make_pixels,
    make_rows,
    save_tiny_model,
    tiny_config,
    tiny_qwen3_config,
)

LOGP_TOLERANCE = 1e-5
CHANGE_TOLERANCE = 1e-4
"""Relative, of the norm of each tensor's change."""
NORM_TOLERANCE = 1e-5
"""Relative."""

TEMPERATURE = 0.8
CONFIGS = {
    "tied": tiny_config(tied=True, vocab=299),
    "untied": tiny_config(tied=False, vocab=301),
    "Qwen3": tiny_qwen3_config(tied=False, vocab=301, taps=(1,)),
}
LEARNING_RATE = 1.0


def constant(rate: float) -> LrSchedule:
    return LrSchedule(peak=rate, kind="constant", warmup_steps=0, total_steps=1, min_ratio=0.0)


OPTIM = OptimSettings(
    lr=constant(LEARNING_RATE),
    betas=(0.9, 0.999), eps=1.0, weight_decay=0.01, max_grad_norm=1e9,
    use_distributed_optimizer=True,
)  # fmt: skip
RESUMED_OPTIM = dataclasses.replace(OPTIM, lr=constant(1e-2), eps=1e-8)
GROUPS = (0, 0, 1, 1, 2, 2)
ANSWER_LENGTH = 4
STEP = 3
BANNED = (1, 281)
"""One in the rows of each of two tensor-parallel ranks; no row contains them."""


def make_responses() -> list[Response]:
    """The last tokens of each row are the answer. Two rows make a group, though their prompts differ."""
    names = list(GRIDS)
    responses = []
    for number, row in enumerate(make_rows()):
        length = ANSWER_LENGTH - number % 2
        prompt = Prompt(
            split="train", row=number, problem="", answer="", token_ids=tuple(row.token_ids[:-length]),
            compact_token_ids=(), images=tuple(ImageRef("train", names.index(n), 0) for n in row.images),
            grids_thw=tuple(GRIDS[n] for n in row.images),
        )  # fmt: skip
        responses.append(
            Response(prompt, GROUPS[number], number % 2, tuple(row.token_ids[-length:]), (0.0,) * length, "stop", 0)
        )
    return responses


def patches(ref: ImageRef, perturb: PerturbKey | None) -> Tensor:
    clean = list(make_pixels().values())[ref.row]
    if perturb is None:
        return clean
    generator = torch.Generator().manual_seed(1000 * perturb.step + (perturb.response_row or 0) % 997 + ref.row)
    return clean + torch.randn(clean.shape, generator=generator)


def make_batch(responses: list[Response], entropy_kind: str) -> TrainBatch:
    generator = torch.Generator().manual_seed(3)
    shape = (len(responses), ANSWER_LENGTH)
    mask_BT = torch.zeros(shape)
    for row, response in enumerate(responses):
        mask_BT[row, : len(response.token_ids)] = 1.0
    noise = [torch.randn(shape, generator=generator) for _ in range(4)]
    return TrainBatch(
        responses=tuple(responses),
        old_logp_BT=(-4.0 + noise[0]) * mask_BT,
        advantage_BT=noise[1] * mask_BT,
        pg_weight_BT=noise[2].abs() * mask_BT,
        entropy_weight_BT=0.1 * noise[3].abs() * mask_BT,
        response_mask_BT=mask_BT,
        loss=LossSpec(clip_ratio_low=0.99, clip_ratio_high=50.0, clip_ratio_dual=60.0, entropy_kind=entropy_kind),
    )


@dataclass(frozen=True)
class Outcome:
    logp_BT: Tensor
    masked_logp_BT: Tensor
    entropy_BT: Tensor
    kl_BT: Tensor
    metrics: dict[str, float]
    weights: dict[str, Tensor]
    """Under Hugging Face names, after the update."""


# ---- what transformers says


def _released(name: str, model_type: str) -> str:
    """A name that transformers 5 uses in memory, as released checkpoints have it; Qwen3-VL's are the same."""
    if model_type == "qwen3_vl":
        return name
    for prefix, short in {"model.visual.": "visual.", "model.language_model.": "model."}.items():
        if name.startswith(prefix):
            return short + name.removeprefix(prefix)
    return name


def _hf_logits(model: Any, response: Response, perturb: PerturbKey | None) -> Tensor:
    ids = torch.tensor([[*response.prompt.token_ids, *response.token_ids]])
    images = {}
    if response.prompt.images:
        images = {
            "pixel_values": torch.cat([patches(ref, perturb) for ref in response.prompt.images]),
            "image_grid_thw": torch.tensor(response.prompt.grids_thw),
            "mm_token_type_ids": (ids == IMAGE).int(),
        }
    out = model.model(input_ids=ids, **images).last_hidden_state[0]
    logits = model.lm_head(out[-len(response.token_ids) - 1 : -1]) / TEMPERATURE
    return logits.index_fill(1, torch.tensor(BANNED), -1e30)


def expected_outcome(folder: Path, entropy_kind: str, optim: OptimSettings) -> Outcome:
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    responses = make_responses()
    batch = make_batch(responses, entropy_kind)
    blocks = {name: torch.zeros(len(responses), ANSWER_LENGTH) for name in ("logp", "masked", "entropy", "kl")}
    sums: dict[str, float] = {}
    for row, response in enumerate(responses):
        length = len(response.token_ids)
        logp_NV = _hf_logits(model, response, None).log_softmax(-1)
        key = PerturbKey(STEP, response.group_id * 2**16 + response.sample) if response.prompt.images else None
        with torch.no_grad():
            masked_NV = _hf_logits(model, response, key).log_softmax(-1)
        targets = torch.tensor(response.token_ids)[:, None]
        logp_N = logp_NV.gather(1, targets)[:, 0]
        entropy_N = -(logp_NV.exp() * logp_NV).sum(-1)
        terms = surrogate_loss(
            logp_N, batch.old_logp_BT[row, :length], batch.advantage_BT[row, :length], batch.pg_weight_BT[row, :length],
            batch.entropy_weight_BT[row, :length], spec=batch.loss, entropy_N=entropy_N,
        )  # fmt: skip
        terms.loss.backward()
        for name, value in terms.weighted_sums.items():
            sums[name] = sums.get(name, 0.0) + float(value)
        blocks["logp"][row, :length] = logp_N.detach()
        blocks["entropy"][row, :length] = entropy_N.detach()
        blocks["masked"][row, :length] = masked_NV.gather(1, targets)[:, 0]
        blocks["kl"][row, :length] = (logp_NV.exp() * (logp_NV - masked_NV)).sum(-1).detach()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.cat([gradient.flatten() for gradient in gradients]).double().norm()
    torch.nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm)
    torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=OPTIM.betas, eps=OPTIM.eps, weight_decay=OPTIM.weight_decay
    ).step()
    weights = {
        _released(name, model.config.model_type): parameter.detach() for name, parameter in model.named_parameters()
    }
    return Outcome(
        blocks["logp"], blocks["masked"], blocks["entropy"], blocks["kl"],
        {**sums, "actor/grad_norm": float(norm)}, weights,
    )  # fmt: skip


# ---- what the policy does


def make_policy(folder: Path, layout: Layout, *, rows: int, optim: OptimSettings = OPTIM) -> MegatronPolicy:
    config = AutoConfig.from_pretrained(folder)
    model = build_model(
        config, groups=layout.groups, dtype=torch.float32, device=layout.device,
        pipeline_layers=(1, 2) if layout.pipeline == 2 else None,
    )  # fmt: skip
    load_hf_weights(model, folder)
    return MegatronPolicy(
        make_trainable(model, layout=layout, settings=optim, dtype=torch.float32),
        layout=layout,
        settings=PolicySettings(
            temperature=TEMPERATURE, vocab_size=config.text_config.vocab_size, banned_ids=BANNED,
            image_token_id=IMAGE, merge_size=MERGE,
            rows_per_update=rows, rows_per_experience=rows, head_chunk_tokens=5, perturb_per="row",
        ),
        patches=patches,
        positions=lambda ids, grids: mrope_positions(ids, grids, image_token_id=IMAGE, merge_size=MERGE),
    )  # fmt: skip


def one_update(folder: Path, layout: Layout, *, rows: int, entropy_kind: str, optim: OptimSettings) -> Outcome:
    policy = make_policy(folder, layout, rows=rows, optim=optim)
    responses = make_responses()
    scores = policy.score(responses, step=STEP, views="both", divergence="kl_full")
    metrics = policy.update(make_batch(responses, entropy_kind))
    assert scores.masked_logp_BT is not None and scores.divergence_BT is not None
    return Outcome(
        scores.old_logp_BT, scores.masked_logp_BT, scores.entropy_BT, scores.divergence_BT, metrics,
        {name: tensor.clone() for name, tensor in policy.hf_weights()},
    )  # fmt: skip


def resumed_equals_straight(folder: Path, layout: Layout, checkpoints: Path, *, distributed_optimizer: bool) -> bool:
    """Two updates in a row, against one, a checkpoint, and the second by a fresh policy that loaded it."""
    optim = dataclasses.replace(RESUMED_OPTIM, use_distributed_optimizer=distributed_optimizer)
    batch = make_batch(make_responses(), "nll")
    straight = make_policy(folder, layout, rows=2, optim=optim)
    straight.update(batch)
    for step in (1, 2):
        save_checkpoint(
            checkpoints,
            step=step,
            trainable=straight.trainable,
            layout=layout,
            state={"data": {"offset": step}},
            keep=1,
        )
    straight.update(batch)
    resumed = make_policy(folder, layout, rows=2, optim=optim)
    assert latest_step(checkpoints) == 2
    assert [path.name for path in checkpoints.glob("*step*")] == ["global_step_2"]
    state = load_checkpoint(checkpoints, step=2, trainable=resumed.trainable, layout=layout)
    assert state == {"step": 2, "data": {"offset": 2}}
    resumed.update(batch)
    pairs = zip(straight.hf_weights(), resumed.hf_weights(), strict=True)
    return all([name == other and torch.equal(a, b) for (name, a), (other, b) in pairs])


def resumed_before_any_update_equals_fresh(folder: Path, layout: Layout, checkpoints: Path) -> bool:
    """Steps without anything to train on may come first: Adam has no state yet when the checkpoint is written."""
    batch = make_batch(make_responses(), "nll")
    fresh, resumed = (make_policy(folder, layout, rows=2, optim=RESUMED_OPTIM) for _ in range(2))
    save_checkpoint(checkpoints, step=1, trainable=fresh.trainable, layout=layout, state={}, keep=1)
    load_checkpoint(checkpoints, step=1, trainable=resumed.trainable, layout=layout)
    untouched = make_policy(folder, layout, rows=2, optim=RESUMED_OPTIM)
    for policy in (fresh, resumed, untouched):
        policy.update(batch)
    return all(
        [
            torch.equal(a, b) and torch.equal(a, c)
            for (_, a), (_, b), (_, c) in zip(
                fresh.hf_weights(), resumed.hf_weights(), untouched.hf_weights(), strict=True
            )
        ]
    )


def infinite_gradient_changes_nothing(folder: Path, layout: Layout) -> bool:
    policy = make_policy(folder, layout, rows=4)
    before = {name: tensor.clone() for name, tensor in policy.hf_weights()}
    batch = make_batch(make_responses(), "nll")
    infinite_BT = batch.pg_weight_BT.clone()
    infinite_BT[0, 0] = float("inf")
    metrics = policy.update(dataclasses.replace(batch, pg_weight_BT=infinite_BT))
    return metrics["actor/skipped_updates"] == 1.0 and all(
        [torch.equal(before[name], tensor) for name, tensor in policy.hf_weights()]
    )


def _rank(rank: int, world: int, layouts: list[tuple[int, int]], folders: dict[str, Path], scratch: Path) -> list[Any]:
    results = []
    for tensor, pipeline in layouts:
        layout = init_layout(tensor=tensor, pipeline=pipeline, timeout_seconds=300)
        outcomes = {
            (name, rows): one_update(folder, layout, rows=rows, entropy_kind=KINDS[name], optim=OPTIMS[name])
            for name, folder in folders.items()
            for rows in (1, 4)
        }
        checkpoints = scratch / f"{tensor}{pipeline}{world}"
        exact = resumed_before_any_update_equals_fresh(folders["tied"], layout, checkpoints / "before") and all(
            [
                resumed_equals_straight(
                    folders[name], layout, checkpoints / name / str(kind), distributed_optimizer=kind
                )
                for name, kind in (("tied", True), ("tied", False), ("Qwen3", False))
            ]
        )
        assert infinite_gradient_changes_nothing(folders["tied"], layout)
        results.append((outcomes, exact))
        parallel_state.destroy_model_parallel()
    return results


KINDS = {"tied": "nll", "untied": "entropy", "Qwen3": "nll"}
OPTIMS = {"tied": dataclasses.replace(OPTIM, max_grad_norm=0.1), "untied": OPTIM, "Qwen3": OPTIM}
"""Gradients of the tied model are clipped."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Outcome, dict[str, Tensor]]]:
    made = {}
    for name, config in CONFIGS.items():
        folder = tmp_path_factory.mktemp(name)
        save_tiny_model(folder, config)
        expected = expected_outcome(folder, KINDS[name], OPTIMS[name])
        clips = expected.metrics["actor/grad_norm"] > OPTIMS[name].max_grad_norm
        assert clips == (name == "tied"), expected.metrics
        made[name] = (folder, expected, _start_weights(folder))
    return made


def _start_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.distributed
@pytest.mark.parametrize("layouts", [[(1, 1)], [(2, 1), (1, 2), (1, 1)], [(2, 2)]], ids=["one", "two", "four"])
def test_update_equals_transformers(
    layouts: list[tuple[int, int]], models: dict[str, tuple[Path, Outcome, dict[str, Tensor]]], tmp_path: Path
) -> None:
    world = max(tensor * pipeline for tensor, pipeline in layouts)
    folders = {name: folder for name, (folder, _, _) in models.items()}
    by_rank = run_gloo(_rank, world, layouts, folders, tmp_path, timeout_seconds=300)
    for ranks in by_rank:
        for layout, (outcomes, exact) in zip(layouts, ranks, strict=True):
            assert exact, f"{layout}: resumed weights differ"
            for (name, rows), outcome in outcomes.items():
                where = f"TP {layout[0]} PP {layout[1]} of {world} ranks, {name}, {rows} rows a micro-batch"
                _, expected, start = models[name]
                _compare(outcome, expected, start, where=where)


def _compare(outcome: Outcome, expected: Outcome, start: dict[str, Tensor], *, where: str) -> None:
    for field in ("logp_BT", "masked_logp_BT", "entropy_BT", "kl_BT"):
        difference = (getattr(outcome, field) - getattr(expected, field)).abs().max()
        assert difference < LOGP_TOLERANCE * (5 if field == "kl_BT" else 1), f"{where}: {field} off by {difference}"
    for name, value in expected.metrics.items():
        assert outcome.metrics[name] == pytest.approx(value, rel=NORM_TOLERANCE), f"{where}: {name}"
    assert outcome.weights.keys() == expected.weights.keys(), where
    for name, weight in expected.weights.items():
        change = weight - start[name]
        assert change.norm() > 0, f"{name} did not change; the test would not see an error"
        error = (outcome.weights[name] - weight).norm() / change.norm()
        assert error < CHANGE_TOLERANCE, f"{where}: the change of {name} is off by {error:.1e} of its norm"


def _save_after_one_update(rank: int, world: int, folder: Path, checkpoints: Path) -> None:
    layout = init_layout(tensor=1, pipeline=1, timeout_seconds=300)
    policy = make_policy(folder, layout, rows=2, optim=RESUMED_OPTIM)
    policy.update(make_batch(make_responses(), "nll"))
    save_checkpoint(checkpoints, step=1, trainable=policy.trainable, layout=layout, state={}, keep=1)


def _second_update(rank: int, world: int, folder: Path, checkpoints: Path) -> dict[str, Tensor]:
    layout = init_layout(tensor=1, pipeline=1, timeout_seconds=300)
    policy = make_policy(folder, layout, rows=2, optim=RESUMED_OPTIM)
    load_checkpoint(checkpoints, step=1, trainable=policy.trainable, layout=layout)
    policy.update(make_batch(make_responses(), "nll"))
    return {name: tensor.clone() for name, tensor in policy.hf_weights()}


@pytest.mark.distributed
@pytest.mark.parametrize("written, read", [(2, 1), (1, 2)])
def test_resume_under_another_data_parallel_size(
    written: int, read: int, models: dict[str, tuple[Path, Outcome, dict[str, Tensor]]], tmp_path: Path
) -> None:
    """Weights after a second update, against those of a run that kept its size. Adam divides by the root of what it
    summed, so the rounding of a sum over ranks is not bounded by that of the gradients: the change is compared."""
    folder, _, start = models["tied"]
    run_gloo(_save_after_one_update, written, folder, tmp_path, timeout_seconds=300)
    kept, changed = (
        run_gloo(_second_update, size, folder, tmp_path, timeout_seconds=300)[0] for size in (written, read)
    )
    for name, weight in kept.items():
        error = (changed[name] - weight).norm() / (weight - start[name]).norm()
        assert error < CHANGE_TOLERANCE, f"the change of {name} is off by {error:.1e} of its norm"
