"""The checkpoints of a run: model, optimizer and the place in the data, saved together and loaded together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.distributed as dist

from megatron_vppo.config.schema import TrainerConfig
from megatron_vppo.data.stream import PromptStream
from megatron_vppo.parallel.checkpoint import check_checkpoint, load_checkpoint, save_checkpoint
from megatron_vppo.parallel.checkpoint_folder import checkpoint_steps
from megatron_vppo.parallel.collective import from_rank_zero
from megatron_vppo.parallel.layout import Layout
from megatron_vppo.parallel.training import Trainable
from megatron_vppo.setup.resume import chosen_step, saved_position, with_way_out
from megatron_vppo.setup.run_folder import RunFolder
from megatron_vppo.system.agreement import on_every_rank

UNFINISHED_STEP = "unfinished_step"
"""The key in a checkpoint's state of a step whose validation was cut off, see RunLog.pending."""


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """The state that a run goes on from."""

    step: int
    """0: none; the run begins."""
    unfinished_step: dict[str, Any] | None = None
    """The numbers of the step if its validation is still to come; None: its line of metrics is written."""


@dataclass(frozen=True)
class Checkpointer:
    """Saves and loads the state of a run. Every method is a collective over all trainer ranks."""

    config: TrainerConfig
    folder: RunFolder
    layout: Layout
    trainable: Trainable
    stream: PromptStream | None
    """The order of the prompts, on rank 0; None elsewhere."""

    def resume(self) -> ResumePoint:
        """Loads the newest checkpoint, or that of trainer.resume_step, if there is one.

        Raises:
            ValueError: there is one and trainer.resume=false; there is none of trainer.resume_step; or it is damaged
                or does not fit the run. The message then names another one that is whole. All ranks raise the same.
        """
        listed = on_every_rank(self._list_on_rank_zero)
        steps = from_rank_zero(lambda: listed)
        step = chosen_step(self.config, self.folder, steps)
        if not step:
            return ResumePoint(0)
        try:
            state = self._load(step)
        except ValueError as error:
            raise with_way_out(error, step, steps, self._check) from error
        return ResumePoint(step, state.get(UNFINISHED_STEP))

    def save(self, step: int, *, unfinished_step: dict[str, Any] | None = None) -> None:
        """Saves the state after `step`, and removes the oldest checkpoints beyond trainer.save_limit.

        Args:
            unfinished_step: on rank 0, the numbers of the step if its validation is still to come.
        """
        state = {"data": self.stream.state_dict()} if self.stream is not None else {}
        if unfinished_step is not None:
            state[UNFINISHED_STEP] = unfinished_step
        save_checkpoint(
            self.folder.checkpoints,
            step=step,
            trainable=self.trainable,
            layout=self.layout,
            state=state,
            keep=self.config.save_limit,
        )

    def _list_on_rank_zero(self) -> list[int]:
        return checkpoint_steps(self.folder.checkpoints) if dist.get_rank() == 0 else []

    def _load(self, step: int) -> dict[str, Any]:
        on_every_rank(partial(self._move_stream, step))
        return load_checkpoint(self.folder.checkpoints, step=step, trainable=self.trainable, layout=self.layout)

    def _check(self, step: int) -> None:
        on_every_rank(partial(self._check_stream, step))
        check_checkpoint(self.folder.checkpoints, step=step, trainable=self.trainable, layout=self.layout)

    def _move_stream(self, step: int) -> None:
        if self.stream is not None:
            self.stream.load_state_dict(saved_position(self.folder, step).model_dump())

    def _check_stream(self, step: int) -> None:
        if self.stream is not None:
            self.stream.check(saved_position(self.folder, step))
