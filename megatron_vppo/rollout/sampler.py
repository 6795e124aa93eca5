"""The rollout engines as the loop sees them. Some of the trainer ranks lead an engine each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch.distributed as dist
from torch import Tensor

from megatron_vppo.algorithm.types import Prompt, Response
from megatron_vppo.config.choices import SeedKind, VerifyWeights
from megatron_vppo.data.images import VisionInputs
from megatron_vppo.rollout.engine import RolloutEngine
from megatron_vppo.rollout.records import SampleRequest, SamplingSettings
from megatron_vppo.rollout.seeds import sample_seeds
from megatron_vppo.system.stop_signals import StopRequested


class EngineSampler:
    """Samples with all engines together. Every method but `close` is a collective over all trainer ranks."""

    def __init__(
        self,
        engine: RolloutEngine | None,
        *,
        engine_index: int | None,
        num_engines: int,
        images: VisionInputs,
        verify: VerifyWeights,
        stop_wanted: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            engine: the engine that this rank leads; None on the other ranks.
            engine_index: the number of that engine, which decides its share of the prompts.
            verify: the weight syncs after which checksums are compared.
            stop_wanted: returns True if sampling is to be cut off; it need not be true on all ranks.
        """
        self._engine = engine
        self._engine_index = engine_index
        self._num_engines = num_engines
        self._images = images
        self._verify = verify
        self._stop_wanted = stop_wanted
        self._num_syncs = 0

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        seeds: Sequence[Sequence[int | None]],
        sampling: SamplingSettings,
        first_group: int = 0,
    ) -> list[list[Response]]:
        """Samples len(seeds[i]) responses to prompt i. Every rank returns all groups, in the order of the prompts.

        Raises StopRequested on every rank if sampling was cut off on one.
        """
        try:
            mine = self._share(prompts, seeds, sampling, first_group)
        except StopRequested:
            mine = None
        gathered: list[dict[int, list[Response]] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, mine)
        by_prompt: dict[int, list[Response]] = {}
        for part in gathered:
            if part is None:
                raise StopRequested
            by_prompt |= part
        return [by_prompt[i] for i in range(len(prompts))]

    def _share(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[Sequence[int | None]],
        sampling: SamplingSettings,
        first_group: int,
    ) -> dict[int, list[Response]]:
        """Samples the responses to this rank's share of the prompts; {} if it leads no engine."""
        mine: dict[int, list[Response]] = {}
        if self._engine is not None:
            share = range(self._engine_index or 0, len(prompts), self._num_engines)
            requests = [
                SampleRequest(
                    token_ids=prompts[i].compact_token_ids,
                    images=tuple(self._images.image(ref) for ref in prompts[i].images),
                    seeds=tuple(seeds[i]),
                )
                for i in share
            ]
            sampled = self._engine.generate(requests, sampling, stop_wanted=self._stop_wanted)
            for i, completions in zip(share, sampled, strict=True):
                mine[i] = [
                    Response(
                        prompt=prompts[i],
                        group_id=first_group + i,
                        sample=sample,
                        token_ids=tuple(completion.token_ids),
                        rollout_logps=tuple(completion.logps),
                        finish_reason=completion.finish_reason,
                        weight_version=completion.weight_version,
                    )
                    for sample, completion in enumerate(completions)
                ]
        return mine

    def send_weights(
        self, weights: Iterator[tuple[str, Tensor]], *, version: int, kept: Collection[str] = ()
    ) -> dict[str, float]:
        """Sends the policy's weights to every engine. Every rank takes part in gathering them.

        Args:
            kept: names of tensors that do not come, because the engines have them from the first transfer.

        Raises RuntimeError on a rank whose engine then holds other bits than were sent.
        """
        verify = self._verify == "always" or (self._verify == "first" and self._num_syncs == 0)
        self._num_syncs += 1
        if self._engine is None:
            for _ in weights:
                pass
            return {}
        report = self._engine.send_weights(weights, version=version, verify=verify, kept=kept)
        metrics = {"weight_sync/bytes": float(report.num_bytes), "weight_sync/tensors": float(report.num_tensors)}
        return {**metrics, "weight_sync/checksums_ok": 1.0} if verify else metrics

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()


def group_seeds(
    prompts: Sequence[Prompt], *, kind: SeedKind, run_seed: int, step: int, attempt: int, n: int
) -> list[tuple[int | None, ...]]:
    """Returns one seed per response to each prompt; the kinds are those of rollout/seeds.py."""
    return [
        sample_seeds(kind, n=n, run_seed=run_seed, step=step, attempt=attempt, split=p.split, row=p.row)
        for p in prompts
    ]
