"""Rows, settings and policies for tests of the policy, and what transformers says of them.

What an update should do is computed with transformers' model, autograd and torch's AdamW, row by row, without packing.
Adam's eps is 1 here, so that a weight's change is a smooth function of its gradient (g / (|g| + 1) in the first step)
and an error in the gradient shows in proportion.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from megatron_vppo.algorithm.loss import surrogate_loss
from megatron_vppo.algorithm.patches import Patches, PatchValues
from megatron_vppo.algorithm.types import ImageRef, LossSpec, PerturbKey, Prompt, Response, TrainBatch
from megatron_vppo.config.choices import Fp8Phase, PerturbUnit, PolicyLoss
from megatron_vppo.models.build import build_model
from megatron_vppo.models.options import ModelOptions
from megatron_vppo.models.qwen_vl import QwenVLModel
from megatron_vppo.parallel import training
from megatron_vppo.parallel.checkpoint import load_checkpoint, save_checkpoint
from megatron_vppo.parallel.checkpoint_folder import checkpoint_steps
from megatron_vppo.parallel.layout import Layout
from megatron_vppo.parallel.lr_schedule import LrSchedule
from megatron_vppo.parallel.policy import MegatronPolicy
from megatron_vppo.parallel.reference import ReferenceWeights
from megatron_vppo.parallel.schedule import PolicySettings, ScheduleRunner
from megatron_vppo.parallel.scorer import Scorer
from megatron_vppo.parallel.training import OptimSettings, make_trainable
from megatron_vppo.weights.load_hf import load_hf_weights
from tests.models.tiny import (
    GRIDS,
    IMAGE,
    make_rows,
    save_tiny_model,
)

TEMPERATURE = 0.8
LEARNING_RATE = 1.0


def constant(rate: float) -> LrSchedule:
    return LrSchedule(peak=rate, kind="constant", warmup_steps=0, total_steps=1, min_ratio=0.0)


OPTIM = OptimSettings(
    lr=constant(LEARNING_RATE),
    betas=(0.9, 0.999), eps=1.0, weight_decay=0.01, max_grad_norm=1e9,
    use_distributed_optimizer=True, overlap_grad_reduce=False,
)  # fmt: skip
RESUMED_OPTIM = dataclasses.replace(OPTIM, lr=constant(1e-2), eps=1e-8)
SMALL_BUCKETS = functools.partial(DistributedDataParallelConfig, bucket_size=20_000)
"""Buckets of gradients of a tiny model. Megatron's own hold 40 million values; without overlap it makes but one."""
RESPONSE_LENGTH = 4
STEP = 3
BANNED = (1, 281)
"""One in the rows of each of two tensor-parallel ranks; no row contains them."""
ANSWERED: tuple[tuple[int, tuple[int, ...]], ...] = ((2, (4, 1, 3)), (1, (3, 4)), (0, (4, 2)), (5, (4,)))
"""The groups: which row of `make_rows` is the prompt, and the tokens of each response. Two images, none, one, one."""


def make_responses() -> list[Response]:
    names, generator = list(GRIDS), torch.Generator().manual_seed(21)
    responses = []
    for group, (number, lengths) in enumerate(ANSWERED):
        row = make_rows()[number]
        prompt = Prompt(
            split="train", row=number, problem="", answer="", token_ids=tuple(row.token_ids), compact_token_ids=(),
            images=tuple(ImageRef("train", names.index(n), 0) for n in row.images),
            grids_thw=tuple(GRIDS[n] for n in row.images),
        )  # fmt: skip
        for sample, length in enumerate(lengths):
            ids = torch.randint(2, 280, (length,), generator=generator).tolist()
            responses.append(Response(prompt, group, sample, tuple(ids), (0.0,) * length, "stop", 0))
    return responses


