"""The seconds of sampling: a few engines are played through, response by response. Modelled, not measured.

A decode step takes as long as its weights, keys and values need to come from memory, or its products if there are many
responses, or the host to launch it without CUDA graphs.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from functools import lru_cache

from megatron_vppo.planning.step_flops import StepWork, prefill_of_prompt
from megatron_vppo.planning.step_model import EngineLayout, Machine, SpeedModel

LENGTH_SPREAD = 0.6
"""The standard deviation of the logarithm of response lengths, which are taken as log-normal. A guess."""
SHORTEST_RESPONSE = 8
PLAYED_ENGINES = 8
"""Engines that are played through at most; the slowest counts."""
PLAYED_DRAWS = 8
"""Draws with other lengths, of which the mean counts."""
SAMPLER_BYTES = 24
"""Bytes that the sampler moves for each logit, in fp32: soft-max, its logarithm, random numbers, a few passes."""
AT_ONCE = 16
"""Decode steps that are taken together at most; between them no response is let in."""


def sampling_seconds(model: SpeedModel, work: StepWork, engine: EngineLayout, machine: Machine, *, gpus: int) -> float:
    """Returns the seconds of a draw, which ends with the last response of its slowest engine."""
    engines = gpus // engine.tensor
    prompts = math.ceil(work.prompts * work.drawn / engines)
    decoding = _slowest_engine(model, work, engine, machine, prompts=prompts, engines=min(engines, PLAYED_ENGINES))
    flops = prefill_of_prompt(model.cost, work) / engine.tensor
    prefill = flops / (machine.gpu.product_flops * machine.assumed.shares.prefill)
    # The leader of an engine reads all of its images before the first request goes out.
    images = work.images * machine.assumed.host.decode_image
    return decoding + prompts * (prefill + images)


def decode_step_seconds(
    model: SpeedModel, engine: EngineLayout, machine: Machine, *, responses: int, kv_tokens: float
) -> float:
    """Returns the seconds in which an engine samples one token of each of `responses`.

    Args:
        kv_tokens: the tokens whose keys and values are read, over all responses.
    """
    gpu, shares, host = machine.gpu, machine.assumed.shares, machine.assumed.host
    reach = gpu.memory * shares.decode_memory * engine.tensor
    flops = responses * (model.cost.per_token + model.cost.per_head_position)
    products = flops / (engine.tensor * gpu.product_flops * shares.decode_products)
    device = max(model.decoded_bytes / reach, products)
    device += (kv_tokens * model.kv_bytes + SAMPLER_BYTES * responses * model.vocabulary) / reach
    if engine.tensor > 1:
        moved = 2 * (engine.tensor - 1) / engine.tensor * responses * model.hidden * 2
        device += 2 * model.layers * (host.all_reduce_latency + moved / machine.node_link)
    if engine.eager:
        return max(host.eager_device * device, host.eager_layer * model.layers) + host.eager_step
    return device + host.graph_step


@lru_cache
def _slowest_engine(
    model: SpeedModel, work: StepWork, engine: EngineLayout, machine: Machine, *, prompts: int, engines: int
) -> float:
    """Returns the seconds of a draw, as the mean over some with different lengths."""
    slowest = (
        max(
            _engine_seconds(model, work, engine, machine, prompts=prompts, seed=played * PLAYED_ENGINES + number)
            for number in range(engines)
        )
        for played in range(PLAYED_DRAWS)
    )
    return sum(slowest) / PLAYED_DRAWS


def _engine_seconds(
    model: SpeedModel, work: StepWork, engine: EngineLayout, machine: Machine, *, prompts: int, seed: int
) -> float:
    """Plays one engine through. A waiting response starts as soon as the KV cache has room for half of a mean one."""
    waiting = deque(response_lengths(prompts * work.responses, work, seed=seed))
    shared_prompt = work.prompt_tokens / work.responses  # a group's prompt is kept once
    reserved = shared_prompt + work.response_tokens / 2
    ends: list[tuple[int, int]] = []  # a heap: the step at which each running response ends, and its length
    step, generated, seconds = 0, 0, 0.0
    while waiting or ends:
        while waiting and len(ends) < engine.max_sequences:
            if ends and generated + (len(ends) + 1) * reserved >= engine.kv_tokens:
                break
            length = waiting.popleft()
            heapq.heappush(ends, (step + length, length))
        steps = min(AT_ONCE, ends[0][0] - step)
        running = len(ends)
        read = generated + running * (work.prompt_tokens + steps / 2)
        seconds += steps * decode_step_seconds(model, engine, machine, responses=running, kv_tokens=read)
        step += steps
        generated += steps * running
        while ends and ends[0][0] <= step:
            generated -= heapq.heappop(ends)[1]
    return seconds


def response_lengths(count: int, work: StepWork, *, seed: int) -> list[int]:
    """Draws lengths with the mean `response_tokens`, before they are cut at the limit."""
    draw = random.Random(seed)
    centre = math.log(work.response_tokens) - LENGTH_SPREAD**2 / 2
    lengths = (round(draw.lognormvariate(centre, LENGTH_SPREAD)) for _ in range(count))
    return [max(SHORTEST_RESPONSE, min(work.longest_response, length)) for length in lengths]
