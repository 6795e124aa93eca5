"""The checkpoints of a run: model, optimizer and the place in the data, saved together and loaded together."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_vppo.config.schema import TrainerConfig
from megatron_vppo.data.stream import PromptStream
from megatron_vppo.parallel.checkpoint import check_checkpoint, load_checkpoint, save_checkpoint
from megatron_vppo.parallel.checkpoint_async import PendingCheckpoint, begin_checkpoint
from megatron_vppo.parallel.checkpoint_folder import STATE, SavedState, checkpoint_steps, read_state, step_folder
from megatron_vppo.parallel.checkpoint_keep import keep_checkpoints, read_best
from megatron_vppo.parallel.collective import from_rank_zero
from megatron_vppo.parallel.layout import Layout
from megatron_vppo.parallel.training import Trainable
from megatron_vppo.rollout.carry import NOTHING_CARRIED, Carry, SavedCarry
from megatron_vppo.setup.resume import (
    check_origin,
    chosen_step,
    given_checkpoint,
    saved_position,
    started_from,
    with_way_out,
)
from megatron_vppo.setup.run_folder import RunFolder
from megatron_vppo.setup.unattended import older_instead
from megatron_vppo.system.agreement import on_every_rank
from megatron_vppo.system.records import AnyRecord, parse_record
from megatron_vppo.trainer.keep_rate import KeepRate, SavedKeepRate
from megatron_vppo.weights.dist_metadata import DamagedCheckpoint

UNFINISHED_STEP = "unfinished_step"
"""The key in a checkpoint's state of a step whose validation was cut off, see RunLog.pending."""

KEEP_RATE = "keep_rate"
"""The key in a checkpoint's state of the share of groups that were kept; checkpoints of before have none."""