class RigPixels:
    """The images of `make_rows`. A perturbation hides patches of every other image, and replaces the others."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(12)
        self.values = PatchValues(torch.randn(3, 256, generator=generator), frames=2)
        self._images = [self._noise(math.prod(grid), generator) for grid in GRIDS.values()]

    def patches(self, ref: ImageRef, perturb: PerturbKey | None) -> Patches:
        clean = self._images[ref.row]
        if perturb is None:
            return Patches(clean)
        generator = torch.Generator().manual_seed(1000 * perturb.step + (perturb.draw or 0) % 997 + ref.row)
        if ref.row % 2:
            return Patches(self._noise(len(clean), generator))
        return Patches(clean, torch.rand(len(clean), generator=generator) < 0.5)

    def shown(self, ref: ImageRef, perturb: PerturbKey | None) -> Tensor:
        """The values of an image, patch by patch."""
        patches = self.patches(ref, perturb)
        return self.values(patches.bytes_PD, patches.hidden_P)

    @staticmethod
    def _noise(patches: int, generator: torch.Generator) -> Tensor:
        return torch.randint(0, 256, (patches, 3 * 14 * 14), generator=generator, dtype=torch.uint8)


PIXELS = RigPixels()


def make_batch(responses: list[Response], entropy_kind: str, *, policy_loss: PolicyLoss = "clip") -> TrainBatch:
    generator = torch.Generator().manual_seed(3)
    shape = (len(responses), RESPONSE_LENGTH)
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
        loss=LossSpec(
            clip_ratio_low=0.99,
            clip_ratio_high=50.0,
            clip_ratio_dual=60.0,
            entropy_kind=entropy_kind,
            kl_kind="k3",
            policy_loss=policy_loss,
            sapo_tau_positive=1.0,
            sapo_tau_negative=1.05,
        ),
    )


@dataclass(frozen=True)
class Outcome:
    logp_BT: Tensor
    perturbed_logp_BT: Tensor
    entropy_BT: Tensor
    kl_BT: Tensor
    metrics: dict[str, float]
    gradients: dict[str, Tensor]
    """The gradients of the loss, under Hugging Face names."""
    weights: dict[str, Tensor]
    """The weights after the update."""
    visual_focus_BT: Tensor | None = None
    perturbed_entropy_BT: Tensor | None = None


# --- Transformers' answers --------------------------------------------------------------------------------------------


def _released(name: str, model_type: str) -> str:
    """A name that transformers 5 uses in memory, as released checkpoints have it; Qwen3-VL's are the same."""
    if model_type == "qwen3_vl":
        return name
    for prefix, short in {"model.visual.": "visual.", "model.language_model.": "model."}.items():
        if name.startswith(prefix):
            return short + name.removeprefix(prefix)
    return name


def hf_logits(model: Any, response: Response, perturb: PerturbKey | None) -> Tensor:
    """[N, V] of the response tokens, on the model's device."""
    out = model.model(**_hf_inputs(model, response, perturb)).last_hidden_state[0]
    logits = model.lm_head(out[-len(response.token_ids) - 1 : -1]) / TEMPERATURE
    return logits.index_fill(1, torch.tensor(BANNED, device=model.device), -1e30)


def hf_visual_focus(model: Any, response: Response) -> Tensor:
    """[N] of the response tokens: cosines with the mean of the image tokens, zeros without an image."""
    if not response.prompt.images:
        return torch.zeros(len(response.token_ids))
    inputs = _hf_inputs(model, response, None)
    hidden = model.model(**inputs, output_hidden_states=True).hidden_states[-1][0].float().cpu()
    image = hidden[inputs["input_ids"][0].cpu() == IMAGE].mean(0)
    return torch.cosine_similarity(hidden[-len(response.token_ids) :], image[None])


