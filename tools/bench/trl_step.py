"""Times scoring of both views and one update against TRL's GRPOTrainer, on a CPU, as one JSON object.

    python -m pip install trl accelerate          # in an environment of its own, next to this project
    python tools/bench/random_model.py --out build/bench/random_60m
    python tools/bench/trl_step.py build/bench/random_60m/model [--rounds 5]

The same weights and rows go through both, one after the other in one process: two prompts of 256 tokens, of which 224
are an image, with eight responses of 128 tokens each. TRL's own functions do TRL's work: log-probs with entropies, each
view once, and the loss. Counts of FLOPs do not depend on the machine's load; the seconds need an idle one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import trl
from datasets import Dataset
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from bench.counted_flops import count_flops
from bench.machine import commit, hardware, versions
from bench.our_way import OPTIM
from bench.workload import Workload, WorkSizes, make_workload
from megatron_vppo.algorithm.types import TrainBatch
from megatron_vppo.models.build import build_model
from megatron_vppo.parallel.layout import Layout, single_rank
from megatron_vppo.parallel.policy import MegatronPolicy
from megatron_vppo.parallel.schedule import PolicySettings
from megatron_vppo.parallel.training import make_trainable
from megatron_vppo.weights.load_hf import load_hf_weights

ROOT = Path(__file__).resolve().parents[2]
GROUP, RESPONSE = 8, 128
SIZES = WorkSizes(
    prompts=2, responses_per_prompt=GROUP, text_tokens=30, response_median=RESPONSE, response_sigma=0.0,
    response_limit=RESPONSE, images=((392, 448),),
)  # fmt: skip
"""An image of 28 x 32 patches; with its two marks a prompt has 256 tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the folder that random_model.py made")
    parser.add_argument("--rounds", type=int, default=5, help="times that every phase is measured (5)")
    options = parser.parse_args()
    config = AutoConfig.from_pretrained(options.model)
    workload = make_workload(config, SIZES)
    batch = workload.train_batch(vocabulary=config.text_config.vocab_size)
    with single_rank() as layout, tempfile.TemporaryDirectory(prefix="vppo-trl-") as scratch:
        policy = make_policy(options.model, config, layout, workload)
        rival = Rival(options.model, scratch, workload, batch)
        mine, theirs = policy.score(workload.responses, step=1, views="both").old_logp_BT, rival.logps(rival.pixels)
        phases: dict[str, Callable[[], object]] = {
            "ours, score": lambda: policy.score(workload.responses, step=1, views="both"),
            "trl, score": rival.score,
            "ours, update": lambda: policy.update(batch),
            "trl, update": rival.update,
        }
        flops = {name: count_flops(phase) for name, phase in phases.items()}
        seconds = time_in_turn(phases, rounds=options.rounds)
    report = {
        "log_probs_differ_by": (mine - theirs).abs().max().item(),
        "gflop": {name: round(count / 1e9, 1) for name, count in flops.items()},
        "flops_of_trl_over_ours": ratios(flops),
        "seconds": seconds,
        "seconds_of_trl_over_ours": ratios({name: statistics.median(taken) for name, taken in seconds.items()}),
        "hardware": hardware(),
        "versions": {**versions(), "trl": trl.__version__},
        "git": commit(ROOT),
    }
    print(json.dumps(report, indent=1))


def make_policy(folder: str, config: Any, layout: Layout, workload: Workload) -> MegatronPolicy:
    """Makes our policy: a group in a micro-batch, one perturbation per image."""
    model = build_model(
        config, groups=layout.groups, vision_groups=layout.vision_groups, dtype=torch.float32, device=layout.device
    )
    load_hf_weights(model, Path(folder))
    trainable = make_trainable([model], layout=layout, settings=OPTIM, dtype=torch.float32)
    trainable.set_step(1)
    settings = PolicySettings(
        temperature=1.0, banned_ids=(), rows_per_update=GROUP, rows_per_experience=GROUP, head_chunk_tokens=1024,
        perturb_per="image", shared_prefix=True,
    )  # fmt: skip
    return MegatronPolicy(trainable, hf_config=config, layout=layout, settings=settings, pixels=workload)


@dataclass
class Rows:
    """All rows as TRL takes them, right-padded by nothing: all have the same lengths."""

    prompt: Tensor
    response: Tensor
    types: Tensor
    """1 where a token is an image's."""
    grids: Tensor

    @property
    def whole(self) -> Tensor:
        return torch.cat([self.prompt, self.response], dim=1)


