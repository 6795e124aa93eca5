"""The engine process: `python -m megatron_vppo.rollout.engine_process FD FOLDER`, started by `child.ChildProcess`.

It reads its EngineSettings from the socket FD, builds one vLLM engine and sends the list of its weights. Then it
answers requests (method name, keyword arguments) with ("done", result), ("refused", error) or ("broken", error) until
the socket closes. `sample` goes on until it is told to end: meanwhile prompts come, and completions leave as they end.
While it samples, it says now and then that it makes progress. FOLDER, for its temporary files, is
removed when it ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from megatron_vppo.rollout import os_processes
from megatron_vppo.rollout.records import EngineSettings, LiveWeight, Sampled, SamplingSettings
from megatron_vppo.rollout.sampling_loop import TOKENS_PER_PIECE, SamplingLoop
from megatron_vppo.rollout.serving import serve

WATCH_SECONDS = 0.2
PROGRESS_SECONDS = 1.0
"""The least time between two signs of progress."""
TERM_SECONDS = 3.0
"""The time that vLLM's helpers have to remove their shared memory before they are killed."""


def start_watchdog(folder: str) -> None:
    """Forks a process that waits for this one or its parent to end, and then removes the folder and kills this group.

    It is a process, because a thread could be held up by a kernel that holds the interpreter's lock. It is forked
    before anything large is imported. It looks at parent ids: an open pipe could be held open by another child of the
    trainer, and PR_SET_PDEATHSIG would depend on the thread of the trainer that started us.
    """
    engine_pid, trainer_pid = os.getpid(), os.getppid()
    if os.fork() != 0:
        return
    os.closerange(0, 256)
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    while os.getppid() == engine_pid and os_processes.parent_of(engine_pid) == trainer_pid:
        time.sleep(WATCH_SECONDS)
    shutil.rmtree(folder, ignore_errors=True)  # first, since the trainer soon kills the whole group
    os.killpg(engine_pid, signal.SIGTERM)
    deadline = time.monotonic() + TERM_SECONDS
    while time.monotonic() < deadline and len(os_processes.members(engine_pid)) > 1:
        time.sleep(0.05)
    os.killpg(engine_pid, signal.SIGKILL)


