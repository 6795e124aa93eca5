"""A prompt that runs once for all of its responses, in both views, against transformers, which reads every row alone.

`test_layouts.py` does the same for every layout, with a perturbation for each response: then only the original views
share their prompts. Here one perturbation serves a group, so both views share.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from megatron_vppo.config.choices import PerturbUnit
from megatron_vppo.parallel.layout import Layout, single_rank
from megatron_vppo.parallel.packer import Packer
from tests.models.tiny import save_tiny_model, tiny_config, tiny_qwen3_config
from tests.parallel.policy_rig import STEP, expected_scores, make_responses, make_scorer

LOGP_TOLERANCE = 1e-5
FOCUS_TOLERANCE = 1e-5
KL_TOLERANCE = 5e-5
CONFIGS = {
    "Qwen2.5-VL": tiny_config(tied=False, vocab=301),
    "Qwen3-VL": tiny_qwen3_config(tied=True, vocab=299, taps=(0, 2)),
}


@pytest.fixture(scope="module")
def layout() -> Any:
    with single_rank() as made:
        yield made


@pytest.mark.parametrize(
    ("rows", "most_tokens", "per", "continuations"),
    [(3, None, "image", [4, 2, 4]), (8, None, "image", [10]), (8, None, 2, [8]), (1, 60, 2, [2, 0, 0, 2, 0])],
)
@pytest.mark.parametrize("model", CONFIGS)
def test_both_views_share_their_prompts(
    model: str,
    rows: int,
    most_tokens: int | None,
    per: PerturbUnit,
    continuations: list[int],
    layout: Layout,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Groups of responses of 4, 1, 3 | 3, 4 (text) | 4, 2 | 4 tokens; one of a single token has no continuation.

    Micro-batches of three rows: of the first all share, of the others some; a text and the last are alone. Two
    perturbations for a group of three responses are those of the first and third, and of the second. 60 tokens for
    each view hold some groups and parts of others.
    """
    packings = []
    pack = Packer.pack

    def noting(*arguments: Any, **options: Any) -> Any:
        batch = pack(*arguments, **options)
        packings.append(batch.packed.packing)
        return batch

    monkeypatch.setattr(Packer, "pack", noting)
    save_tiny_model(tmp_path, CONFIGS[model])
    responses = make_responses()
    expected = expected_scores(
        AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32),
        responses,
        per=per,
    )
    scorer = make_scorer(tmp_path, layout, rows=rows, perturb_per=per, most_tokens=most_tokens)
    scores = scorer.score(responses, step=STEP, views="both", divergence="kl_full")
    assert scores.perturbed_logp_BT is not None and scores.divergence_BT is not None
    assert (scores.old_logp_BT - expected.logp_BT).abs().max() < LOGP_TOLERANCE
    assert (scores.perturbed_logp_BT - expected.perturbed_logp_BT).abs().max() < LOGP_TOLERANCE
    assert (scores.entropy_BT - expected.entropy_BT).abs().max() < LOGP_TOLERANCE
    assert (scores.divergence_BT - expected.kl_BT).abs().max() < KL_TOLERANCE
    assert (scores.perturbed_logp_BT - scores.old_logp_BT).abs().max() > 0.01, "two different views"
    assert [len(packing.prefixes) for packing in packings] == continuations
    scores = scorer.score(responses, step=STEP, views="original", with_visual_focus=True)
    assert scores.visual_focus_BT is not None
    assert (scores.old_logp_BT - expected.logp_BT).abs().max() < LOGP_TOLERANCE
    assert (scores.visual_focus_BT - expected.visual_focus_BT).abs().max() < FOCUS_TOLERANCE
    assert expected.visual_focus_BT.unique().numel() > 10, "cosines that differ"
