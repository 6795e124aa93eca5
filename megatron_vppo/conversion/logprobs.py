"""Log-probs of a few fixed rows through transformers, Megatron and vLLM: whether a conversion computes the same.

Shape suffix legend: T = tokens of a row, prompt and answer; N = tokens of the answer; V = vocabulary.
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
from transformers import AutoModelForImageTextToText, AutoProcessor

from megatron_vppo.models.build import build_model
from megatron_vppo.models.families import family_of
from megatron_vppo.models.hf_config import vision_token_ids
from megatron_vppo.models.layers.packed import PackedBatch
from megatron_vppo.models.layers.packing import Packing
from megatron_vppo.models.read_config import read_hf_config
from megatron_vppo.parallel.layout import Layout, single_rank
from megatron_vppo.rollout.engine import RolloutEngine
from megatron_vppo.rollout.records import EngineSettings, SampleRequest, SamplingSettings
from megatron_vppo.weights.load import load_weights

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Nats, of the mean absolute difference over the tokens of a row, by the dtype that all sides compute in."""
QUESTIONS: tuple[tuple[str, bool], ...] = (("What is 3 + 5?", False), ("What do you see?", True))
"""(question, whether a picture comes with it)."""
ANSWER = "It is a square of colours, and the sum is 8."
"""Scored where vLLM does not give the answers."""
SAMPLED_TOKENS = 16
PICTURE_SIDE = 224
"""Pixels; a multiple of 28 and of 32."""
START_SECONDS = 600.0


@dataclass(frozen=True)
class Row:
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    picture: Image.Image | None
    pixels_PD: Tensor | None
    grid: tuple[int, int, int] | None


@dataclass(frozen=True)
class Difference:
    """Between two engines on one row; nats, absolute."""

    engines: str
    row: int
    mean: float
    largest: float


def compare_logprobs(source: Path, converted: Path, *, with_vllm: bool) -> tuple[list[Difference], float]:
    """Differences of Megatron's (from `converted`) and vLLM's log-probs from transformers' (from `source`), and the
    tolerance for their means. To be called where there are no process groups.

    Args:
        converted: any folder that training starts from.
        with_vllm: vLLM reads `source`, and samples the answers that are scored.

    Raises:
        ValueError: the folder has no processor, or its weights cannot be loaded.
    """
    hf_config, processor = read_hf_config(source), AutoProcessor.from_pretrained(source, trust_remote_code=False)
    dtype = torch.bfloat16 if hf_config.dtype == torch.bfloat16 else torch.float32
    rows = _rows(processor)
    sampled: list[Tensor] = []
    if with_vllm:
        rows, sampled = _answers_of_vllm(source, rows, hf_config, dtype=dtype)
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
    answer = tuple(processor.tokenizer(ANSWER)["input_ids"])
    rows = []
    for question, with_picture in QUESTIONS:
        picture = _picture() if with_picture else None
        content = ([{"type": "image"}] if picture else []) + [{"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=[text], images=[picture] if picture else None, return_tensors="pt")
        grid = tuple(inputs["image_grid_thw"][0].tolist()) if picture else None
        pixels = inputs["pixel_values"] if picture else None
        rows.append(Row(tuple(inputs["input_ids"][0].tolist()), answer, picture, pixels, grid))
    return rows


def _picture() -> Image.Image:
    """Colours that change along both sides, and a dark square."""
    picture = Image.new("RGB", (PICTURE_SIDE, PICTURE_SIDE))
    picture.putdata([(x % 256, y % 256, (x + y) // 2 % 256) for y in range(PICTURE_SIDE) for x in range(PICTURE_SIDE)])
    picture.paste((20, 20, 60), (64, 64, 128, 128))
    return picture


def _answers_of_vllm(
    source: Path, rows: Sequence[Row], hf_config: Any, *, dtype: torch.dtype
) -> tuple[list[Row], list[Tensor]]:
    """The rows with answers that vLLM samples, and its log-probs of them."""
    settings = EngineSettings(
        model=str(source),
        max_model_len=max(len(row.prompt_ids) for row in rows) + SAMPLED_TOKENS,
        device="cuda" if torch.cuda.is_available() else "cpu",
        dtype="float32" if dtype == torch.float32 else "bfloat16",
        max_num_seqs=len(rows),
        banned_token_ids=vision_token_ids(hf_config),
    )
    requests = [
        SampleRequest(_compact(row.prompt_ids, hf_config.image_token_id), (row.picture,) if row.picture else (), (0,))
        for row in rows
    ]
    with (
        tempfile.TemporaryDirectory(prefix="vppo-verify-") as logs,
        RolloutEngine(settings, log_path=Path(logs) / "engine.log") as engine,
    ):
        engine.wait_ready(timeout_seconds=START_SECONDS)
        completions = engine.generate(requests, SamplingSettings(max_tokens=SAMPLED_TOKENS))
    answered = [
        Row(row.prompt_ids, done.token_ids, row.picture, row.pixels_PD, row.grid)
        for row, (done,) in zip(rows, completions, strict=True)
    ]
    return answered, [torch.tensor(done.logps) for (done,) in completions]


def _compact(token_ids: Sequence[int], image_token: int) -> tuple[int, ...]:
    """One placeholder per picture."""
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
        ids_1T = torch.tensor([[*row.prompt_ids, *row.answer_ids]], device=layout.device)
        pictures = {}
        if row.pixels_PD is not None:
            pictures = {
                "pixel_values": row.pixels_PD.to(layout.device),
                "image_grid_thw": torch.tensor([row.grid], device=layout.device),
                "mm_token_type_ids": (ids_1T == hf_config.image_token_id).int(),
            }
        logits_TV = model(input_ids=ids_1T, **pictures).logits[0]
        results.append(_answer_logps(logits_TV, row, hf_config))
    return results


@torch.no_grad()
def _megatron_logps(
    converted: Path, rows: Sequence[Row], hf_config: Any, *, layout: Layout, dtype: torch.dtype
) -> list[Tensor]:
    model = build_model(
        hf_config, groups=layout.groups, vision_groups=layout.vision_groups, dtype=dtype, device=layout.device
    ).eval()
    load_weights(model, converted)
    positions = family_of(hf_config).positions(hf_config)
    results = []
    for row in rows:
        ids = [*row.prompt_ids, *row.answer_ids]
        ids_T = torch.tensor(ids, device=layout.device)
        grids = (row.grid,) if row.grid else ()
        image_tokens_I = (ids_T == hf_config.image_token_id).nonzero()[:, 0]
        positions_3T = positions(ids, grids)
        batch = PackedBatch(
            token_ids_K=ids_T,
            positions_3K=positions_3T.to(layout.device),
            packing=Packing((len(ids),)),
            image_token_index_I=image_tokens_I,
            image_feature_index_I=torch.arange(len(image_tokens_I), device=layout.device),
            pixels_PD=None if row.pixels_PD is None else row.pixels_PD.to(layout.device),
            grids_thw=grids,
        )
        logits_TV = model(batch)[:, 0] @ model.head_weight_Vh().T
        results.append(_answer_logps(logits_TV[:, : hf_config.text_config.vocab_size], row, hf_config))
    return results


def _answer_logps(logits_TV: Tensor, row: Row, hf_config: Any) -> Tensor:
    """[N] fp32 nats, of the distribution without the tokens that are never sampled."""
    logits_NV = logits_TV[len(row.prompt_ids) - 1 : -1].float().cpu()
    logits_NV[:, list(vision_token_ids(hf_config))] = float("-inf")
    return logits_NV.log_softmax(-1).gather(1, torch.tensor(row.answer_ids)[:, None])[:, 0]
