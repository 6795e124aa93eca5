"""A training without a model, for tests of how ranks of several hosts find each other and check their hosts.

Python imports this file by its name in every process that has this folder in PYTHONPATH. The ranks join over gloo,
measure the network, show what a real run shows, and wait for VPPO_TEST_SECONDS. VPPO_TEST_PREFLIGHT=none leaves out
the checks of settings, which take seconds to import.
"""

from __future__ import annotations

import os
import sys
import time
import types
from collections.abc import Callable
from typing import Any


def run_training(config: Any, world: Any, *, say: Callable[[str], None], signals: Any) -> bool:
    import torch
    import torch.distributed as dist

    from megatron_vppo.parallel.all_reduce_speed import measure_all_reduce
    from megatron_vppo.setup.run_folder import RunFolder
    from megatron_vppo.setup.world import show_world

    dist.init_process_group("gloo")
    speed = measure_all_reduce(torch.device("cpu"))
    if dist.get_rank() == 0:
        show_world(world, speed, logs=RunFolder.of(config.trainer).logs, say=say)
    time.sleep(float(os.environ.get("VPPO_TEST_SECONDS", "0")))
    dist.barrier()
    if dist.get_rank() == 0:
        say(f"trained on {dist.get_world_size()} ranks")
    dist.destroy_process_group()
    return True


def put_in_place(name: str, **members: Any) -> None:
    module = types.ModuleType(name)
    vars(module).update(members)
    sys.modules[name] = module


put_in_place("megatron_vppo.trainer.run", run_training=run_training)
if os.environ.get("VPPO_TEST_PREFLIGHT") == "none":
    put_in_place("megatron_vppo.setup.preflight", check_settings=lambda config, **sizes: None)
