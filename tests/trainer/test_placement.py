"""The use of the device in each phase. The real loop drives the real placement over a device that only counts bytes.

What is not under test: whether Megatron and vLLM really give back what they are asked for (tests/parallel/
test_offload.py, tests/gpu).
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_vppo.algorithm.types import GradedResponse, Prompt, Response, Reward, Scores
from megatron_vppo.config.schema import RunConfig
from megatron_vppo.observability.metrics import RunLog
from megatron_vppo.system.watchdog import Watchdog
from megatron_vppo.trainer.loop import Run, train
from megatron_vppo.trainer.placement import Placement
from megatron_vppo.trainer.stopping import UNCUT, Stopping

PARAMS, GRADS, OPTIMIZER = 16, 32, 24
WEIGHTS, KV_CACHE = 16, 60
SCORING, UPDATING, BUFFERS = 20, 30, 2
"""GiB: activations of a scoring and an update pass, and what a transfer packs weights into."""
SIZES = {"params": PARAMS, "grads": GRADS, "optimizer": OPTIMIZER, "weights": WEIGHTS, "kv_cache": KV_CACHE}
ALL = ("params", "grads", "optimizer")


class Device:
    """Bytes held by name, what happened in order, and the most that was ever held."""

    def __init__(self, *, engine_awake: bool) -> None:
        self.held = {name: SIZES[name] for name in ALL}
        self.events: list[str] = []
        self.peak = 0
        if engine_awake:
            self.take("weights", "kv_cache")

    def take(self, *names: str) -> None:
        for name in names:
            assert name not in self.held, f"{name} is there already"
            self.held[name] = SIZES[name]
        self.peak = max(self.peak, sum(self.held.values()))

    def leave(self, *names: str) -> None:
        for name in names:
            del self.held[name]

    @contextmanager
    def work(self, what: str, room: int, *needed: str) -> Iterator[None]:
        missing = set(needed) - self.held.keys()
        assert not missing, f"{what} without {missing}"
        self.events.append(what)
        self.peak = max(self.peak, sum(self.held.values()) + room)
        yield


class Trainer:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.version = 0

    def offload(self, parts: Collection[str]) -> None:
        self.device.events.append(f"offload {' '.join(sorted(parts))}")
        self.device.leave(*parts)

    def reload(self, parts: Collection[str]) -> None:
        self.device.events.append(f"reload {' '.join(sorted(parts))}")
        self.device.take(*parts)

    def empty_cache(self) -> None:
        pass


class Engine:
    """Knows which weights it has; memory that it woke without a load holds none."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.version: int | None = None

    def sleep(self, *, keep_weights: bool) -> None:
        self.device.events.append("sleep, keeping weights" if keep_weights else "sleep")
        self.device.leave(*{"weights", "kv_cache"} & self.device.held.keys())
        if not keep_weights:
            self.version = None

    def wake(self, tag: str) -> None:
        self.device.events.append(f"wake {tag}")
        self.device.take(tag)


def _group() -> list[GradedResponse]:
    prompt = Prompt("train", 0, "q", "a", (1,), (1,), (), ())
    responses = [Response(prompt, 0, sample, (5, 6), (-1.0, -1.0), "stop", 0) for sample in range(2)]
    return [GradedResponse(r, "", Reward(float(r.sample), float(r.sample), {})) for r in responses]