def _hf_inputs(model: Any, response: Response, perturb: PerturbKey | None) -> dict[str, Tensor]:
    ids = torch.tensor([[*response.prompt.token_ids, *response.token_ids]], device=model.device)
    if not response.prompt.images:
        return {"input_ids": ids}
    return {
        "input_ids": ids,
        "pixel_values": torch.cat([PIXELS.shown(ref, perturb) for ref in response.prompt.images]).to(model.device),
        "image_grid_thw": torch.tensor(response.prompt.grids_thw, device=model.device),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


@dataclass(frozen=True)
class ExpectedScores:
    logp_BT: Tensor
    perturbed_logp_BT: Tensor
    entropy_BT: Tensor
    kl_BT: Tensor
    perturbed_entropy_BT: Tensor
    """0.0 in rows without an image."""
    visual_focus_BT: Tensor


@torch.no_grad()
def expected_scores(model: Any, responses: list[Response], *, per: PerturbUnit = "row") -> ExpectedScores:
    """Both views of every response; a response without an image has the same one twice."""
    table_6BT = torch.zeros(6, len(responses), RESPONSE_LENGTH)
    for row, response in enumerate(responses):
        key = PerturbKey.of(response, STEP, per=per) if response.prompt.images else None
        logp_NV, perturbed_NV = (hf_logits(model, response, of).float().cpu().log_softmax(-1) for of in (None, key))
        targets = torch.tensor(response.token_ids)[:, None]
        table_6BT[:, row, : len(response.token_ids)] = torch.stack(
            [
                logp_NV.gather(1, targets)[:, 0],
                perturbed_NV.gather(1, targets)[:, 0],
                -(logp_NV.exp() * logp_NV).sum(-1),
                (logp_NV.exp() * (logp_NV - perturbed_NV)).sum(-1),
                -(perturbed_NV.exp() * perturbed_NV).sum(-1) * bool(response.prompt.images),
                hf_visual_focus(model, response),
            ]
        )
    return ExpectedScores(*table_6BT)


@dataclass(frozen=True)
class ExpectedUpdate:
    metrics: dict[str, float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def expected_update(model: Any, batch: TrainBatch, optim: OptimSettings) -> ExpectedUpdate:
    """The loss row by row, clipping and AdamW, which changes the model. Unused parameters have no gradient."""
    sums: dict[str, float] = {}
    for row, response in enumerate(batch.responses):
        logp_NV = hf_logits(model, response, None).float().cpu().log_softmax(-1)
        logp_N = logp_NV.gather(1, torch.tensor(response.token_ids)[:, None])[:, 0]
        entropy_N = -(logp_NV.exp() * logp_NV).sum(-1)
        at = (torch.full((len(logp_N),), row), torch.arange(len(logp_N)))
        terms = batch.terms_at(at)
        likeliest = None if terms.likeliest is None else logp_NV.gather(1, terms.likeliest.ids_NR)
        found = surrogate_loss(logp_N, terms, spec=batch.loss, entropy_N=entropy_N, likeliest_logp_NR=likeliest)
        found.loss.backward()
        for name, value in found.weighted_sums.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    names = {name: _released(name, model.config.model_type) for name, _ in model.named_parameters()}
    with_gradient = {name: p for name, p in model.named_parameters() if p.grad is not None}
    gradients = {names[name]: p.grad.float().cpu().clone() for name, p in with_gradient.items()}
    norm = torch.cat([p.grad.flatten() for p in with_gradient.values()]).double().norm()
    torch.nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm)
    torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=OPTIM.betas, eps=OPTIM.eps, weight_decay=OPTIM.weight_decay
    ).step()
    weights = {names[name]: p.detach().cpu() for name, p in model.named_parameters()}
    return ExpectedUpdate({**sums, "actor/grad_norm": float(norm)}, gradients, weights)


def expected_outcome(
    folder: Path,
    entropy_kind: str,
    optim: OptimSettings,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    responses: list[Response] | None = None,
) -> Outcome:
    """Scores, then one update, by transformers' model. The result is on the CPU, wherever it was computed.

    Args:
        responses: None: those of `make_responses`.
    """
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager", dtype=dtype).to(device)
    responses = responses or make_responses()
    scores = expected_scores(model, responses)
    update = expected_update(model, make_batch(responses, entropy_kind), optim)
    return Outcome(
        scores.logp_BT, scores.perturbed_logp_BT, scores.entropy_BT, scores.kl_BT,
        update.metrics, update.gradients, update.weights, scores.visual_focus_BT, scores.perturbed_entropy_BT,
    )  # fmt: skip


# --- Policies to compare with them ------------------------------------------------------------------------------------


def make_stages(
    folder: Path, layout: Layout, *, options: ModelOptions | None = None, dtype: torch.dtype = torch.float32
) -> list[QwenVLModel]:
    """The models of these tests have three layers, or their options say how they are cut."""
    options = options or ModelOptions(pipeline_layers=(1, 2) if layout.pipeline == 2 else None)
    config = AutoConfig.from_pretrained(folder)
    stages = [
        build_model(
            config, groups=layout.groups, vision_groups=layout.vision_groups, dtype=dtype,
            device=layout.device, options=options, virtual_stage=number,
        )
        for number in range(options.virtual_stages)
    ]  # fmt: skip
    for stage in stages:
        load_hf_weights(stage, folder)
    return stages


def make_settings(
    *,
    rows: int,
    token_alignment: int = 1,
    fp8_scope: frozenset[Fp8Phase] = frozenset(),
    scoring_chunk_seconds: float = math.inf,
    shared_prefix: bool = True,
    perturb_per: PerturbUnit = "row",
    most_tokens: int | None = None,
) -> PolicySettings:
    """`rows`: per micro-batch."""
    return PolicySettings(
        temperature=TEMPERATURE, banned_ids=BANNED, rows_per_update=rows, rows_per_experience=rows,
        head_chunk_tokens=5, perturb_per=perturb_per, shared_prefix=shared_prefix, token_alignment=token_alignment,
        fp8_scope=fp8_scope, max_tokens_per_micro_batch=most_tokens, scoring_chunk_seconds=scoring_chunk_seconds,
    )  # fmt: skip


