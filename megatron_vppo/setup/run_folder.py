"""The folder of a run and the places in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_vppo.config.schema import TrainerConfig


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The files that a run makes."""

    root: Path

    @classmethod
    def of(cls, config: TrainerConfig) -> RunFolder:
        """Returns the folder runs_dir/project_name/experiment_name."""
        return cls(Path(config.runs_dir) / config.project_name / config.experiment_name)

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def logs(self) -> Path:
        """The logs: a folder for each attempt (system/attempt.py)."""
        return self.root / "logs"

    def huggingface(self, step: int) -> Path:
        return self.root / "huggingface" / f"step_{step}"
