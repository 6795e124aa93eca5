"""The engine process's sampling: prompts come while it goes on, and completions leave as they end."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from megatron_vppo.rollout.records import SAMPLED, UNFINISHED, Completion, Sampled, SampleRequest, SamplingSettings

if TYPE_CHECKING:
    from vllm import LLM

BATCHES_AHEAD = 2
"""Forward passes that vLLM may have begun on GPUs when requests are dropped: it schedules one while another runs."""
TOKENS_PER_PIECE = 16
"""Tokens that vLLM hands out together where it hands them out before the end. Up to 15 are lost of a completion that is
unfinished when sampling ends."""


class SamplingLoop:
    """One request to sample, from its begin to its end."""

    def __init__(
        self, llm: LLM, settings: SamplingSettings, *, banned: Mapping[int, float] | None, report: Callable[[], None]
    ) -> None:
        """
        Args:
            llm: was made with stream_interval=TOKENS_PER_PIECE.
            banned: the logit bias of tokens that are never sampled.
            report: called after each prompt and each forward pass.
        """
        self._llm, self._settings, self._banned, self._report = llm, settings, banned, report
        self._version = int(llm.get_weight_version())
        self._running: dict[str, _Running] = {}
        """By vLLM's names."""

    def run(self, connection: Connection, tell: Callable[[Any], None]) -> list[Sampled]:
        """Samples until the end. Returns what is then unfinished, if it is to be kept.

        Args:
            connection: brings requests by their numbers, and None as the end.
            tell: sends completions as they end.

        Raises whatever vLLM does about a request; it keeps none of the others then.
        """
        while True:
            while connection.poll(0 if self._running else None):
                asked: dict[int, SampleRequest] | None = connection.recv()
                if asked is None:
                    self._drop()
                    kept = self._running.values() if self._settings.keeps_unfinished else ()
                    return [one.sampled(UNFINISHED, self._version) for one in kept]
                for number, request in asked.items():
                    try:
                        self._add(number, request)
                    except Exception:
                        self._drop()
                        raise
                    self._report()
            ended = self._step()
            self._report()
            if ended:
                tell((SAMPLED, ended))

    def _step(self) -> list[Sampled]:
        """Runs one forward pass. Returns the completions that end with it."""
        ended = []
        for output in self._llm.llm_engine.step():
            (piece,) = output.outputs
            self._running[output.request_id].add(piece)
            if output.finished:
                ended.append(self._running.pop(output.request_id).sampled(piece.finish_reason, self._version))
        return ended

    def _drop(self) -> None:
        self._llm.llm_engine.abort_request(list(self._running))
        for _ in range(BATCHES_AHEAD):
            self._llm.llm_engine.step()

    def _add(self, number: int, request: SampleRequest) -> None:
        """Adds the completions of a request, one by one."""
        for sample, seed in enumerate(request.seeds):
            begun = request.begun[sample] if request.begun else ()
            prompt: dict[str, Any] = {"prompt_token_ids": [*request.token_ids, *begun]}
            if request.images:
                prompt["multi_modal_data"] = {"image": list(request.images)}
            params = self._sampling_params(seed, max_tokens=self._settings.max_tokens - len(begun))
            (rendered,) = self._llm.renderer.render_cmpl([prompt])
            name = f"{number}/{sample}"
            self._llm.llm_engine.add_request(name, rendered, params)
            self._running[name] = _Running(number, sample, self._settings.likeliest_tokens)

    def _sampling_params(self, seed: int | None, *, max_tokens: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        settings = self._settings
        return SamplingParams(
            n=1,
            seed=seed,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            max_tokens=max_tokens,
            stop_token_ids=list(settings.stop_token_ids),
            ignore_eos=True,  # only stop_token_ids end a response
            # Minus infinity, so that the probability is exactly zero; vLLM's own helper would clamp it to -100.
            logit_bias=self._banned,
            logprobs=settings.likeliest_tokens,  # and of the sampled token
            detokenize=False,
            # In pieces only where they may be wanted before the end: each piece takes time.
            output_kind=RequestOutputKind.DELTA if settings.keeps_unfinished else RequestOutputKind.FINAL_ONLY,
        )


@dataclass
class _Running:
    """A completion that is being sampled."""

    number: int
    sample: int
    likeliest_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    likeliest_ids: array[int] = field(default_factory=lambda: array("i"))
    likeliest_logps: array[float] = field(default_factory=lambda: array("f"))  # float32, as vLLM has them

    def add(self, piece: Any) -> None:
        """Takes a CompletionOutput of vLLM, which has all tokens or those since the last one."""
        self.token_ids += piece.token_ids
        self.logps += [step[token].logprob for token, step in zip(piece.token_ids, piece.logprobs, strict=True)]
        if self.likeliest_tokens:
            for step in piece.logprobs:
                # The sampled token is among them or comes besides: it goes if it is not as likely as the others.
                likeliest = sorted(step.items(), key=lambda item: -item[1].logprob)[: self.likeliest_tokens]
                self.likeliest_ids.extend(token for token, _ in likeliest)
                self.likeliest_logps.extend(found.logprob for _, found in likeliest)

    def sampled(self, finish_reason: str, version: int) -> Sampled:
        return Sampled(
            self.number,
            self.sample,
            Completion(
                tuple(self.token_ids),
                tuple(self.logps),
                finish_reason,
                version,
                self.likeliest_ids,
                self.likeliest_logps,
            ),
        )
