"""Rewards of responses, computed in worker processes with a time limit.

Responses are submitted and rewards taken while others are sampled. The workers decode the responses to text, too, so
that rank 0 need not. A reward function is foreign code: it may hang, raise, print or end its process. None of that
stops the run. The response gets the reward zero and is counted, and the first case of each kind is logged with its row.
A worker that a signal ended may be no fault of the function's: what it had to grade is graded once more.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, BinaryIO, cast

from megatron_vppo.algorithm.types import Response, Reward
from megatron_vppo.data.columns import RowExtras
from megatron_vppo.data.graders.weighted import BuiltInReward
from megatron_vppo.data.reward_worker import AnyReward, Ungraded, read_message, reward_to_text, write_request
from megatron_vppo.data.text_decoder import TextDecoder
from megatron_vppo.system.processes import child_environment
from megatron_vppo.system.visible import visible

_START_SECONDS = 300.0  # a user's file may import heavy packages
_END_SECONDS = 2.0  # from a closed pipe to the end of its process
_MAX_BATCH_TIMEOUTS = 60
_SHOWN_CHARACTERS = 400

logger = logging.getLogger(__name__)

Job = tuple[int, ...]
"""The tickets of responses that are graded in one call."""


class RewardPool:
    """The workers that grade responses. They end with this process, however it ends.

    A reward function returns a number or a dict with 'overall' for each response. 'accuracy' may be in the dict as
    well; all other entries become metrics. user_reward.py has the ways in which functions are called.
    """

    def __init__(
        self,
        reward: AnyReward,
        *,
        tokenizer: str,
        num_workers: int,
        num_batch_workers: int,
        timeout_seconds: float,
        extras: Callable[[str, int], RowExtras] | None = None,
    ) -> None:
        """
        Args:
            tokenizer: what `describe_tokenizer` returned.
            num_workers: for built-in graders, and a function that takes one response at a time.
            num_batch_workers: for a function that takes lists. Responses are graded in one call, or in one call on each
                worker if there are several, each with a part of them in order.
            timeout_seconds: for one response. A batch of n may take min(n, 60) times as long. If it fails or takes
                longer, its responses are graded again one by one, so that only the culprits get zero.
            extras: reads what a row, of a split and a number, has for reward functions besides its answer. It is called
                when a response goes to a worker, and only for functions that get it.

        Raises:
            ValueError: the function cannot be loaded.
        """
        self._timeout_seconds = timeout_seconds
        self._extras = extras
        self._decoder = TextDecoder(tokenizer)
        self._tokenizer = os.fdopen(os.memfd_create("tokenizer"), "wb")
        self._tokenizer.write(tokenizer.encode())
        self._tokenizer.flush()
        name = reward.main if isinstance(reward, BuiltInReward) else str(reward)
        self._arguments = (name, reward_to_text(reward), self._tokenizer.fileno())
        self._shown: set[str] = set()
        self._workers: list[_Worker] = []
        self._tickets = itertools.count()
        self._ungraded: dict[int, Response] = {}
        """By ticket."""
        self._jobs: deque[Job] = deque()
        """The calls that are still to be made."""
        self._repeated: set[Job] = set()
        self._busy = selectors.DefaultSelector()
        """The answer pipes of the workers that have a job."""
        try:
            first = _Worker(*self._arguments)  # it says how many it takes
            self._workers.append(first)
            first.wait_until_ready()
            self.convention, self.grades_batches = first.convention, first.grades_batches
            self._reads_extras = first.reads_extras
            for _ in range(1, num_batch_workers if self.grades_batches else num_workers):
                self._workers.append(_Worker(*self._arguments))
            for worker in self._workers:
                worker.wait_until_ready()
        except BaseException:
            self.close()
            raise

    @property
    def num_workers(self) -> int:
        """The number of processes."""
        return len(self._workers)

    def submit(self, responses: Sequence[Response]) -> list[int]:
        """Lets workers grade responses, if a batch function is used in one batch. Returns a ticket for each."""
        tickets = list(itertools.islice(self._tickets, len(responses)))
        self._ungraded.update(zip(tickets, responses, strict=True))
        parts = _parts(len(tickets), len(self._workers) if self.grades_batches else len(tickets))
        self._jobs.extend(tuple(tickets[i] for i in part) for part in parts)
        self._hand_out()
        return tickets

    def take(self, seconds: float = 0.0) -> dict[int, tuple[str, Reward]]:
        """Returns what has been graded since the last call, if anything is within `seconds`, by ticket.

        That is the text of a response, without special tokens, and its reward.
        """
        graded: dict[int, tuple[str, Reward]] = {}
        for worker, job, answer in self._next_answers(seconds):
            if not worker.alive:
                self._workers[self._workers.index(worker)] = _Worker(*self._arguments)
            responses = [self._ungraded[ticket] for ticket in job]
            if "scores" in answer:
                for ticket, text, score in zip(job, answer["texts"], answer["scores"], strict=True):
                    graded[ticket] = text, _reward(score)
            elif answer["kind"] == "killed" and job not in self._repeated:
                self._repeated.add(job)
                self._jobs.append(job)
                these = "response is" if len(job) == 1 else f"{len(job)} responses are"
                logger.warning("%s; its %s graded once more", answer["error"], these)
            elif len(job) > 1:
                self._show(answer, f"batch of {len(job)}, which is graded again one by one", responses[0], None)
                self._jobs.extend((ticket,) for ticket in job)
            else:
                text = self._decoder.decode(responses[0].token_ids)  # it comes with scores alone
                self._show(answer, "the reward is zero", responses[0], text)
                graded[job[0]] = text, Reward(overall=0.0, accuracy=0.0, metrics={}, error=answer["error"])
        for ticket in graded:
            del self._ungraded[ticket]
        self._hand_out()
        return graded

    def forget(self) -> None:
        """Drops the responses that no worker has begun to grade. The rewards of the others will still come."""
        for ticket in itertools.chain.from_iterable(self._jobs):
            del self._ungraded[ticket]
        self._jobs.clear()

    def sources(self) -> list[BinaryIO]:
        """Returns what becomes readable when there is something to take."""
        return [worker.answers for worker in self._working()]

    def close(self) -> None:
        """Ends the workers; harmless when repeated."""
        for worker in self._workers:
            worker.kill()
        self._workers = []
        self._busy.close()
        self._tokenizer.close()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _hand_out(self) -> None:
        """Gives each worker without a job one."""
        for i, worker in enumerate(self._workers):
            if self._jobs and worker.job is None:
                if worker.process.poll() is not None:  # died between two jobs
                    logger.warning("%s between two rounds; there is another one now", worker.end())
                    worker.kill()
                    worker = self._workers[i] = _Worker(*self._arguments)
                worker.wait_until_ready()
                job = self._jobs.popleft()
                limit_seconds = self._timeout_seconds * min(len(job), _MAX_BATCH_TIMEOUTS)
                worker.start(job, self._request(job), limit_seconds)
                self._busy.register(worker.answers, selectors.EVENT_READ, worker)

    def _request(self, job: Job) -> list[Ungraded]:
        responses = [self._ungraded[ticket] for ticket in job]
        rows = [(one.prompt.split, one.prompt.row) for one in responses]
        extras: dict[tuple[str, int], bytes] = {}
        if self._reads_extras and self._extras is not None:
            extras = {row: self._extras(*row).to_bytes() for row in dict.fromkeys(rows)}
        return [
            Ungraded(one.token_ids, one.prompt.answer, *row, extras.get(row, b""))
            for one, row in zip(responses, rows, strict=True)
        ]

    def _working(self) -> list[_Worker]:
        return [key.data for key in self._busy.get_map().values()]

    def _next_answers(self, seconds: float) -> list[tuple[_Worker, Job, dict[str, Any]]]:
        """Waits until a busy worker has answered, died or run out of time, but not longer than `seconds`."""
        busy = self._working()
        if not busy:
            return []
        wait = min(worker.deadline for worker in busy) - time.monotonic()
        ready: list[_Worker] = [key.data for key, _ in self._busy.select(max(0.0, min(wait, seconds)))]
        now = time.monotonic()
        late = [worker for worker in busy if worker not in ready and worker.deadline <= now]
        for worker in (*ready, *late):
            self._busy.unregister(worker.answers)
        taken = [(worker, *worker.take_answer()) for worker in ready]
        return taken + [(worker, *worker.give_up()) for worker in late]

    def _show(self, answer: dict[str, str], consequence: str, response: Response, text: str | None) -> None:
        kind = answer["kind"] if text is not None else f"batch: {answer['kind']}"
        if kind in self._shown:
            return
        self._shown.add(kind)
        prompt = response.prompt
        shown = "" if text is None else f"\n  response: {text[:_SHOWN_CHARACTERS]!r}"
        logger.warning(
            "reward function failed (%s) on split %s, row %d: %s%s\n  Further cases of this kind are only counted.",
            consequence, prompt.split, prompt.row, visible(answer["error"]), shown,
        )  # fmt: skip


def _parts(count: int, number: int) -> list[Job]:
    """Divides the responses, in order, among `number` calls, as evenly as possible and none of them empty."""
    number = min(number, count)
    return [tuple(range(count * i // number, count * (i + 1) // number)) for i in range(number)]


def _reward(score: dict[str, Any]) -> Reward:
    vote = score.pop("vote") if isinstance(score.get("vote"), str) else None  # a user's metric is a number
    metrics = {name: value for name, value in score.items() if name not in ("overall", "accuracy")}
    return Reward(overall=score["overall"], accuracy=score["accuracy"], metrics=metrics, vote=vote)


class _Worker:
    """A worker process, with at most one job."""

    def __init__(self, name: str, reward: str, tokenizer: int) -> None:
        environment = {**child_environment(), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "megatron_vppo.data.reward_worker"),
                *(str(os.getpid()), reward, str(tokenizer)),
            ],
            pass_fds=(tokenizer,),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            # Ctrl-C in the terminal is for the trainer, and processes that a function starts end with their worker.
            start_new_session=True,
        )
        self.requests = cast(BinaryIO, self.process.stdin)
        self.answers = cast(BinaryIO, self.process.stdout)
        self._name = name
        self.job: Job | None = None
        self.deadline = 0.0
        self.alive = True
        self._ready = False
        self.convention = ""
        """The kind of function, for a person, once it is ready."""
        self.grades_batches = False
        """True if it takes lists, once it is ready."""
        self.reads_extras = False
        """True if it takes what rows have besides their answers, once it is ready."""

    def wait_until_ready(self) -> None:
        """Waits for the process to load the function.

        Raises:
            ValueError: it does not.
            RuntimeError: a signal has ended it, which may be no fault of the function's.
        """
        if self._ready:
            return
        with selectors.DefaultSelector() as selector:
            selector.register(self.answers, selectors.EVENT_READ)
            if not selector.select(_START_SECONDS):
                self.kill()
                raise ValueError(
                    f"reward.reward_function={self._name}: not imported after {_START_SECONDS:.0f} s; its imports hang"
                )
        try:
            answer = read_message(self.answers)
        except EOFError:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_END_SECONDS)
            self.kill()
            kind = ValueError if self.process.returncode >= 0 else RuntimeError
            raise kind(
                f"reward.reward_function={self._name}: its process ended while starting "
                f"(exit code {self.process.returncode})"
            ) from None
        if "fatal" in answer:
            self.kill()
            raise ValueError(f"the reward function cannot be loaded:\n{answer['fatal']}")
        self.convention, self.grades_batches = answer["convention"], answer["batch"]
        self.reads_extras = answer["reads_extras"]
        self._ready = True

    def start(self, job: Job, ungraded: Sequence[Ungraded], limit_seconds: float) -> None:
        self.job, self._limit_seconds = job, limit_seconds
        with contextlib.suppress(BrokenPipeError):  # it died; its closed answer pipe tells at once
            write_request(self.requests, ungraded)
        self.deadline = time.monotonic() + limit_seconds

    def take_answer(self) -> tuple[Job, dict[str, Any]]:
        """Returns the finished job, and its {'texts', 'scores'} or {'error', 'kind'}."""
        job = self._end_job()
        try:
            return job, read_message(self.answers)
        except EOFError:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_END_SECONDS)  # for its own exit code, and not that of the kill
            self.kill()
            return job, {"error": self.end(), "kind": "killed" if self.process.returncode < 0 else "died"}

    def give_up(self) -> tuple[Job, dict[str, Any]]:
        """Ends a worker that is late. Returns its job, and {'error', 'kind'}."""
        self.kill()
        return self._end_job(), {"error": f"no result after {self._limit_seconds:g} s", "kind": "timeout"}

    def _end_job(self) -> Job:
        assert self.job is not None
        job, self.job = self.job, None
        return job

    def end(self) -> str:
        """Describes how the process ended."""
        return f"the worker process ended (exit code {self.process.returncode})"

    def kill(self) -> None:
        self.alive = False
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.requests, self.answers):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