class Rival:
    """TRL's trainer on the same rows, a group in a micro-batch."""

    def __init__(self, folder: str, scratch: str, workload: Workload, batch: TrainBatch) -> None:
        self._model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        arguments = trl.GRPOConfig(
            output_dir=scratch, per_device_train_batch_size=GROUP, num_generations=GROUP,
            max_completion_length=RESPONSE,
            use_cpu=True, bf16=False, beta=0.0, report_to=[], save_strategy="no", gradient_checkpointing=False,
        )  # fmt: skip
        self._trainer = trl.GRPOTrainer(
            model=self._model,
            processing_class=AutoProcessor.from_pretrained(folder),
            reward_funcs=no_reward,
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": "x"}]}] * 2 * GROUP),
        )
        self._trainer.current_gradient_accumulation_steps = SIZES.prompts
        self._adam = torch.optim.AdamW(self._model.parameters(), lr=1e-6)
        rows, self._batch = workload.responses, batch
        prompt = torch.tensor([row.prompt.token_ids for row in rows])
        response = torch.tensor([row.token_ids for row in rows])
        types = (torch.cat([prompt, response], dim=1) == self._model.config.image_token_id).int()
        self._rows = Rows(prompt, response, types, torch.tensor([row.prompt.grids_thw[0] for row in rows]))
        images = [workload.patches(row.prompt.images[0], None) for row in rows]
        self.pixels = torch.cat([workload.values(image.bytes_PD) for image in images])
        self._old = self.logps(self.pixels)

    @torch.no_grad()
    def logps(self, pixels: Tensor) -> Tensor:
        """Returns the log-probs of all response tokens; TRL computes their entropies, too."""
        rows = self._rows
        return self._trainer._get_per_token_logps_and_entropies(
            self._model, rows.whole, torch.ones_like(rows.whole), RESPONSE, batch_size=GROUP, compute_entropy=True,
            pixel_values=pixels, image_grid_thw=rows.grids, num_images=[1] * len(rows.prompt),
            mm_token_type_ids=rows.types,
        )[0]  # fmt: skip

    def score(self) -> None:
        """Scores two views, which have the same values here; TRL does not see that."""
        self.logps(self.pixels)
        self.logps(self.pixels)

    def update(self) -> None:
        rows, patches = self._rows, len(self.pixels) // len(self._rows.prompt)
        self._adam.zero_grad()
        for first in range(0, len(rows.prompt), GROUP):
            part = slice(first, first + GROUP)
            inputs = {
                "prompt_ids": rows.prompt[part], "prompt_mask": torch.ones_like(rows.prompt[part]),
                "completion_ids": rows.response[part], "completion_mask": torch.ones_like(rows.response[part]),
                "advantages": self._batch.advantage_BT[part, 0], "old_per_token_logps": self._old[part],
                "pixel_values": self.pixels[first * patches : (first + GROUP) * patches],
                "image_grid_thw": rows.grids[part], "num_images": [1] * GROUP, "mm_token_type_ids": rows.types[part],
                "num_items_in_batch": self._batch.response_mask_BT.sum(),
            }  # fmt: skip
            self._trainer._compute_loss(self._model, inputs).backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._adam.step()


def no_reward(prompts: list[Any], **columns: Any) -> list[float]:
    """Stands where TRL wants a reward function; nothing is sampled."""
    return [0.0] * len(prompts)


def time_in_turn(phases: dict[str, Callable[[], object]], *, rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of each phase in each round; the phases of a round run one after the other."""
    taken: dict[str, list[float]] = {name: [] for name in phases}
    for _ in range(rounds):
        for name, phase in phases.items():
            began = time.perf_counter()
            phase()
            taken[name].append(round(time.perf_counter() - began, 3))
    return taken


def ratios(of: dict[str, float] | dict[str, int]) -> dict[str, float]:
    """Returns TRL's numbers over ours, by phase and in all."""
    by_phase = {phase: of[f"trl, {phase}"] / of[f"ours, {phase}"] for phase in ("score", "update")}
    in_all = [sum(of[f"{who}, {phase}"] for phase in by_phase) for who in ("trl", "ours")]
    return {name: round(ratio, 2) for name, ratio in {**by_phase, "both": in_all[0] / in_all[1]}.items()}


if __name__ == "__main__":
    main()
