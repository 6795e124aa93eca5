"""The numbers of the roofline model that no data sheet has: shares of the ceilings, and times of the host.

Each says where it is from: measured here, published, or a guess. "Measured" means on the cores of a server without a
GPU (docs/LOG.md, and tools/bench/scaling.py for the host's work); "measured on an H200" is docs/LOG.md, 2026-11-29.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shares:
    """The shares of a GPU's ceilings that a phase reaches."""

    training: float = 0.80
    """Products of the language model, forward and backward. Measured on an H200, forward: 0.87 with 33,000 tokens at
    once or more, 0.81 with 5,000. Published: Llama-3-8B in bfloat16 at 520 to 560 TFLOP/s on H100 (NVIDIA's recipes),
    which is 0.70 to 0.75."""
    vision: float = 0.59
    """The vision tower, whose widths are padded to multiples of 8. Estimated from a profile on an H200, forward: 0.46
    with a width of 3,420."""
    prefill: float = 0.55
    """Products of an engine that reads prompts. A guess."""
    decode_products: float = 0.60
    """Products of an engine that samples. A guess."""
    decode_memory: float = 0.75
    """Reads of weights, keys and values. A guess."""
    hidden_gradients: float = 0.8
    """The most of the sum of gradients that runs behind the backward pass of a mini-batch's last micro-batch
    (parallel.overlap_grad_reduce). A guess: the last bucket has nothing to run behind, and products next to a sum are
    slower."""


@dataclass(frozen=True)
class HostTimes:
    """Seconds of the host, and of what waits for it."""

    decode_image: float = 0.030
    """Reading and resizing one image. Measured: 0.020 on a smooth one; texture is a guess."""
    process_image: float = 0.016
    """The processor's part of an image of one megapixel, as bytes. Measured."""
    bytes_per_patch: float = 588
    """3 channels of 14 x 14 pixels of one frame."""
    fill_buffer: float = 4.1e9
    """Bytes/s into the buffer that is sent to the device. Measured: 0.72 ms for an image of one megapixel."""
    pack_token: float = 1.5e-7
    """Packing of one token. Measured: 4.4 ms for 29,584."""
    launch_layer: float = 0.0007
    """The host's time to start one layer forward; the device waits if the layer has less to do. A guess. On an H200 a
    layer of the tower took 3.2 ms with gradients; how much of that was starting it is not known."""
    launch_backward: float = 1.3
    """Times as long for a layer's backward pass. A guess."""
    stage_message: float = 300e-6
    """Each tensor between pipeline stages: its shape and itself, with a synchronisation each. A guess."""
    optimizer_step: float = 0.05
    """Launches of an optimizer step. A guess."""
    optimizer_bytes: float = 30
    """Bytes that an optimizer step moves for each parameter of the rank. Counted: gradient, moments and weights."""
    eager_layer: float = 0.0005
    """The host's time for a layer in a decode step without CUDA graphs. A guess; published whole steps give 0.26 ms
    (Llama-8B on H100) to 0.8 ms (Qwen2.5-Omni-7B on A800, github.com/vllm-project/vllm-omni/issues/7960) a layer."""
    eager_device: float = 1.1
    """Device time without CUDA graphs over that with them. A guess."""
    eager_step: float = 0.001
    graph_step: float = 0.0025
    """Scheduler and sampler of a decode step, without and with CUDA graphs. Guesses."""
    all_reduce_latency: float = 15e-6
    """Each of the two sums of a layer in a decode step. A guess."""
    wake: float = 1.5
    """Putting an engine to sleep and waking it, once a step. A guess."""
    send_bundle: float = 0.020
    """The round trip for one buffer of weights. A guess."""
    bundle_bytes: float = 2**31
    """Its size where memory is free: rollout/transfer/bundle.py."""
    load_tensor: float = 0.0004
    """An engine's time to load one tensor. A guess."""
    sync_start: float = 0.5
    """A guess."""


@dataclass(frozen=True)
class SerialWork:
    """Seconds of rank 0 and of every rank that more GPUs do not shorten. All measured: docs/LOG.md, "host work"."""

    grade_response: float = 0.90 / 6144
    """Decoding and grading, per sampled response, with 32 reward workers."""
    record_token: float = 0.08 / 1_382_400
    """Handing the records of a step over to their own process, per response token."""
    assemble_row: float = 0.12 / 3072
    """Mismatch and advantages, per trained response, on every rank."""
    collectives: float = 0.197
    collectives_rank: float = 0.0015
    """The exchange of prompts, responses and rewards in a step: a constant and a part for each rank. Measured over gloo
    on 2 to 32 ranks, as the mean of two runs' lines; an extrapolation beyond."""


@dataclass(frozen=True)
class Assumptions:
    shares: Shares = Shares()
    host: HostTimes = HostTimes()
    serial: SerialWork = SerialWork()


LIKELY = Assumptions()
CAUTIOUS = Assumptions(
    Shares(training=0.70, vision=0.45, decode_memory=0.65),
    HostTimes(eager_layer=0.0008, decode_image=0.045, launch_layer=0.0032),
)
HOPEFUL = Assumptions(
    Shares(training=0.87, vision=0.65, decode_memory=0.85),
    HostTimes(eager_layer=0.00035, decode_image=0.020),
)
"""The assumptions as they stand above, and with the guesses that matter most at their slow and at their fast end."""
