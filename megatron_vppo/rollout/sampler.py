"""The rollout engines as the loop sees them. Some of the trainer ranks lead an engine each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

from torch import Tensor

from megatron_vppo.algorithm.types import Prompt, Response
from megatron_vppo.config.choices import SeedKind, VerifyWeights
from megatron_vppo.data.images import VisionInputs
from megatron_vppo.rollout.child import EngineLost
from megatron_vppo.rollout.engine import RolloutEngine
from megatron_vppo.rollout.gathering import gather_responses
from megatron_vppo.rollout.records import Completion, SampleRequest, SamplingSettings, SyncReport
from megatron_vppo.rollout.recovery import EngineRecovery
from megatron_vppo.rollout.seeds import sample_seeds
from megatron_vppo.rollout.transfer.bundle import drain
from megatron_vppo.system.agreement import any_rank
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
        self._version = -1
        self._report: SyncReport | None = None
        """The last transfer to this rank's engine."""
        self._recovery: EngineRecovery | None = None

    def recover_with(self, recovery: EngineRecovery) -> None:
        """Lets engines that are lost be started again. Without this call, a lost engine ends the run."""
        self._recovery = recovery

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        seeds: Sequence[Sequence[int | None]],
        sampling: SamplingSettings,
        first_group: int = 0,
    ) -> list[list[Response]]:
        """Samples len(seeds[i]) responses to prompt i. Every rank returns all groups, in the order of the prompts.

        An engine that was lost is asked all of its prompts again, with the same seeds.

        Raises StopRequested on every rank if sampling was cut off on one.
        """
        share = range(self._engine_index or 0, len(prompts), self._num_engines)
        sampled: list[list[Completion]] | None = None
        while True:
            lost = None
            if self._engine is not None and sampled is None:
                requests = self._requests(prompts, seeds, share)
                try:
                    sampled = self._engine.generate(requests, sampling, stop_wanted=self._stop_wanted)
                except StopRequested:
                    pass
                except EngineLost as error:
                    lost = error
            # SLURM may end an engine together with the run that it asks to stop.
            if any_rank(sampled is None and self._engine is not None and self._stop_wanted()):
                raise StopRequested
            if not self._recovered(lost, stop_wanted=self._stop_wanted):
                break
        mine = {} if sampled is None else dict(zip(share, sampled, strict=True))
        return gather_responses(mine, prompts, first_group=first_group)

    def _requests(
        self, prompts: Sequence[Prompt], seeds: Sequence[Sequence[int | None]], share: Sequence[int]
    ) -> list[SampleRequest]:
        return [
            SampleRequest(
                token_ids=prompts[i].compact_token_ids,
                images=tuple(self._images.image(ref) for ref in prompts[i].images),
                seeds=tuple(seeds[i]),
            )
            for i in share
        ]

    def send_weights(
        self, weights: Iterator[tuple[str, Tensor]], *, version: int, kept: Collection[str] = ()
    ) -> dict[str, float]:
        """Sends the policy's weights to every engine. Every rank takes part in gathering them.

        An engine that is lost is started again, and gets the present weights whole.

        Args:
            kept: names of tensors that do not come, because the engines have them from the first transfer.

        Raises RuntimeError on a rank whose engine then holds other bits than were sent.
        """
        verify = self._verify == "always" or (self._verify == "first" and self._num_syncs == 0)
        self._num_syncs += 1
        self._version = version
        lost = None
        if self._engine is None:
            drain(weights)
        else:
            try:
                self._report = self._engine.send_weights(weights, version=version, verify=verify, kept=kept)
            except EngineLost as error:
                lost = error
        self._recovered(lost)  # whatever is wanted: these weights are those of a step that has been taken
        if self._report is None:
            return {}
        counts = {
            "weight_sync/bytes": float(self._report.num_bytes),
            "weight_sync/tensors": float(self._report.num_tensors),
        }
        return {**counts, "weight_sync/checksums_ok": 1.0} if self._report.checksums_ok else counts

    def take_restarts(self) -> int:
        """Returns how often engines were started again since the last call."""
        return self._recovery.take_restarts() if self._recovery is not None else 0

    def _recovered(self, lost: EngineLost | None, *, stop_wanted: Callable[[], bool] = lambda: False) -> bool:
        """Returns False if no rank has lost its engine, and True once all engines have the present weights again."""
        if self._recovery is None:
            if lost is not None:
                raise lost
            return False
        if not any_rank(lost is not None):
            return False
        self._recovery.recover(lost, self._send_again, stop_wanted=stop_wanted)
        return True

    def _send_again(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Sends all of the present weights to this rank's engine, which has just started."""
        assert self._engine is not None
        verify = self._verify != "never"
        self._report = self._engine.send_weights(weights, version=self._version, verify=verify)

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
