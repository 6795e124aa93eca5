"""The bytes of weights, gradients and optimizer state on one trainer rank, as Megatron allocates them.

Formulas of numbers: no model, no process group. `planning/sizes.py` makes the numbers from a model's configuration.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FLOAT32 = 4
"""The bytes of an fp32 value. Gradients are summed in fp32, and the optimizer computes in it."""
_PARAMETER_ALIGNMENT = 64
"""The values to which Megatron's buffers for the distributed optimizer align each parameter."""
_BUCKET_ALIGNMENT = 128
"""The values to which they align the end of each bucket."""


@dataclass(frozen=True)
class StageValues:
    """The parameters that one rank of a pipeline stage holds, as numbers of values."""

    buckets: tuple[tuple[int, ...], ...]
    """The size of each trained parameter, grouped as in Megatron's gradient buffer: one bucket. A tied weight that two
    stages hold is a bucket of its own between the others. With parallel.overlap_grad_reduce Megatron cuts the first
    stage's further, one for 40 million values or more. What pads those, less than 128 values for each replica, is not
    counted."""
    frozen: int
    """The size of all parameters that are not trained."""


@dataclass(frozen=True)
class StateBytes:
    """The memory of a rank between micro-batches."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def state_bytes(values: StageValues, *, dtype_bytes: int, replicas: int, distributed: bool) -> StateBytes:
    """Adds up weights in the model's dtype, gradients in fp32, and the optimizer: two fp32 moments, and fp32 weights if
    the model's are bfloat16.

    The optimizer's bytes are those of the fullest rank, an even share of the padded buffer. Other ranks may hold less,
    because the padding itself has no optimizer state.

    Args:
        dtype_bytes: bytes of one weight: 2 (bfloat16) or 4 (float32).
        replicas: ranks that hold the same parameters (data x context); the distributed optimizer splits over them.
        distributed: True for Megatron's distributed optimizer, which also pads its buffers.
    """
    trained = sum(sum(bucket) for bucket in values.buckets)
    buffer = sum(_padded(bucket, replicas=replicas) for bucket in values.buckets) if distributed else trained
    per_value = 2 * FLOAT32 + (FLOAT32 if dtype_bytes < FLOAT32 else 0)
    return StateBytes(
        weights=(buffer + values.frozen) * dtype_bytes,
        gradients=buffer * FLOAT32,
        optimizer=per_value * (buffer // replicas if distributed else trained),
    )


def _padded(bucket: tuple[int, ...], *, replicas: int) -> int:
    aligned = sum(_round_up(values, _PARAMETER_ALIGNMENT) for values in bucket)
    return _round_up(aligned, math.lcm(replicas, _BUCKET_ALIGNMENT))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def engine_weight_bytes(parameters: int, *, tensor: int, dtype_bytes: int) -> int:
    """Counts the bytes of weights on a rank of a vLLM engine, as if all were split evenly; norms and biases are not."""
    return -(-parameters // tensor) * dtype_bytes
