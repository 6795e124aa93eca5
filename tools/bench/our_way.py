"""The policy of this project on one device, built as `vppo train` builds it but with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bench.workload import Workload, fill_with_noise
from megatron_vppo.algorithm.types import Scores, TrainBatch
from megatron_vppo.config.choices import Fp8Recipe, Recompute
from megatron_vppo.models.build import build_model
from megatron_vppo.models.hf_config import vision_token_ids
from megatron_vppo.models.layers.te_support import drop_fp8_copies
from megatron_vppo.models.options import Backend, Fp8Options, ModelOptions
from megatron_vppo.models.precision import TOKEN_ALIGNMENT
from megatron_vppo.parallel.layout import Layout
from megatron_vppo.parallel.lr_schedule import LrSchedule
from megatron_vppo.parallel.policy import MegatronPolicy
from megatron_vppo.parallel.schedule import PolicySettings
from megatron_vppo.parallel.training import OptimSettings, make_trainable

OPTIM = OptimSettings(
    lr=LrSchedule(peak=1e-6, kind="constant", warmup_steps=0, total_steps=1, min_ratio=0.0),
    betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, max_grad_norm=1.0, use_distributed_optimizer=True,
    overlap_grad_reduce=False,
)  # fmt: skip
STEP = 1


@dataclass(frozen=True)
class OurSettings:
    backend: Backend
    recompute: Recompute
    temperature: float
    rows_per_update: int
    rows_per_experience: int
    head_chunk_tokens: int
    shared_prefix: bool


class OurWay:
    def __init__(
        self,
        hf_config: Any,
        workload: Workload,
        *,
        layout: Layout,
        dtype: torch.dtype,
        settings: OurSettings,
        fp8: Fp8Recipe | None,
    ) -> None:
        self._workload = workload
        options = ModelOptions(
            backend=settings.backend,
            recompute=settings.recompute,
            fp8=None if fp8 is None else Fp8Options(recipe=fp8),
        )
        model = build_model(
            hf_config, groups=layout.groups, vision_groups=layout.vision_groups, dtype=dtype, device=layout.device,
            options=options,
        )  # fmt: skip
        fill_with_noise(model, seed=0)
        trainable = make_trainable([model], layout=layout, settings=OPTIM, dtype=dtype)
        trainable.set_step(STEP)
        self._policy = MegatronPolicy(
            trainable,
            hf_config=hf_config,
            layout=layout,
            settings=PolicySettings(
                temperature=settings.temperature,
                banned_ids=vision_token_ids(hf_config),
                rows_per_update=settings.rows_per_update,
                rows_per_experience=settings.rows_per_experience,
                head_chunk_tokens=settings.head_chunk_tokens,
                perturb_per="row",
                shared_prefix=settings.shared_prefix,
                fp8_scope=frozenset() if fp8 is None else frozenset({"scoring", "update"}),
                token_alignment=1 if fp8 is None else TOKEN_ALIGNMENT[fp8],
            ),
            pixels=workload,
        )

    def score(self) -> Scores:
        """Scores both views of every row."""
        return self._policy.score(self._workload.responses, step=STEP, views="both")

    def update(self, batch: TrainBatch) -> dict[str, float]:
        return self._policy.update(batch)

    def close(self) -> None:
        """Frees the memory of weights, gradients and optimizer. Dropping the policy is not enough, because Megatron's
        wrapper holds them and is never collected.
        """
        for stage in self._policy.trainable.stages:
            drop_fp8_copies(stage)
        for tensor in self._tensors():
            tensor.untyped_storage().resize_(0)

    def _tensors(self) -> Iterator[torch.Tensor]:
        trainable = self._policy.trainable
        for stage in trainable.stages:
            for parameter in stage.parameters():
                yield from (parameter.data, parameter.main_grad)
        for group in trainable.optimizer.param_groups:
            yield from group["params"]
        for _, state in trainable.optimizer.state.items():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))