class Engine:
    """A vLLM engine. Each public method is a request."""

    def __init__(self, settings: EngineSettings) -> None:
        _quieten_vllm()
        from vllm import LLM

        from megatron_vppo.rollout.transfer import weight_receiver

        weight_receiver.register()
        options: dict[str, Any] = {}
        if settings.device == "cpu":
            # With an explicit size vLLM need not profile.
            options["kv_cache_memory_bytes"] = int(settings.cpu_kv_cache_gib * 2**30)
            # With the default, 128, responses to one prompt would share its KV cache only in steps of 128 tokens.
            options["block_size"] = CPU_BLOCK_SIZE
            # A prompt that is prefilled in parts ends vLLM 0.32 on CPU ("CPU Generator does not use offset"): vLLM
            # rewinds the generator of a seeded response then, which torch cannot do on CPU.
            options["enable_chunked_prefill"] = False
            options["max_num_batched_tokens"] = max(CPU_BATCHED_TOKENS, settings.max_model_len, settings.max_num_seqs)
        else:
            options["gpu_memory_utilization"] = settings.gpu_memory_utilization
            options["enable_sleep_mode"] = settings.can_sleep
        if settings.quantization is not None:
            options["quantization"] = settings.quantization
            options["quantization_config"] = {"ignore": list(settings.unquantized_layers)}
        self._banned = {token: float("-inf") for token in settings.banned_token_ids} or None
        self._llm = LLM(
            settings.model,
            dtype=settings.dtype,
            tensor_parallel_size=settings.tensor_parallel_size,
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            limit_mm_per_prompt={"image": settings.images_per_prompt, "video": 0},
            mm_processor_kwargs=dict(settings.mm_processor_kwargs) or None,
            hf_overrides=dict(settings.hf_overrides),
            # Otherwise the model gets bytes and normalises them itself, in another order of operations.
            mm_device_do_normalize=False,
            skip_mm_profiling=settings.device == "cpu",
            seed=settings.seed,
            enforce_eager=settings.enforce_eager,
            load_format=weight_receiver.EMPTY_LOAD_FORMAT if settings.load_format == "empty" else settings.load_format,
            generation_config="vllm",  # nothing of the checkpoint's own sampling defaults
            logprobs_mode="processed_logprobs",
            enable_prefix_caching=True,
            stream_interval=TOKENS_PER_PIECE,
            weight_transfer_config={"backend": weight_receiver.BACKENDS[settings.weight_transfer]},
            worker_extension_cls="megatron_vppo.rollout.worker.WorkerExtension",
            **options,
        )
        self._llm.init_weight_transfer_engine({"init_info": {}})
        self._llm.update_weight_version("-1")
        self._report: Callable[[], None] = lambda: None

    def live_weights(self) -> list[list[LiveWeight]]:
        return self._llm.collective_rpc("vppo_live_weights")

    def live_digests(self) -> list[dict[str, str]]:
        return self._llm.collective_rpc("vppo_live_digests")

    def sample(
        self, settings: SamplingSettings, *, connection: Connection, tell: Callable[[Any], None]
    ) -> list[Sampled]:
        """Samples what is asked for, until it is told to end. Returns what is then unfinished, if it is to be kept."""
        loop = SamplingLoop(self._llm, settings, banned=self._banned, report=self._report)
        return loop.run(connection, tell)

    def preserve_over_sleep(self, parameters: list[str]) -> None:
        self._llm.collective_rpc("vppo_preserve_over_sleep", args=(parameters,))

    def sleep(self, keep_weights: bool) -> list[list[str]]:
        """Sends vLLM to sleep, at level 1 with its weights in host memory, at level 2 without weights.

        Returns, for each worker, the names of the tensors that we saved because vLLM loses them at level 2.
        """
        saved = [] if keep_weights else self._llm.collective_rpc("vppo_save_scratch")
        self._llm.sleep(level=1 if keep_weights else 2)
        return saved

    def wake(self, tag: str) -> None:
        self._llm.wake_up([tag])
        if tag == "weights":
            self._llm.collective_rpc("vppo_restore_scratch")

    def start_weight_update(self) -> None:
        self._llm.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str) -> None:
        """Ends the transfer and drops everything computed with the old weights, which vLLM does not do by itself."""
        self._llm.finish_weight_update(weight_version)
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: requests are still running")
        self._llm.reset_mm_cache()
        self._llm.llm_engine.reset_encoder_cache()

    def abort_weight_update(self) -> None:
        """Ends a session that failed, so that the next one can start. The weights are then a mixture of old and new."""
        with contextlib.suppress(RuntimeError):  # vLLM has ended the session if update_weights failed
            self._llm.finish_weight_update()

    def shutdown(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()

    def call_on_progress(self, report: Callable[[], None]) -> None:
        """Lets `report` be called, at most once in PROGRESS_SECONDS, while requests are prepared and sampled.

        That is after each prompt, whose images are processed, and after each forward pass.
        """
        last = time.monotonic()

        def report_now_and_then() -> None:
            nonlocal last
            if time.monotonic() - last > PROGRESS_SECONDS:
                last = time.monotonic()
                report()

        self._report = report_now_and_then

    @property
    def is_broken(self) -> bool:
        """True if a failure left requests inside vLLM, which would go on in the next `generate`, or ended a worker."""
        inner = self._llm.llm_engine
        return inner.has_unfinished_requests() or getattr(inner.model_executor, "is_failed", False)


CPU_BLOCK_SIZE = 32
"""Tokens per block of the KV cache; the smallest number with which vLLM's CPU attention is fast."""

CPU_BATCHED_TOKENS = 4096
"""Tokens of one forward pass, unless one sequence is longer."""


def _quieten_vllm() -> None:
    """Drops a line that vLLM's CPU worker logs for every image, once it has replaced torch.set_num_threads."""

    class SkipThreadCounts(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            return "torch.set_num_threads" not in record.getMessage()

    logging.getLogger("vllm.v1.worker.cpu_worker").addFilter(SkipThreadCounts())


def main() -> None:
    os.set_inheritable(int(sys.argv[1]), False)
    start_watchdog(sys.argv[2])
    status = 1
    try:
        connection = Connection(int(sys.argv[1]))
        start = time.perf_counter()
        engine = Engine(connection.recv())
        os_processes.unlink_shared_memory(os.getpgrp())
        print(f"engine ready after {time.perf_counter() - start:.1f} s", flush=True)
        connection.send(("done", engine.live_weights()))
        serve(connection, engine)
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(status)  # a normal exit waits seconds for vLLM's threads


if __name__ == "__main__":
    main()
