"""An attempt that nobody has started: a job that SLURM has requeued. Nobody is there to choose another checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_vppo.config.schema import TrainerConfig
from megatron_vppo.setup.attempts import has_begun
from megatron_vppo.setup.run_folder import RunFolder
from megatron_vppo.system.slurm import restart_count
from megatron_vppo.weights.dist_metadata import DamagedCheckpoint


def older_instead(
    error: ValueError, step: int, steps: Sequence[int], check: Callable[[int], object], *, config: TrainerConfig
) -> int | None:
    """Returns the newest whole checkpoint before a damaged one, for an attempt that must choose by itself.

    None: a person is there to choose or has chosen already (trainer.resume_step), it is not damaged but does not fit,
    or there is none.

    Args:
        error: what is wrong with the checkpoint of `step`.
        steps: those that have a checkpoint.
        check: raises ValueError if the checkpoint of a step cannot be gone on from; a collective, if the caller is one.
    """
    was_chosen = config.resume_step is not None and not has_begun(RunFolder.of(config).root)
    if not restart_count() or not isinstance(error, DamagedCheckpoint) or was_chosen:
        return None
    for older in sorted((other for other in steps if other < step), reverse=True):
        try:
            check(older)
        except ValueError:
            continue
        return older
    return None
