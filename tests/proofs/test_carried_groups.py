"""A run that carries groups from step to step: tokens keep the log-probs of the weights that sampled them.

Each step trains on the first eight groups, so that the ninth, and another one if it was begun, is carried and begins
the next draw. The engine holds one group at a time, and at a high temperature the model talks until it is cut off at
128 tokens, so most of the ninth is unfinished then. The run stops and goes on in between.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from megatron_vppo.observability.metrics import read_metrics
from megatron_vppo.observability.rollouts import read_rollouts, rollout_path
from tests.proofs.runs import ROLLOUT_DIFFERENCE, SHORT, train

TEMPERATURE = 2
CARRYING = (
    *SHORT, "algorithm.online_filtering=true", "algorithm.max_try_make_batch=4", "rollout.unfinished=carry",
    "algorithm.rollout_correction_cap=2", "rollout.max_num_seqs=4", "trainer.save_freq=1", "actor.optim.lr=1e-3",
    f"rollout.temperature={TEMPERATURE}", "data.max_response_length=128",
    "reward.reward_function=tests/proofs/rewards.py:half_for_a_small_start", "reward.reward_type=sequential",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.extended
def test_carried_tokens_are_those_of_older_weights(digits: Path, tmp_path: Path) -> None:
    for last in (1, 2):
        run = train(digits, tmp_path, "carried", *CARRYING, f"trainer.total_steps={last}")
    first, second = read_metrics(run)
    assert 1 <= first["rollout/carried_groups"] <= 2 and 1 <= second["rollout/carried_groups"] <= 2
    assert first["rollout/carried_share"] == 0.0 and second["rollout/carried_share"] > 0
    records = list(read_rollouts(rollout_path(run, 2)))
    carried = [record for record in records if record["carried_tokens"]]
    firsts = list(dict.fromkeys(record["row"] for record in records))[: int(first["rollout/carried_groups"])]
    assert records[0]["row"] in {record["row"] for record in carried} <= set(firsts), "they begin the draw"
    torn = [record for record in carried if record["carried_tokens"] < len(record["token_ids"])]
    assert torn, "some response has tokens of both weights"
    total = sum(len(record["token_ids"]) for record in records)
    assert second["rollout/carried_share"] == pytest.approx(sum(r["carried_tokens"] for r in records) / total)

    start = AutoModelForImageTextToText.from_pretrained(digits / "model", dtype=torch.float32)
    later = AutoModelForImageTextToText.from_pretrained(run / "huggingface" / "step_1", dtype=torch.float32)
    for record in carried:
        at = record["carried_tokens"]
        rollout, before = torch.tensor(record["rollout_logps"]), logps(start, digits, record)
        after, by_trainer = logps(later, digits, record), torch.tensor(record["old_logps"])
        assert (rollout[:at] - before[:at]).abs().max() < ROLLOUT_DIFFERENCE
        assert at == len(rollout) or (rollout[at:] - after[at:]).abs().max() < ROLLOUT_DIFFERENCE
        assert (by_trainer - after).abs().max() < ROLLOUT_DIFFERENCE, (
            "the trainer scores all of it with the new weights"
        )
    moved = [(logps(later, digits, one) - logps(start, digits, one)).abs().max() for one in carried]
    assert max(moved) > 100 * ROLLOUT_DIFFERENCE, "else nothing would tell the weights apart"
    assert second["training/rollout_logp_diff_max"] < ROLLOUT_DIFFERENCE, "over new tokens alone"


@torch.no_grad()
def logps(model: Any, digits: Path, record: dict[str, Any]) -> torch.Tensor:
    """The log-probs of a record's tokens, by transformers; banned tokens left out of the distribution."""
    processor = AutoProcessor.from_pretrained(digits / "model")
    row = pq.read_table(digits / "data" / "train.parquet").slice(record["row"], 1).to_pylist()[0]
    image = Image.open(io.BytesIO(row["images"][0]["bytes"])).convert("RGB")
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["problem"].split("<image>")[1]}]}
    ]
    inputs = processor(
        text=[processor.apply_chat_template(chat, add_generation_prompt=True)], images=[image], return_tensors="pt"
    )
    ids = torch.cat([inputs["input_ids"][0], torch.tensor(record["token_ids"])])[None]
    logits = model(
        input_ids=ids, pixel_values=inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"],
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
    ).logits[0, -len(record["token_ids"]) - 1 : -1]  # fmt: skip
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        if (token := getattr(model.config, name, None)) is not None:
            logits[:, token] = float("-inf")
    return (logits / TEMPERATURE).log_softmax(-1).gather(1, torch.tensor(record["token_ids"])[:, None])[:, 0]
