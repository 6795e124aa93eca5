"""The rollout engines as the loop sees them. Some of the trainer ranks lead an engine each."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch.distributed as dist
from torch import Tensor

from megatron_vppo.algorithm.types import Prompt, Response
from megatron_vppo.config.choices import VerifyWeights
from megatron_vppo.data.images import VisionInputs
from megatron_vppo.rollout.child import EngineLost
from megatron_vppo.rollout.conductor import Conductor, EngineLink, FarEngine, OwnEngine, Work, lead
from megatron_vppo.rollout.draw import Draw
from megatron_vppo.rollout.engine import RolloutEngine
from megatron_vppo.rollout.mailbox import Inbox, Mailbox
from megatron_vppo.rollout.records import Ask, SampleRequest, SamplingSettings, SyncReport
from megatron_vppo.rollout.recovery import EngineRecovery
from megatron_vppo.rollout.sharing import SampledGroups, share_groups
from megatron_vppo.rollout.transfer.bundle import drain
from megatron_vppo.system.agreement import any_rank
from megatron_vppo.system.stop_signals import StopRequested

IMAGE_THREADS = 8
"""Threads of a rank that read the images of new requests."""
_ENDED = "ended"
"""The key that rank 0 sets when it has sampled."""
_LOOK_SECONDS = 0.2
"""The time between two looks of a rank without an engine."""


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
        store: dist.Store,
        max_num_seqs: int,
        stop_wanted: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            engine: the engine that this rank leads; None on the other ranks.
            engine_index: the number of that engine; None if this rank leads none.
            verify: the weight syncs after which checksums are compared.
            store: joins the ranks that lead engines with rank 0; this sampler alone uses it.
            max_num_seqs: the responses that an engine samples at once.
            stop_wanted: returns True if sampling is to be cut off; it need not be true on all ranks.
        """
        self._engine = engine
        self._engine_index = engine_index
        self._num_engines = num_engines
        self._images = images
        self._verify = verify
        self._store = store
        self._max_num_seqs = max_num_seqs
        self._stop_wanted = stop_wanted
        self._num_syncs = 0
        self._num_samplings = 0
        self._version = -1
        self._report: SyncReport | None = None
        """The last transfer to this rank's engine."""
        self._recovery: EngineRecovery | None = None

    def recover_with(self, recovery: EngineRecovery) -> None:
        """Lets engines that are lost be started again. Without this call, a lost engine ends the run."""
        self._recovery = recovery

    def sample(self, work: Callable[[], Work], settings: SamplingSettings) -> float:
        """Samples until it is decided which groups count. Responses go to the judge, on rank 0 alone.

        What a lost engine has not finished the others sample, with the same seeds. If all are lost, everything begins
        again, so that engines put the same responses into a batch as if none had been lost: on that depend the last
        bits of log-probs.

        Args:
            work: returns what is to be done, which is the same every time; called on rank 0.

        Returns:
            The seconds in which engines had nothing to do, since only grading was left; on rank 0, and else 0.

        Raises StopRequested on every rank if sampling was cut off on one.
        """
        while True:
            conductor = Conductor(work(), stop_wanted=self._stop_wanted) if dist.get_rank() == 0 else None
            lost, cut, inboxes = None, False, list[Mailbox]()
            try:
                lost = self._sample(conductor, settings, inboxes)
            except EngineLost as error:
                lost = error
            except StopRequested:
                cut = True
            # SLURM may end an engine together with the run that it asks to stop.
            stop = any_rank(cut or (lost is not None and self._stop_wanted()))
            for inbox in inboxes:
                inbox.clear()  # of what came too late
            if conductor is not None:
                self._line().delete_key(_ENDED)
            if stop:
                raise StopRequested
            self._recovered(lost, stop_wanted=self._stop_wanted)
            if any_rank(conductor is not None and conductor.is_done):
                return 0.0 if conductor is None else conductor.idle_seconds

    def _sample(
        self, conductor: Conductor | None, settings: SamplingSettings, inboxes: list[Mailbox]
    ) -> EngineLost | None:
        """Does this rank's part. Returns the error of its engine if that is lost, or raises it.

        Args:
            conductor: on rank 0.
            inboxes: gets the mailboxes from which this rank takes.
        """
        self._num_samplings += 1
        line = self._line()
        if conductor is not None:
            links: dict[int, EngineLink] = {}
            inboxes.append(Mailbox(line, "to rank 0"))
            inbox = Inbox(inboxes[0])
            for number in set(range(self._num_engines)) - {self._engine_index}:
                links[number] = FarEngine(number, Mailbox(line, f"to {number}"), inbox)
            if self._engine is not None and self._engine_index is not None:  # last, since it has to read images
                links[self._engine_index] = OwnEngine(self._engine, settings, self._requests)
            try:
                errors = conductor.run(links, capacity=self._max_num_seqs, look=inbox.look)
            finally:
                line.set(_ENDED, "")
            return None if self._engine_index is None else errors.get(self._engine_index)
        if self._engine is not None and self._engine_index is not None:
            inboxes.append(Mailbox(line, f"to {self._engine_index}"))
            lead(
                self._engine_index, self._engine, settings, inboxes[0], Mailbox(line, "to rank 0"),
                requests=self._requests, stop_wanted=self._stop_wanted,
            )  # fmt: skip
            return None
        # Not in a collective, which has a time limit that sampling has not.
        while not line.check([_ENDED]):
            time.sleep(_LOOK_SECONDS)
        return None

    def _line(self) -> dist.Store:
        """Returns the messages of the present sampling."""
        return dist.PrefixStore(f"sampling {self._num_samplings}", self._store)

    def generate(
        self, prompts: Sequence[Prompt], *, seeds: Sequence[Sequence[int | None]], sampling: SamplingSettings
    ) -> list[list[Response]]:
        """Samples len(seeds[i]) responses to prompt i, each prompt with as many. Every rank returns all groups."""
        size = len(seeds[0]) if seeds else 0
        tries: list[SampledGroups] = []

        def work() -> Work:
            tries.append(SampledGroups(prompts.__getitem__, size=size))
            draw = Draw(wanted=len(prompts), most=len(prompts), responses=size, order="draw")
            return Work(draw, lambda number: Ask(prompts[number], tuple(seeds[number])), tries[-1])

        self.sample(work, sampling)
        return share_groups(lambda: [tries[-1].responses(number) for number in range(len(prompts))])

    def _requests(self, asks: Mapping[int, Ask]) -> dict[int, SampleRequest]:
        """Makes what the engine is asked. It waits for all images, so threads read them: decoding needs no lock."""
        with ThreadPoolExecutor(IMAGE_THREADS, thread_name_prefix="images") as threads:
            images = [threads.map(self._images.image, ask.prompt.images) for ask in asks.values()]
            return {
                number: SampleRequest(
                    token_ids=ask.prompt.compact_token_ids,
                    images=tuple(of_prompt),
                    seeds=ask.seeds,
                    begun=ask.begun,
                )
                for (number, ask), of_prompt in zip(asks.items(), images, strict=True)
            }

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
