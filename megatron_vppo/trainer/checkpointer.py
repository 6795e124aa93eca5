"""The checkpoints of a run: model, optimizer and the place in the data, saved together and loaded together."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vppo.config.schema import TrainerConfig
from megatron_vppo.data.stream import PromptStream
from megatron_vppo.parallel.checkpoint import latest_step, load_checkpoint, save_checkpoint
from megatron_vppo.parallel.collective import from_rank_zero
from megatron_vppo.parallel.layout import Layout
from megatron_vppo.parallel.training import Trainable
from megatron_vppo.setup.run_folder import RunFolder


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
        """Loads the newest complete checkpoint and returns its step; 0 if there is none.

        Raises ValueError if there is one and trainer.resume=false.
        """
        step = from_rank_zero(self._newest)
        if step:
            state = load_checkpoint(self.folder.checkpoints, step=step, trainable=self.trainable, layout=self.layout)
            if self.stream is not None:
                self.stream.load_state_dict(state["data"])
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

    def _newest(self) -> int:
        newest = latest_step(self.folder.checkpoints)
        if newest is not None and not self.config.resume:
            raise ValueError(
                f"trainer.resume=false, but {self.folder.root} holds the checkpoint of step {newest}, which a new run "
                "would mix with its own; set another trainer.experiment_name, or remove the folder"
            )
        return newest or 0
