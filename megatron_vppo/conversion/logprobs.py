"""The log-probs of two fixed rows by transformers, Megatron and vLLM: a proof that a conversion computes the same.

Shape suffix legend: K = packed tokens of a row, prompt and response; N = response tokens; V = vocabulary rows;
I = image tokens of a row; P = patches of its image; D = values of a patch; h = hidden size.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText

from megatron_vppo.models.build import build_model
from megatron_vppo.models.config_checks import engine_overrides
from megatron_vppo.models.families import family_of
from megatron_vppo.models.hf_config import vision_token_ids
from megatron_vppo.models.layers.packed import PackedBatch
from megatron_vppo.models.layers.packing import Packing
from megatron_vppo.models.model_files import open_without_weights
from megatron_vppo.models.vision.tower_run import TowerRun
from megatron_vppo.parallel.layout import Layout, single_rank
from megatron_vppo.parallel.staging import Stager
from megatron_vppo.rollout.engine import RolloutEngine
from megatron_vppo.rollout.records import EngineSettings, SampleRequest, SamplingSettings
from megatron_vppo.weights.load import load_weights

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""The largest mean absolute difference over the response tokens of a row, in nats, by the dtype of all sides."""
QUESTIONS: tuple[tuple[str, bool], ...] = (("What is 3 + 5?", False), ("What do you see?", True))
"""(question, True if an image comes with it)."""
RESPONSE = "It is a square of colours, and the sum is 8."
"""The response of every row, unless vLLM samples the responses."""
SAMPLED_TOKENS = 16
IMAGE_SIDE = 224
"""Pixels; a multiple of 28 and of 32, so that no family resizes the image."""
START_SECONDS = 600.0


@dataclass(frozen=True)
class Row:
    """A prompt with its response. Without an image, `image`, `pixels_PD` and `grid` are None."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    image: Image.Image | None
    pixels_PD: Tensor | None
    grid: tuple[int, int, int] | None


@dataclass(frozen=True)
class Difference:
    """The absolute differences between two engines on one row, in nats."""

    engines: str
    row: int
    mean: float
    largest: float


def compare_logprobs(source: Path, converted: Path, *, with_vllm: bool) -> tuple[list[Difference], float]:
    """Compares Megatron's log-probs (from `converted`) and vLLM's with transformers' (from `source`).

    Call it where no process groups exist.

    Args:
        converted: any folder to train from.
        with_vllm: True if vLLM too reads `source`; it then also samples the responses.

    Returns:
        The differences, and the tolerance for their means.

    Raises:
        ValueError: files of the folder are missing or contradict one another, or its weights cannot be loaded.
    """
    files = open_without_weights(source)
    hf_config, processor = files.hf_config, files.processor
    dtype = torch.bfloat16 if hf_config.dtype == torch.bfloat16 else torch.float32
    rows = _rows(processor)
    sampled: list[Tensor] = []
    if with_vllm:
        rows, sampled = _vllm_logps(source, rows, hf_config, dtype=dtype)
    with single_rank() as layout:
        reference = _transformers_logps(source, rows, hf_config, layout=layout, dtype=dtype)
        gc.collect()
        ours = _megatron_logps(converted, rows, hf_config, layout=layout, dtype=dtype)
    pairs = [("Megatron - transformers", ours, reference)]
    if with_vllm:
        pairs += [("vLLM - transformers", sampled, reference), ("vLLM - Megatron", sampled, ours)]
    return [
        Difference(engines, number, float((a - b).abs().mean()), float((a - b).abs().max()))
        for engines, left, right in pairs
        for number, (a, b) in enumerate(zip(left, right, strict=True))
    ], TOLERANCE[dtype]


def _rows(processor: Any) -> list[Row]:
    response = tuple(processor.tokenizer(RESPONSE)["input_ids"])
    rows = []
    for question, with_image in QUESTIONS:
        image = _make_image() if with_image else None
        content = ([{"type": "image"}] if image else []) + [{"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=[text], images=[image] if image else None, return_tensors="pt")
        grid = tuple(inputs["image_grid_thw"][0].tolist()) if image else None
        pixels = inputs["pixel_values"] if image else None
        rows.append(Row(tuple(inputs["input_ids"][0].tolist()), response, image, pixels, grid))
    return rows


def _make_image() -> Image.Image:
    """Draws colours that change along both sides, and a dark square."""
    image = Image.new("RGB", (IMAGE_SIDE, IMAGE_SIDE))
    image.putdata([(x % 256, y % 256, (x + y) // 2 % 256) for y in range(IMAGE_SIDE) for x in range(IMAGE_SIDE)])
    image.paste((20, 20, 60), (64, 64, 128, 128))
    return image


def _vllm_logps(
    source: Path, rows: Sequence[Row], hf_config: Any, *, dtype: torch.dtype
) -> tuple[list[Row], list[Tensor]]:
    """Has vLLM sample the responses; returns the rows with these, and vLLM's log-probs of them."""
    settings = EngineSettings(
        model=str(source),
        max_model_len=max(len(row.prompt_ids) for row in rows) + SAMPLED_TOKENS,
        device="cuda" if torch.cuda.is_available() else "cpu",
        dtype="float32" if dtype == torch.float32 else "bfloat16",
        max_num_seqs=len(rows),
        cpu_kv_cache_gib=1.0,
        gpu_memory_utilization=0.5,
        enforce_eager=True,
        hf_overrides=engine_overrides(hf_config),
        banned_token_ids=vision_token_ids(hf_config),
    )
    requests = [
        SampleRequest(_compact(row.prompt_ids, hf_config.image_token_id), (row.image,) if row.image else (), (0,))
        for row in rows
    ]
    with (
        tempfile.TemporaryDirectory(prefix="vppo-verify-") as logs,
        RolloutEngine(settings, log_path=Path(logs) / "engine.log") as engine,
    ):
        engine.wait_ready(timeout_seconds=START_SECONDS)
        completions = engine.generate(requests, SamplingSettings(max_tokens=SAMPLED_TOKENS))
    with_responses = [
        Row(row.prompt_ids, done.token_ids, row.image, row.pixels_PD, row.grid)
        for row, (done,) in zip(rows, completions, strict=True)
    ]
    return with_responses, [torch.tensor(done.logps) for (done,) in completions]