CARRY = "carry"
"""The key in a checkpoint's state of the groups that the next step goes on with; checkpoints of before have none."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """The state that a run goes on from."""

    step: int
    """0: none; the run begins."""
    unfinished_step: dict[str, Any] | None = None
    """The numbers of the step if its validation is still to come; None: its line of metrics is written."""


@dataclass
class Checkpointer:
    """Saves and loads the state of a run. `resume` and `save` are collectives over all trainer ranks."""

    config: TrainerConfig
    folder: RunFolder
    layout: Layout
    trainable: Trainable
    stream: PromptStream | None
    """The order of the prompts, on rank 0; None elsewhere."""
    keep_rate: KeepRate
    """The one that counts is that of rank 0."""
    carry: Carry
    """Likewise."""
    say: Callable[[str], None]
    """Shows a line to the user; called on rank 0 only."""
    asynchronous: bool = False
    """True if training goes on while a checkpoint is written."""
    plain_think_tokens: bool = False
    """That of the run's data."""
    _started_from: str | None = field(default=None, init=False)
    """The checkpoint of another run that this one began with."""
    _accuracy: tuple[int, float] | None = field(default=None, init=False)
    """The last validation: its step and val/accuracy."""
    _pending: PendingCheckpoint | None = field(default=None, init=False)
    """The checkpoint that is being written."""

    def resume(self) -> ResumePoint:
        """Loads the checkpoint that the run goes on from or starts from, if there is one.

        It is the newest of the run folder, or that of trainer.resume_step. If the folder has none, it is that of
        trainer.load_checkpoint_path.

        Raises:
            ValueError: there is one and trainer.resume=false; there is none of trainer.resume_step; the run of the
                folder did not begin with trainer.load_checkpoint_path; or it is damaged or does not fit the run. The
                message then names another one that is whole. All ranks raise the same. In a job that SLURM has
                requeued, the run goes on from the next older one that is whole.
        """
        listed = on_every_rank(self._list_on_rank_zero)
        steps = from_rank_zero(lambda: listed)
        unfinished_step = None
        step, own = chosen_step(self.config, self.folder, steps), self.folder.checkpoints
        if step:
            try:
                unfinished_step = self._load(own, step).get(UNFINISHED_STEP)
            except ValueError as error:
                check = partial(self._check, own)
                older = older_instead(error, step, steps, check, config=self.config)
                if older is None:
                    raise with_way_out(error, step, steps, check) from error
                if dist.get_rank() == 0:
                    logger.warning("%s. Nobody is there to choose, so the run goes on from step %d", error, older)
                step, unfinished_step = older, self._load(own, older).get(UNFINISHED_STEP)
            on_every_rank(partial(check_origin, self.config, own, step))
            self._started_from = started_from(own, step)
        elif self.config.load_checkpoint_path is not None:
            folder, step = on_every_rank(partial(given_checkpoint, self.config.load_checkpoint_path))
            self._load(folder, step)
            self._started_from = str(step_folder(folder, step))
            self._say(f"starts from {step_folder(folder, step)}, after step {step}")
        return ResumePoint(step, unfinished_step)

    def note_validation(self, step: int, accuracy: float) -> None:
        """Notes the val/accuracy of the weights after `step`, by which their checkpoint may be the best one."""
        self._accuracy = (step, accuracy)
        folder = self.folder.checkpoints
        if self.layout.rank == 0 and step_folder(folder, step).is_dir():  # of a validation that was cut off before
            keep_checkpoints(folder, step=step, accuracy=accuracy, keep=self.config.save_limit)

    def save(self, step: int, *, unfinished_step: dict[str, Any] | None = None) -> None:
        """Saves the state after `step`, and removes the oldest checkpoints beyond trainer.save_limit but the best.

        If it is asynchronous the state is only copied, and `settle` does the rest. The checkpoint before is settled
        first.

        Args:
            unfinished_step: on rank 0, the numbers of the step if its validation is still to come.
        """
        state: dict[str, Any] = {"started_from": self._started_from, "plain_think_tokens": self.plain_think_tokens}
        if self.stream is not None:
            state["data"] = self.stream.state_dict()
            state[KEEP_RATE] = self.keep_rate.state_dict()
            state[CARRY] = self.carry.state_dict()
        if unfinished_step is not None:
            state[UNFINISHED_STEP] = unfinished_step
        validated, accuracy = self._accuracy or (None, None)
        self.settle(wait=True)
        save = begin_checkpoint if self.asynchronous else save_checkpoint
        self._pending = save(
            self.folder.checkpoints,
            step=step,
            trainable=self.trainable,
            layout=self.layout,
            state=state,
            keep=self.config.save_limit,
            accuracy=accuracy if validated == step else None,
            model_only=self.config.save_model_only,
        )

    def settle(self, *, wait: bool) -> float | None:
        """Puts the pending checkpoint, if there is one, in its place once it is written; a collective over all ranks.

        Args:
            wait: True: waits until it is written.

        Returns:
            The seconds that writing took, on rank 0 if it has just been put in its place.

        Raises as PendingCheckpoint.settle does.
        """
        if self._pending is None or not self._pending.settle(wait=wait):
            return None
        written, self._pending = self._pending, None
        return written.seconds

    def _list_on_rank_zero(self) -> list[int]:
        if dist.get_rank() != 0:
            return []
        read_best(self.folder.checkpoints)  # a damaged one is refused now, and not after the first save
        return checkpoint_steps(self.folder.checkpoints)

    def _load(self, folder: Path, step: int) -> dict[str, Any]:
        on_every_rank(partial(self._move_stream, folder, step))
        state = load_checkpoint(folder, step=step, trainable=self.trainable, layout=self.layout)
        if parse_record(SavedState, read_state(folder, step)).optimizer == "none":
            self._say(
                f"{step_folder(folder, step)} holds no optimizer state (trainer.save_model_only): the optimizer starts "
                "from zero, so the run will differ from one that was not stopped"
            )
        return state

    def _say(self, line: str) -> None:
        if self.layout.rank == 0:
            self.say(line)

    def _check(self, folder: Path, step: int) -> None:
        on_every_rank(partial(self._check_stream, folder, step))
        check_checkpoint(folder, step=step, trainable=self.trainable, layout=self.layout)

    def _move_stream(self, folder: Path, step: int) -> None:
        if self.stream is not None:
            self.stream.load_state_dict(saved_position(folder, step).model_dump())
            self.keep_rate.load_state_dict(
                saved_part(folder, step, KEEP_RATE, SavedKeepRate) or KeepRate().state_dict()
            )
            self.carry.load_state_dict(saved_part(folder, step, CARRY, SavedCarry) or NOTHING_CARRIED)

    def _check_stream(self, folder: Path, step: int) -> None:
        if self.stream is not None:
            self.stream.check(saved_position(folder, step))
            saved_part(folder, step, KEEP_RATE, SavedKeepRate)
            saved_part(folder, step, CARRY, SavedCarry)


def saved_part(folder: Path, step: int, key: str, kind: type[AnyRecord]) -> dict[str, Any] | None:
    """Reads a part of a checkpoint's state; None if it has none. Raises DamagedCheckpoint if it is of another kind."""
    saved = read_state(folder, step).get(key)
    try:
        return None if saved is None else parse_record(kind, saved).model_dump()
    except ValueError as error:
        path = step_folder(folder, step) / STATE
        raise DamagedCheckpoint(f"{path} is damaged: '{key}' in it {error}") from error
