"""Bytes of weights, gradients and optimizer state on one trainer rank, as Megatron allocates them.

Formulas of numbers: no model, no process group. `planning/sizes.py` makes the numbers from a model's configuration.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FLOAT32 = 4
"""Bytes. Gradients are summed in it, and the optimizer computes in it."""
_PARAMETER_ALIGNMENT = 64
_BUCKET_ALIGNMENT = 128
"""Values. Megatron's buffers for the distributed optimizer align parameters and the ends of buckets to these."""


@dataclass(frozen=True)
class StageValues:
    """The parameters that one rank of a pipeline stage holds, as numbers of values."""

    buckets: tuple[tuple[int, ...], ...]
    """Of each trained parameter, grouped as in Megatron's gradient buffer: one bucket, but a tied weight whose two
    holders are apart is a bucket of its own between the others."""
    frozen: int
    """Of all parameters that are not trained."""


@dataclass(frozen=True)
class StateBytes:
    """What lies on a rank between micro-batches."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def state_bytes(values: StageValues, *, dtype_bytes: int, replicas: int, distributed: bool) -> StateBytes:
    """Weights in the model's dtype, gradients in fp32, two fp32 moments, and fp32 weights where the model's are not.

    Args:
        dtype_bytes: of one weight: 2 (bfloat16) or 4 (float32).
        replicas: ranks that hold the same parameters, data x context: what the distributed optimizer splits over.
        distributed: Megatron's distributed optimizer, which also pads its buffers.

    The optimizer's part is that of the fullest rank: an even share of the padded buffer, of which other ranks may hold
    less (the padding itself has no optimizer state).
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
    """Of one rank of a vLLM engine; taken as split evenly, though norms and biases are not."""
    return -(-parameters // tensor) * dtype_bytes


def kv_bytes_per_token(*, layers: int, kv_heads: int, head_dim: int, tensor: int, dtype_bytes: int) -> int:
    """Keys and values of one token on one rank of a vLLM engine; a rank holds at least one key-value head."""
    return 2 * layers * max(1, kv_heads // tensor) * head_dim * dtype_bytes