def make_policy(
    folder: Path,
    layout: Layout,
    *,
    rows: int,
    optim: OptimSettings = OPTIM,
    options: ModelOptions | None = None,
    dtype: torch.dtype = torch.float32,
    token_alignment: int = 1,
    fp8_scope: frozenset[Fp8Phase] = frozenset(),
    perturb_per: PerturbUnit = "row",
    most_tokens: int | None = None,
    with_reference: bool = False,
) -> MegatronPolicy:
    """`rows`: per micro-batch."""
    stages = make_stages(folder, layout, options=options, dtype=dtype)
    frozen = options.frozen if options else frozenset()
    with patch.object(training, "DistributedDataParallelConfig", SMALL_BUCKETS):
        trainable = make_trainable(stages, layout=layout, settings=optim, dtype=dtype, frozen=frozen)
    return MegatronPolicy(
        trainable,
        hf_config=AutoConfig.from_pretrained(folder),
        layout=layout,
        settings=make_settings(
            rows=rows,
            token_alignment=token_alignment,
            fp8_scope=fp8_scope,
            perturb_per=perturb_per,
            most_tokens=most_tokens,
        ),
        pixels=PIXELS,
        reference=ReferenceWeights(trainable.stages) if with_reference else None,
    )


def make_scorer(
    folder: Path,
    layout: Layout,
    *,
    rows: int,
    options: ModelOptions | None = None,
    scoring_chunk_seconds: float = math.inf,
    perturb_per: PerturbUnit = "row",
    most_tokens: int | None = None,
) -> Scorer:
    """The same model without Megatron's wrapper and without an optimizer."""
    runner = ScheduleRunner(
        make_stages(folder, layout, options=options), hf_config=AutoConfig.from_pretrained(folder), layout=layout,
        settings=make_settings(
            rows=rows, scoring_chunk_seconds=scoring_chunk_seconds, perturb_per=perturb_per, most_tokens=most_tokens
        ),
        pixels=PIXELS,
    )  # fmt: skip
    return Scorer(runner)


def saved_models(
    configs: dict[str, Any], folder: Path, *, entropy_kind: str, spread: float = 0.12
) -> dict[str, tuple[Path, Outcome]]:
    """Random models of these configurations in folders of their own, and what transformers says of each."""
    made = {}
    for name, config in configs.items():
        save_tiny_model(folder / name, config, spread=spread)
        made[name] = (folder / name, expected_outcome(folder / name, entropy_kind, OPTIM))
    return made


def hf_gradients(policy: MegatronPolicy) -> dict[str, Tensor]:
    """Returns the gradients that `accumulate_gradients` left, whole and under Hugging Face names.

    Gradients lie in shards, under Megatron's names. The export of weights already joins the shards of a parameter over
    the ranks and gives the result its Hugging Face name, and a gradient has the shape and the cut of its parameter. So
    each gradient takes the place of its parameter's values (`.data`) while the weights are exported, and the values
    are put back afterwards. A frozen parameter has no gradient, and counts as zero here.
    """
    parameters = [parameter for stage in policy.trainable.stages for parameter in stage.parameters()]
    weights = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.main_grad if parameter.requires_grad else torch.zeros_like(parameter)
    gradients = {name: tensor.clone() for name, tensor in policy.hf_weights()}
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.data = weight
    return gradients


def resumed_equals_straight(
    folder: Path,
    layout: Layout,
    checkpoints: Path,
    *,
    distributed_optimizer: bool,
    options: ModelOptions | None = None,
    dtype: torch.dtype = torch.float32,
) -> bool:
    """Two updates in a row, against one, a checkpoint, and the second by a fresh policy that loaded it."""
    optim = dataclasses.replace(RESUMED_OPTIM, use_distributed_optimizer=distributed_optimizer)
    batch = make_batch(make_responses(), "nll")
    straight = make_policy(folder, layout, rows=2, optim=optim, options=options, dtype=dtype)
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
    resumed = make_policy(folder, layout, rows=2, optim=optim, options=options, dtype=dtype)
    assert checkpoint_steps(checkpoints) == [2]
    assert [path.name for path in checkpoints.glob("*step*")] == ["global_step_2"]
    state = load_checkpoint(checkpoints, step=2, trainable=resumed.trainable, layout=layout)
    assert state == {"step": 2, "data": {"offset": 2}}
    resumed.update(batch)
    pairs = zip(straight.hf_weights(), resumed.hf_weights(), strict=True)
    return all([name == other and torch.equal(a, b) for (name, a), (other, b) in pairs])