def make_run(
    folder: Path, *, offloads: tuple[str, ...], sleeps: bool, steps: int, skipped: Collection[int] = (), **trainer: Any
) -> tuple[Run, Device]:
    device = Device(engine_awake=not sleeps)
    weights, engine = Trainer(device), Engine(device)
    scores = Scores(*(torch.full((2, 2), -1.0) for _ in range(3)), None)

    def send_weights(stream: Any, *, version: int, kept: Collection[str] = ()) -> dict[str, float]:
        with device.work(f"load {version}", BUFFERS, "params", "weights"):
            engine.version = weights.version
        return {}

    def sample(what: str) -> None:
        with device.work(what, 0, "weights", "kv_cache"):
            assert engine.version == weights.version, "the engine serves the trainer's present weights"

    def groups(step: int, log: RunLog) -> list[Any]:
        for attempt in range(2):  # as many rounds as a resampling collector may take
            sample(f"sample {step}.{attempt}")
        return [] if step in skipped else [_group()]

    def score(*args: Any, **kwargs: Any) -> Scores:
        with device.work("score", SCORING, "params"):
            return scores

    def update(batch: Any) -> dict[str, float]:
        with device.work("update", UPDATING, *ALL):
            weights.version += 1
        return {}

    def validate(step: int) -> dict[str, float]:
        sample("validate")
        return {"val/accuracy": 0.5}

    def save(step: int, *, unfinished_step: Any = None) -> None:
        with device.work(f"save {step}", 0, "params", "optimizer"):
            pass

    config = RunConfig.model_validate(
        {
            "data": {"train_files": "x", "rollout_batch_size": 1},
            "model": {"path": "y"},
            "actor": {"global_batch_size": 1},
            "rollout": {"n": 2},
            "trainer": {"val_freq": -1, "save_freq": -1, "val_before_train": False, **trainer},
        }
    )
    placement = Placement(
        weights,
        engine,
        offloads=offloads,  # type: ignore[arg-type]
        engines_sleep=sleeps,
        barrier=lambda: device.events.append("barrier"),
    )
    parts: dict[str, Any] = {
        "policy": SimpleNamespace(
            hf_weights=lambda only_trained=False: iter(()), frozen_hf_names=frozenset(), score=score, update=update,
            trainable=SimpleNamespace(set_step=lambda step: 1.0), layout=SimpleNamespace(data=1),
        ),
        "collector": SimpleNamespace(
            groups=groups, place=dict, go_back_to=lambda place: device.events.append("give prompts back")
        ),
        "sampler": SimpleNamespace(send_weights=send_weights, take_restarts=lambda: 0, close=lambda: None),
        "validator": SimpleNamespace(run=validate),
        "checkpointer": SimpleNamespace(
            save=save, settle=lambda wait: None, note_validation=lambda step, accuracy: None
        ),
        "recorder": SimpleNamespace(write=lambda *args: None, wait=lambda: None),
    }  # fmt: skip
    return Run(
        config=config, placement=placement, log=RunLog(folder), start_step=0, total_steps=steps,
        stopping=Stopping(None, end_time=None, stop_within_seconds=1.0, any_rank=lambda mine: mine),
        watchdog=Watchdog(factor=0, least_seconds=60), **parts,
    ), device  # fmt: skip


def test_every_move_of_a_run(tmp_path: Path) -> None:
    """Two steps, of which the second finds nothing to train on; validation after it, a checkpoint after each."""
    run, device = make_run(tmp_path, offloads=ALL, sleeps=True, steps=2, skipped=(2,), save_freq=1)
    train(run)
    assert device.events == [
        "offload grads optimizer", "barrier", "wake weights", "load 0",
        "offload params", "barrier", "wake kv_cache", "sample 1.0", "sample 1.1",
        "sleep", "barrier", "reload params", "score",
        "barrier", "reload grads optimizer", "update",
        "offload grads optimizer", "barrier", "wake weights", "load 1",
        "sleep, keeping weights", "barrier", "reload optimizer", "save 1",
        "offload optimizer params", "barrier", "wake weights", "wake kv_cache", "sample 2.0", "sample 2.1", "validate",
        "sleep, keeping weights", "barrier", "reload optimizer params", "save 2",
    ]  # fmt: skip
    assert device.held.keys() == {"params", "optimizer"}, "which an export finds"
    assert None not in [run.stopping.durations.longest(part) for part in ("step", *UNCUT) if part != "grading"]


def test_a_step_without_groups_moves_nothing(tmp_path: Path) -> None:
    run, device = make_run(tmp_path, offloads=ALL, sleeps=True, steps=3, skipped=(1, 2, 3), val_freq=1)
    train(run)
    woken = device.events.index("sample 1.0")
    assert device.events[woken:-4] == [
        event for step in (1, 2, 3) for event in (f"sample {step}.0", f"sample {step}.1", "validate")
    ]


SAMPLING = WEIGHTS + KV_CACHE
UPDATE = PARAMS + GRADS + OPTIMIZER + UPDATING


