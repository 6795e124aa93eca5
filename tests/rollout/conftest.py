"""One real vLLM engine for most tests: starting it takes longer than everything that is done with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_vppo.rollout.engine import RolloutEngine
from tests.rollout.rig import MAX_PIXELS, START_SECONDS, Rig
from tests.rollout.settings import engine_settings
from tests.rollout.tiny_model import build_tokenizer, save_model_folder, save_qwen3_folder


@pytest.fixture(scope="session")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = save_model_folder(tmp_path_factory.mktemp("tiny"), tied=True)
    yield from running(folder, tmp_path_factory, family="qwen2_5_vl")


@pytest.fixture(scope="module")
def qwen3_rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = save_qwen3_folder(tmp_path_factory.mktemp("tiny_qwen3"), tied=True)
    yield from running(folder, tmp_path_factory, family="qwen3_vl")


def running(folder: Path, tmp_path_factory: pytest.TempPathFactory, *, family: str) -> Iterator[Rig]:
    log_path = tmp_path_factory.mktemp("run") / "engine.log"
    token_id = build_tokenizer().convert_tokens_to_ids
    banned = tuple(
        token_id(f"<|{name}|>") for name in ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
    )
    settings = engine_settings(
        model=str(folder),
        max_model_len=256,
        dtype="float32",
        max_num_seqs=64,
        images_per_prompt=2,
        cpu_kv_cache_gib=0.125,
        cpu_threads=2,
        load_format="empty",
        mm_processor_kwargs={"min_pixels": 56 * 56, "max_pixels": MAX_PIXELS},
        banned_token_ids=banned,
    )
    # Buffers so small that layers are spread over several and single tensors need larger ones.
    with RolloutEngine(settings, log_path=log_path, buffer_bytes=30_000) as engine:
        engine.wait_ready(timeout_seconds=START_SECONDS)
        yield Rig(engine, folder, log_path, token_id("<|im_end|>"), banned, token_id("<|image_pad|>"), family)
