"""The place of each tensor of a Hugging Face Qwen-VL checkpoint in vLLM, written independently of vLLM's loader.

It has two uses. `StreamCheck` refuses a transfer in which a name is unknown, missing or comes twice, which vLLM would
only log. `ExpectedDigests` computes, from the tensors sent alone, the digests that a correctly loaded engine reports.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from megatron_vppo.rollout.records import LiveWeight

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""The checkpoint's layers that vLLM stacks, row by row, into the layer of this name."""

PREFIXES = (("language_model.model.", "model."), ("language_model.lm_head.", "lm_head."), ("visual.", "visual."))
"""Beginnings of vLLM's names, and the canonical ones: those of released Qwen2.5-VL checkpoints."""

ALIASES = (("model.language_model.", "model."), ("model.visual.", "visual."))
"""Beginnings of names in released Qwen3-VL checkpoints and newer Qwen2.5-VL files, and the canonical ones."""

VOCAB_PADDING = 64
"""vLLM pads the vocabulary to a multiple of this, with zero rows."""

COLUMN_PARALLEL = ("self_attn.qkv_proj", "mlp.gate_up_proj", "attn.qkv", "merger.mlp.0", "linear_fc1")
ROW_PARALLEL = ("self_attn.o_proj", "mlp.down_proj", "attn.proj", "merger.mlp.2", "linear_fc2")
VOCAB_PARALLEL = ("embed_tokens", "lm_head")


def canonical_name(name: str) -> str:
    """Returns the name by which a checkpoint's tensor is known here, whichever way the checkpoint spells it."""
    for alias, released in ALIASES:
        if name.startswith(alias):
            return released + name.removeprefix(alias)
    return name


def checkpoint_names(parameter: str) -> tuple[str, ...]:
    """Returns the checkpoint's tensors that vLLM's `parameter` is stacked from, in order."""
    for prefix, released in PREFIXES:
        if parameter.startswith(prefix):
            name = released + parameter.removeprefix(prefix)
            break
    else:
        raise ValueError(
            f"vLLM's parameter {parameter!r} belongs to no known part of a Qwen-VL; see vllm_layout.PREFIXES"
        )
    *path, layer, leaf = name.split(".")
    return tuple(".".join([*path, part, leaf]) for part in FUSED.get(layer, (layer,)))