def _compact(token_ids: Sequence[int], image_token: int) -> tuple[int, ...]:
    """Leaves one placeholder per image, as vLLM takes prompts."""
    before = (None, *token_ids[:-1])
    return tuple(t for t, b in zip(token_ids, before, strict=True) if t != image_token or b != image_token)


@torch.no_grad()
def _transformers_logps(
    source: Path, rows: Sequence[Row], hf_config: Any, *, layout: Layout, dtype: torch.dtype
) -> list[Tensor]:
    model = (
        AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, trust_remote_code=False)
        .to(layout.device)
        .eval()
    )
    results = []
    for row in rows:
        ids_1K = torch.tensor([[*row.prompt_ids, *row.response_ids]], device=layout.device)
        image = {}
        if row.pixels_PD is not None:
            image = {
                "pixel_values": row.pixels_PD.to(layout.device),
                "image_grid_thw": torch.tensor([row.grid], device=layout.device),
                "mm_token_type_ids": (ids_1K == hf_config.image_token_id).int(),
            }
        logits_KV = model(input_ids=ids_1K, **image).logits[0]
        results.append(_response_logps(logits_KV, row, hf_config))
    return results


@torch.no_grad()
def _megatron_logps(
    converted: Path, rows: Sequence[Row], hf_config: Any, *, layout: Layout, dtype: torch.dtype
) -> list[Tensor]:
    model = build_model(
        hf_config, groups=layout.groups, vision_groups=layout.vision_groups, dtype=dtype, device=layout.device
    ).eval()
    load_weights(model, converted)
    positions, stager = family_of(hf_config).positions(hf_config), Stager(layout.device)
    results = []
    for row in rows:
        ids = [*row.prompt_ids, *row.response_ids]
        ids_K = torch.tensor(ids)
        grids = (row.grid,) if row.grid else ()
        image_tokens_I = (ids_K == hf_config.image_token_id).nonzero()[:, 0]
        batch = PackedBatch(
            token_ids_K=ids_K,
            positions_3K=positions(ids, grids),
            packing=Packing((len(ids),)),
            image_token_index_I=image_tokens_I,
            image_feature_index_I=torch.arange(len(image_tokens_I)),
            runs=(TowerRun(grids),) if grids else (),
        )
        pixels_PD = None if row.pixels_PD is None else row.pixels_PD.to(layout.device)
        logits_KV = model(stager.send(stager.pack(model.plan(batch))), pixels_PD)[:, 0] @ model.head_weight_Vh().T
        results.append(_response_logps(logits_KV[:, : hf_config.text_config.vocab_size], row, hf_config))
    return results


def _response_logps(logits_KV: Tensor, row: Row, hf_config: Any) -> Tensor:
    """Computes the response's log-probs: [N] fp32 nats, of the distribution without tokens that are never sampled."""
    logits_NV = logits_KV[len(row.prompt_ids) - 1 : -1].float().cpu()
    logits_NV[:, list(vision_token_ids(hf_config))] = float("-inf")
    return logits_NV.log_softmax(-1).gather(1, torch.tensor(row.response_ids)[:, None])[:, 0]
