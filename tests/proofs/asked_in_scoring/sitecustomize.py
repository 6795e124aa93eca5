"""A signal to rank 1 in the middle of scoring, for test_stopped_in_scoring.py.

Python imports this file by its name in every process that has this folder in PYTHONPATH. Scoring is cut into chunks of
one micro-batch per pipeline stage. The chunk number VPPO_TEST_CHUNK of the run ends with the signal. Each rank writes a
line per chunk into a file of the folder VPPO_TEST_CHUNKS.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any


def run_training(config: Any, world: Any, *, say: Any, signals: Any) -> bool:
    """Runs the real training, whose place this function has taken."""
    del sys.modules["megatron_vppo.trainer.run"]
    import torch.distributed as dist

    from megatron_vppo.parallel import score_chunks
    from megatron_vppo.parallel.schedule import ScheduleRunner
    from megatron_vppo.setup import policy
    from megatron_vppo.trainer.run import run_training as train

    score_chunks.FIRST_PER_STAGE = 1
    policy.SCORING_CHUNKS = 10**9  # no micro-batch fits into that time, so that a chunk is as small as it may be
    forward = ScheduleRunner.forward

    def forward_and_ask(self: ScheduleRunner, *arguments: Any) -> None:
        forward(self, *arguments)
        chunks = Path(os.environ["VPPO_TEST_CHUNKS"]) / f"rank_{dist.get_rank()}"
        with chunks.open("a") as file:
            file.write("chunk\n")
        if dist.get_rank() == 1 and len(chunks.read_text().splitlines()) == int(os.environ["VPPO_TEST_CHUNK"]):
            os.kill(os.getpid(), signal.SIGUSR2)
            while signals.request is None:
                time.sleep(0.01)

    ScheduleRunner.forward = forward_and_ask  # type: ignore[method-assign]
    return train(config, world, say=say, signals=signals)


stand_in = types.ModuleType("megatron_vppo.trainer.run")
vars(stand_in)["run_training"] = run_training
sys.modules["megatron_vppo.trainer.run"] = stand_in