def worker_shard(
    tensor: Tensor, *, parameter: str, part: int, rank: int, world_size: int, kv_replicas: int = 1
) -> Tensor:
    """Returns the share of worker `rank` of `world_size` in a checkpoint tensor.

    Args:
        parameter: vLLM's parameter that the tensor belongs to.
        part: the tensor's position among those that the parameter is stacked from.
        kv_replicas: the number of workers that hold the same key-value head.
    """
    layer, _, leaf = parameter.rpartition(".")
    if layer.endswith(VOCAB_PARALLEL):
        missing = -tensor.shape[0] % VOCAB_PADDING
        rows = torch.nn.functional.pad(tensor, (0, 0, 0, missing)) if missing else tensor
        return rows.chunk(world_size, dim=0)[rank]
    if world_size == 1:
        return tensor
    if layer.endswith(COLUMN_PARALLEL):
        if layer.endswith(".attn.qkv"):  # the vision tower's checkpoint is fused already
            return torch.cat([block.chunk(world_size, dim=0)[rank] for block in tensor.chunk(3, dim=0)])
        if layer.endswith("qkv_proj") and part > 0:
            return tensor.chunk(world_size // kv_replicas, dim=0)[rank // kv_replicas]
        return tensor.chunk(world_size, dim=0)[rank]
    if layer.endswith(ROW_PARALLEL) and leaf == "weight":
        return tensor.chunk(world_size, dim=1)[rank]
    return tensor


DigestKey = tuple[int, str]
"""(worker, weight)."""


HASHED_ROWS = 4096
"""The number of rows that are copied and hashed at a time, so that no copy of a whole embedding exists."""


def parameters_of(names: Collection[str], workers: Sequence[Sequence[LiveWeight]]) -> tuple[str, ...]:
    """Returns vLLM's names of all parameters made of these checkpoint tensors, and of the scales of quantised ones.

    Raises:
        ValueError: a parameter is stacked from tensors of which only some are among these.
    """
    wanted = {canonical_name(name) for name in names}
    found: dict[str, None] = {}
    for weight in (weight for worker in workers for weight in worker):
        sources = checkpoint_names(weight.parameter)
        inside = wanted.intersection(sources)
        if inside and len(inside) < len(sources):
            raise ValueError(
                f"vLLM holds {', '.join(sources)} as one parameter, {weight.parameter}, of which only "
                f"{', '.join(sorted(inside))} would be kept; name all of them or none"
            )
        if inside:
            found.update(dict.fromkeys((weight.parameter, *weight.scales)))
    return tuple(found)


class StreamCheck:
    """Checks the names of one transfer against the weights that the engine's workers have."""

    def __init__(self, workers: Sequence[Sequence[LiveWeight]], *, kept: Collection[str] = ()) -> None:
        """
        Args:
            kept: names that do not come, because the engine has them from an earlier transfer.
        """
        parameters = dict.fromkeys(weight.parameter for worker in workers for weight in worker)
        self.places = {
            name: (parameter, part) for parameter in parameters for part, name in enumerate(checkpoint_names(parameter))
        }
        self.kept = frozenset(map(canonical_name, kept)) & self.places.keys()
        self._missing = dict.fromkeys(name for name in self.places if name not in self.kept)
        self.kept_parameters = frozenset(self.places[name][0] for name in self.kept)

    def take(self, name: str) -> tuple[str, int]:
        """Returns vLLM's parameter and the part of it that `name` fills.

        Raises ValueError if it fills none, or did before.
        """
        canonical = canonical_name(name)
        if canonical not in self.places:
            hint = (
                " (its embeddings are tied, so there is no lm_head to load)" if canonical.startswith("lm_head") else ""
            )
            raise ValueError(f"weight {name!r} is unknown to the rollout engine's model{hint}")
        if canonical not in self._missing:
            raise ValueError(f"weight {name!r} came twice in one stream, or is one of those that stay as they are")
        del self._missing[canonical]
        return self.places[canonical]

    def finish(self) -> None:
        """Raises ValueError if tensors are missing."""
        if self._missing:
            names = list(self._missing)
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise ValueError(f"{len(names)} of {len(self.places)} weights did not come in the stream: {shown}")


class ExpectedDigests:
    """The digests that the live weights of the workers must have, computed from the trainer's own tensors."""

    def __init__(
        self,
        workers: Sequence[Sequence[LiveWeight]],
        *,
        dtype: torch.dtype,
        kept_parameters: Collection[str] = (),
        known: Mapping[DigestKey, str] = MappingProxyType({}),
    ) -> None:
        """
        Args:
            kept_parameters: parameters that do not come.
            known: digests from an earlier transfer, which kept parameters must still have. Those without one are not
                compared.
        """
        self._workers = workers
        self._kept = {
            (rank, weight.key): known.get((rank, weight.key))
            for rank, worker in enumerate(workers)
            for weight in worker
            if weight.parameter in kept_parameters
        }
        self._dtype = dtype
        self._by_parameter: dict[str, list[tuple[int, LiveWeight]]] = {}
        self._hashes = {}
        for rank, worker in enumerate(workers):
            for weight in worker:
                if weight.parameter not in kept_parameters and not weight.scales:
                    self._by_parameter.setdefault(weight.parameter, []).append((rank, weight))
                    self._hashes[rank, weight.key] = hashlib.sha256()
        self._waiting: dict[str, dict[int, Tensor]] = {}
        self._next_part: dict[str, int] = {}

    def add(self, tensor: Tensor, *, parameter: str, part: int) -> None:
        """Takes a tensor of the transfer into account.

        The parts of a parameter may come in any order: one that comes early is kept until its turn. Parts of a
        quantised parameter are skipped, because the engine holds quantised values, which have other bits.
        """
        if parameter not in self._by_parameter:
            return
        waiting = self._waiting.setdefault(parameter, {})
        next_part = self._next_part.get(parameter, 0)
        waiting[part] = tensor if part == next_part else tensor.detach().to("cpu", self._dtype, copy=True)
        while next_part in waiting:
            self._hash(waiting.pop(next_part), parameter=parameter, part=next_part)
            next_part += 1
        self._next_part[parameter] = next_part

    def _hash(self, tensor: Tensor, *, parameter: str, part: int) -> None:
        tensor = tensor.detach().to("cpu", self._dtype)
        for rank, weight in self._by_parameter[parameter]:
            shard = worker_shard(
                tensor,
                parameter=parameter,
                part=part,
                rank=rank,
                world_size=len(self._workers),
                kv_replicas=weight.kv_replicas,
            )
            for block in shard.split(HASHED_ROWS):
                # A weight that is read back through its kernel has no -0.0; adding 0.0 turns -0.0 into 0.0.
                values = block + 0.0 if weight.repacked else block.contiguous()
                self._hashes[rank, weight.key].update(values.flatten().view(torch.uint8).numpy().data)

    def digests(self) -> dict[DigestKey, str]:
        """Returns the digests of the weights that came, and of the kept ones as far as they are known."""
        kept = {key: digest for key, digest in self._kept.items() if digest is not None}
        return {**kept, **{key: found.hexdigest() for key, found in self._hashes.items()}}

    def compare(self, live: Iterable[dict[str, str]]) -> int:
        """Compares the workers' digests with the expected ones and returns their number.

        Raises RuntimeError that names the weights which differ.
        """
        expected = self.digests()
        wrong: dict[str, list[int]] = {}
        for rank, digests in enumerate(live):
            for weight in self._workers[rank]:
                if (rank, weight.key) in expected and digests.get(weight.key) != expected[rank, weight.key]:
                    wrong.setdefault(weight.key, []).append(rank)
        if wrong:
            parameters = {weight.key: weight.parameter for worker in self._workers for weight in worker}
            shown = "; ".join(
                f"{key} of worker {', '.join(map(str, ranks))} (from {', '.join(checkpoint_names(parameters[key]))})"
                for key, ranks in list(wrong.items())[:5]
            )
            raise RuntimeError(
                f"{len(wrong)} weights of the rollout engine differ from those sent to it: {shown}"
                + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")
            )
        return len(expected)