@pytest.mark.parametrize(
    ("offloads", "sleeps", "peak"),
    [
        (ALL, True, max(SAMPLING, UPDATE)),
        (("optimizer", "grads"), True, max(PARAMS + SAMPLING, UPDATE)),
        (("optimizer",), True, max(PARAMS + GRADS + SAMPLING, UPDATE)),
        ((), True, max(PARAMS + GRADS + OPTIMIZER + SAMPLING, UPDATE)),
        ((), False, UPDATE + SAMPLING),
    ],
)
def test_peak_memory(offloads: tuple[str, ...], sleeps: bool, peak: int, tmp_path: Path) -> None:
    """The bigger of the phases, worked out by hand, where engines sleep; their sum where they do not."""
    run, device = make_run(tmp_path, offloads=offloads, sleeps=sleeps, steps=3, skipped=(2,), val_freq=1, save_freq=1)
    train(run)
    assert [event for event in device.events if event.startswith("load")] == ["load 0", "load 1", "load 3"]
    assert device.peak == peak
    if not sleeps:
        assert not {"barrier", "sleep", "wake weights", "wake kv_cache"} & set(device.events)


def test_with_nothing_offloaded_a_checkpoint_leaves_the_engine_awake(tmp_path: Path) -> None:
    run, device = make_run(tmp_path, offloads=("grads",), sleeps=True, steps=2, save_freq=1)
    train(run)
    assert "sleep, keeping weights" not in device.events
    after_save = device.events[device.events.index("save 1") + 1 :]
    assert after_save[:3] == ["barrier", "wake kv_cache", "sample 2.0"]


def test_a_stop_in_mid_scoring(tmp_path: Path) -> None:
    """Rank 0 is asked while it scores step 2: the prompts of step 2 go back, and step 1 is saved."""
    run, device = make_run(tmp_path, offloads=ALL, sleeps=True, steps=3)
    run.stopping._signals = SimpleNamespace(request=None, seconds_since_request=0.0)  # type: ignore[assignment]
    score = run.policy.score

    def score_in_two_chunks(*args: Any, boundary: Callable[[], None], **kwargs: Any) -> Scores:
        scores = score(*args, **kwargs)
        if device.events.count("score") == 2:
            run.stopping._signals.request = signal.SIGUSR2  # type: ignore[union-attr,misc]
        boundary()
        return scores

    run.policy.score = score_in_two_chunks  # type: ignore[method-assign,assignment]
    assert not train(run)
    sampled = device.events.index("sample 2.1")
    assert device.events[sampled:] == [
        "sample 2.1", "sleep", "barrier", "reload params", "score", "give prompts back", "barrier",
        "reload optimizer", "save 1",
    ]  # fmt: skip
    assert run.stopping.durations.longest("checkpoint") is not None


def test_an_error_leaves_the_phase_as_it_was_reached(tmp_path: Path) -> None:
    run, device = make_run(tmp_path, offloads=ALL, sleeps=True, steps=1)
    run.policy.score = lambda *args, **kwargs: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    with pytest.raises(ZeroDivisionError):
        train(run)
    assert run.placement.phase == "score"
    assert device.held.keys() == {"params"}


@pytest.mark.parametrize(
    ("verbs", "words"),
    [
        (["sampling"], "'sample' cannot follow 'start', only 'sync' or 'sample' or 'write'"),
        (["scoring"], "'score' cannot follow 'start'"),
        (["syncing", "sampling", "updating"], "'update' cannot follow 'sample', only 'score'"),
        (["syncing", "sampling", "syncing"], "'sync' cannot follow 'sample', only 'start' or 'update'"),
        (["syncing", "sampling", "scoring", "sampling"], "'sample' cannot follow 'score'"),
        (["syncing", "sampling", "scoring", "updating", "writing"], "'write' cannot follow 'update'"),
    ],
)
def test_wrong_order_is_refused(verbs: list[str], words: str) -> None:
    device = Device(engine_awake=False)
    placement = Placement(Trainer(device), Engine(device), offloads=ALL, engines_sleep=True, barrier=lambda: None)
    *legal, wrong = verbs
    for verb in legal:
        getattr(placement, verb)()
    held = dict(device.held)
    with pytest.raises(RuntimeError, match=words):
        getattr(placement, wrong)()
    assert device.held == held


def test_a_rank_without_an_engine_meets_the_others_at_every_barrier() -> None:
    counts = []
    for leads in (True, False):
        device = Device(engine_awake=False)
        engine = Engine(device) if leads else None
        placement = Placement(
            Trainer(device), engine, offloads=("optimizer",), engines_sleep=True,
            barrier=lambda device=device: device.events.append("barrier"),
        )  # fmt: skip
        for verb in ("syncing", "sampling", "sampling", "scoring", "updating", "syncing", "writing", "sampling"):
            getattr(placement, verb)()
        counts.append(device.events.count("barrier"))
        assert leads or not {"weights", "kv_cache"} & device.held.keys()
    assert counts[0] == counts[1] == 7
