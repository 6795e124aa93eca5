"""Requests to an engine's process, one at a time."""

from __future__ import annotations

from typing import Any

from megatron_vppo.rollout.child import ChildProcess
from megatron_vppo.rollout.records import SAMPLED, Outcome, Sampled


class Session:
    """Sends requests to the engine, one at a time; the `WeightSession` of weight_sender.py."""

    def __init__(self, child: ChildProcess) -> None:
        self._child = child
        self._asked = False

    @property
    def busy(self) -> bool:
        """True from a request until its answer. An engine that is lost says so to every request."""
        return self._asked and not self._child.is_lost

    def call(self, method: str, **arguments: Any) -> Any:
        self.begin(method, **arguments)
        return self.end()

    def begin(self, method: str, **arguments: Any) -> None:
        if self.busy:
            raise RuntimeError(f"{method}: the rollout engine still works on another request")
        self._child.send((method, arguments))
        self._asked = True

    def end(self) -> Any:
        return self.answered(*self._child.receive())

    def end_sampling(self) -> list[Sampled]:
        """Ends the request `sample`. Returns what ended before the engine heard of it, and what it gives back."""
        self._child.send(None)
        late: list[Sampled] = []
        outcome, result = self._child.receive()
        while outcome == SAMPLED:
            late += result
            outcome, result = self._child.receive()
        return late + self.answered(outcome, result)

    def answered(self, outcome: Outcome, result: Any) -> Any:
        """Takes the answer to the request. Raises the error that it may be."""
        self._asked = False
        if outcome == "broken":
            raise self._child.lost(f"cannot go on: {result}")
        if outcome == "refused":
            raise self._child.refusal(result)
        return result

    def start_weight_update(self) -> None:
        self.call("start_weight_update")

    def begin_update_weights(self, update_info: dict[str, Any]) -> None:
        self.begin("update_weights", update_info=update_info)

    def end_update_weights(self) -> None:
        if self.busy:
            self.end()

    def finish_weight_update(self, weight_version: str) -> None:
        self.call("finish_weight_update", weight_version=weight_version)

    def abort_weight_update(self) -> None:
        self.end_update_weights()
        self.call("abort_weight_update")

    def live_digests(self) -> list[dict[str, str]]:
        return self.call("live_digests")
