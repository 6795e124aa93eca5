"""What goes in and out of a rollout engine. Everything is picklable and none of it needs vllm to be imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image

from megatron_vppo.config.choices import Dtype

WeightTransfer = Literal["shm", "ipc"]


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
    """'empty': zeros instead of reading the checkpoint; `generate` then waits for the first `send_weights`."""
    mm_processor_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the image processor, such as min_pixels and max_pixels."""
    can_sleep: bool = False
    """`RolloutEngine.sleep` and `wake` work; not on CPU."""
    weight_transfer: WeightTransfer = "shm"
    """Weights come through host memory, or through buffers on the GPU of the rank that leads the engine."""
    quantization: str | None = None
    """vLLM's name of a scheme by which it quantises the linear layers' weights as they are loaded, such as
    'fp8_per_block'; not on CPU. Weights are sent in `dtype` all the same."""
    unquantized_layers: tuple[str, ...] = ()
    """Patterns (fnmatch) of vLLM's names of linear layers that stay in `dtype`."""
    banned_token_ids: tuple[int, ...] = ()
    """Never sampled: the image and vision tokens, whose features a later forward pass would ask for."""

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
class SampleRequest:
    """One prompt and how many samples of it."""

    token_ids: tuple[int, ...]
    """Compact: ONE image placeholder per image; vLLM repeats it once per merged patch."""
    images: tuple[Image.Image, ...]
    """In the order of their placeholders."""
    seeds: tuple[int | None, ...]
    """One completion per entry; None draws from the engine's own generator."""


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How every sample of one call is drawn.

    Log-probs are returned in vLLM's `processed_logprobs` mode: of the distribution that was really sampled from,
    after banned tokens, temperature, top-k and top-p. At temperature 1 without top-k and top-p they are the model's
    own, renormalised over the tokens that are not banned. At temperature t they are those of softmax(logits / t);
    with top-p or top-k, of the renormalised kept tokens. At temperature 0 (greedy) temperature, top-k and top-p do
    not apply.
    """

    max_tokens: int
    temperature: float = 1.0
    """vLLM takes 0 to 2."""
    top_p: float = 1.0
    top_k: int = -1
    """-1: off."""
    stop_token_ids: tuple[int, ...] = ()
    """Sampling one of these ends the response, which then includes it. Nothing else does but max_tokens."""


@dataclass(frozen=True, slots=True)
class Completion:
    token_ids: tuple[int, ...]
    """Up to and including the stop token where finish_reason is 'stop'."""
    logps: tuple[float, ...]
    """Nats; one per token; see SamplingSettings for the distribution."""
    finish_reason: str
    """'stop' or 'length'."""
    weight_version: int
    """The version given to the last `send_weights` before sampling; -1 for the weights of the checkpoint."""


@dataclass(frozen=True, slots=True)
class SyncReport:
    """One `send_weights`."""

    version: int
    num_tensors: int
    num_bytes: int
    num_groups: int
    """Buffers sent."""
    seconds: float
    """All of it, verification and the time that the stream took to produce its tensors included."""
    verify_seconds: float
    num_checksums: int
    """Weights of the engine, over its workers, that were compared; 0 without verification. Quantised weights are not
    among them: they have other bits than what was sent."""
    checksums_ok: bool | None
    """None without verification. A mismatch raises, so it is never False."""


@dataclass(frozen=True, slots=True)
class LiveWeight:
    """One weight that an engine's worker computes with."""

    key: str
    """Name under which its digest is reported."""
    parameter: str
    """vLLM's name of the parameter that it holds."""
    repacked: bool
    """True where the kernel keeps a repacked copy, read back through the kernel; zeros then lose their sign."""
    kv_replicas: int
    """Workers that share one key-value head (qkv_proj where there are fewer heads than workers), else 1."""
    scales: tuple[str, ...] = ()
    """vLLM's names of the parameters that quantising this one made beside it; empty: it is not quantised."""
