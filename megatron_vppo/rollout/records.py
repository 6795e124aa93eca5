"""The records that go in and out of a rollout engine. All are picklable, and none needs vllm to be imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image

from megatron_vppo.algorithm.types import Prompt
from megatron_vppo.config.choices import Dtype

WeightTransfer = Literal["shm", "ipc"]

Outcome = Literal["done", "refused", "broken"]
"""The first part of an engine's answer. 'refused': the engine raised an error and goes on. 'broken': it then ends."""
PROGRESS = "progress"
"""A message from an engine that works on a request and has just got on with it; the answer is still to come."""
UNFINISHED = "unfinished"
"""The finish reason of a completion that was still being sampled when sampling ended."""
SAMPLED = "sampled"
"""The first part of a message from an engine that samples; the second are the completions that have just ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """One vLLM engine; fixed for its life."""

    model: str
    """Hugging Face folder or hub id."""
    max_model_len: int
    """Tokens of prompt (image tokens included) and response together."""
    dtype: Dtype
    max_num_seqs: int
    """Responses in flight."""
    cpu_kv_cache_gib: float
    """GiB for the KV cache on CPU."""
    gpu_memory_utilization: float
    """Share of each of its GPUs that the engine takes while it is awake."""
    enforce_eager: bool
    """True if nothing is compiled, not even the sampler's helpers, which would take 25 s of the first generate on two
    cores."""
    device: Literal["cpu", "cuda"] = "cpu"
    cuda_visible_devices: str | None = None
    """CUDA_VISIBLE_DEVICES of the engine; None: the trainer's."""
    tensor_parallel_size: int = 1
    images_per_prompt: int = 1
    """The most images that one prompt may have."""
    seed: int = 0
    """The seed of responses without one of their own."""
    cpu_threads: int = 1
    """OpenMP threads of each worker process on CPU."""
    load_format: Literal["auto", "empty"] = "auto"
    """'empty': start with zeros instead of reading the checkpoint; `generate` then refuses until weights were sent."""
    mm_processor_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the image processor, such as min_pixels and max_pixels."""
    hf_overrides: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the model's configuration that replace those of its config.json."""
    can_sleep: bool = False
    """True if `RolloutEngine.sleep` and `wake` are to work; not on CPU."""
    weight_transfer: WeightTransfer = "shm"
    """The way of the weights: through host memory, or through buffers on the GPU of the rank that leads the engine."""
    quantization: str | None = None
    """vLLM's name of the scheme by which it quantises the weights of linear layers when it loads them, such as
    'fp8_per_block'. Weights are sent in `dtype` all the same. Not on CPU."""
    unquantized_layers: tuple[str, ...] = ()
    """Linear layers that stay in `dtype`, as patterns (fnmatch) of vLLM's names."""
    banned_token_ids: tuple[int, ...] = ()
    """Tokens that are never sampled: image and vision tokens, since a forward pass would look for their images."""

    def __post_init__(self) -> None:
        for name in ("max_model_len", "tensor_parallel_size", "max_num_seqs", "images_per_prompt", "cpu_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}; it must be at least 1")
        for name, off in (("can_sleep", False), ("weight_transfer", "shm"), ("quantization", None)):
            if self.device == "cpu" and getattr(self, name) != off:
                raise ValueError(f"{name} = {getattr(self, name)!r} needs engines on GPUs")
        if len(self.banned_token_ids) > MAX_BANNED_TOKENS:
            raise ValueError(f"{len(self.banned_token_ids)} banned_token_ids; vLLM takes at most {MAX_BANNED_TOKENS}")


MAX_BANNED_TOKENS = 1024
"""vLLM's bound on the logit biases of a request (model runner v2)."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt of which responses are wanted, as ranks tell each other."""

    prompt: Prompt
    seeds: tuple[int | None, ...]
    """Those of a SampleRequest."""
    begun: tuple[Sequence[int], ...] = ()
    """Those of a SampleRequest."""


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """A prompt, and the seeds of the completions to sample."""

    token_ids: tuple[int, ...]
    """The prompt with one placeholder per image; vLLM repeats it once per merged patch."""
    images: tuple[Image.Image, ...]
    """In the order of their placeholders."""
    seeds: tuple[int | None, ...]
    """One for each completion; None draws from the engine's own generator."""
    begun: tuple[Sequence[int], ...] = ()
    """The tokens that each completion has already, after which it goes on; (): none has any. They are not returned, and
    count towards max_tokens."""


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """The distribution that the completions of one call are sampled from.

    Log-probs come in vLLM's `processed_logprobs` mode, which means those of this distribution, after banned tokens,
    temperature, top-k and top-p:

    - at temperature 1, without top-k and top-p: the model's own, renormalised over the tokens that are not banned;
    - at temperature t: those of softmax(logits / t);
    - with top-k or top-p: those of the tokens that are kept, renormalised;
    - at temperature 0, which is greedy: as if temperature, top-k and top-p were not set.
    """

    max_tokens: int
    temperature: float = 1.0
    """0 to 2; 0 is greedy."""
    top_p: float = 1.0
    top_k: int = -1
    """-1: off."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a completion, which then includes the token. Besides them only max_tokens ends one."""
    likeliest_tokens: int = 0
    """The likeliest tokens that are reported at each position, besides the sampled one; vLLM reports 20 at most."""
    keeps_unfinished: bool = False
    """True: what is unfinished when sampling ends is given back. False: it is dropped."""


@dataclass(frozen=True, slots=True)
class Completion:
    """The tokens that were sampled for one seed of a request."""

    token_ids: tuple[int, ...]
    """Everything sampled, the stop token included if finish_reason is 'stop'."""
    logps: tuple[float, ...]
    """Nats, one per token, of the distribution that SamplingSettings describes."""
    finish_reason: str
    """'stop' or 'length'; or UNFINISHED."""
    weight_version: int
    """The version given to the last `send_weights` before sampling; -1 for the weights of the checkpoint."""
    likeliest_ids: Sequence[int] = ()
    likeliest_logps: Sequence[float] = ()
    """The likeliest tokens of each position, as many as are asked for, one position after the other; with their
    log-probs in the same distribution."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """A completion that has just ended or is unfinished, and what it belongs to."""

    number: int
    """The number that the request was given."""
    sample: int
    """The place of its seed among those of the request."""
    completion: Completion


@dataclass(frozen=True, slots=True)
class SyncReport:
    """The figures of one `send_weights`."""

    version: int
    num_tensors: int
    num_bytes: int
    num_buffers: int
    """The number of filled buffers that were sent."""
    seconds: float
    """The whole transfer, including verification and the time in which the stream made its tensors."""
    verify_seconds: float
    num_checksums: int
    """The number of weights that were compared, over all workers; 0 without verification. Quantised weights are not
    compared, since they have other bits than those that were sent."""
    checksums_ok: bool | None
    """None without verification. A mismatch raises, so it is never False."""


@dataclass(frozen=True, slots=True)
class LiveWeight:
    """One weight that an engine's worker computes with."""

    key: str
    """The name under which its digest is reported."""
    parameter: str
    """vLLM's name of the parameter that it holds."""
    repacked: bool
    """True if the kernel keeps a repacked copy. It is read back through the kernel, where zeros lose their sign."""
    kv_replicas: int
    """The number of workers that hold the same key-value head: above 1 in qkv_proj if there are fewer heads than
    workers."""
    scales: tuple[str, ...] = ()
    """vLLM's names of the scales that quantising this parameter made; empty if it is not quantised."""
