"""The checkpoints of a run: model, optimizer and the place in the data, saved together and loaded together."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial

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
from megatron_vppo.setup.unattended import older_instead
from megatron_vppo.system.agreement import on_every_rank

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpointer:
    """Saves and loads the state of a run. Every method is a collective over all trainer ranks."""

    config: TrainerConfig
    folder: RunFolder
    layout: Layout
    trainable: Trainable
    stream: PromptStream | None
    """The order of the prompts, on rank 0; None elsewhere."""

    def resume(self) -> int:
        """Loads the newest checkpoint, or that of trainer.resume_step, and returns its step; 0 if there is none.

        Raises:
            ValueError: there is one and trainer.resume=false; there is none of trainer.resume_step; or it is damaged
                or does not fit the run. The message then names another one that is whole. All ranks raise the same.
                In a job that SLURM has requeued, the run goes on from the next older one that is whole.
        """
        listed = on_every_rank(self._list_on_rank_zero)
        steps = from_rank_zero(lambda: listed)
        step = chosen_step(self.config, self.folder, steps)
        if step:
            try:
                self._load(step)
            except ValueError as error:
                older = older_instead(error, step, steps, self._check, config=self.config)
                if older is None:
                    raise with_way_out(error, step, steps, self._check) from error
                if dist.get_rank() == 0:
                    logger.warning("%s. Nobody is there to choose, so the run goes on from step %d", error, older)
                self._load(older)
                return older
        return step

    def save(self, step: int) -> None:
        """Saves the state after `step`, and removes the oldest checkpoints beyond trainer.save_limit."""
        save_checkpoint(
            self.folder.checkpoints,
            step=step,
            trainable=self.trainable,
            layout=self.layout,
            state={"data": self.stream.state_dict()} if self.stream is not None else {},
            keep=self.config.save_limit,
        )

    def _list_on_rank_zero(self) -> list[int]:
        return checkpoint_steps(self.folder.checkpoints) if dist.get_rank() == 0 else []

    def _load(self, step: int) -> None:
        on_every_rank(partial(self._move_stream, step))
        load_checkpoint(self.folder.checkpoints, step=step, trainable=self.trainable, layout=self.layout)

    def _check(self, step: int) -> None:
        on_every_rank(partial(self._check_stream, step))
        check_checkpoint(self.folder.checkpoints, step=step, trainable=self.trainable, layout=self.layout)

    def _move_stream(self, step: int) -> None:
        if self.stream is not None:
            self.stream.load_state_dict(saved_position(self.folder, step).model_dump())

    def _check_stream(self, step: int) -> None:
        if self.stream is not None:
            self.stream.check(saved_position(self.folder, step))
