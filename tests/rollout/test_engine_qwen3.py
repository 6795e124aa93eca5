"""A real vLLM engine of a Qwen3-VL against transformers: sampling, weight transfer, and what a wrong bit does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_vppo.rollout.records import SampleRequest, SamplingSettings
from tests.rollout.rig import Rig, flip_one_bit_on_the_way, make_image, prompt_ids, reference_logps, weights

LOGP_TOLERANCE = 1e-5


def requests() -> list[SampleRequest]:
    """Two images, one image, text alone."""
    seeds = (11, 12, 13)
    return [
        SampleRequest(prompt_ids(2), (make_image(1), make_image(2, width=64, height=160)), seeds),
        SampleRequest(prompt_ids(1, text="what is the sum?"), (make_image(3),), seeds),
        SampleRequest(prompt_ids(0, text="no image"), (), seeds),
    ]


@pytest.mark.parametrize("seed", [0, 1])
def test_logps_equal_transformers_after_new_weights(qwen3_rig: Rig, tmp_path: Path, seed: int) -> None:
    model = qwen3_rig.model(seed)
    tensors = weights(model, tmp_path)
    report = qwen3_rig.engine.send_weights(iter(tensors.items()), version=seed, verify=True)
    assert report.checksums_ok and report.num_tensors == len(tensors)
    asked = requests()
    answers = qwen3_rig.engine.generate(asked, SamplingSettings(max_tokens=24, stop_token_ids=(qwen3_rig.eos,)))
    for request, completions in zip(asked, answers, strict=True):
        for completion in completions:
            expected = reference_logps(model, request, completion, banned=qwen3_rig.banned)
            assert (expected - torch.tensor(completion.logps)).abs().max() < LOGP_TOLERANCE
    blind = SampleRequest(asked[1].token_ids, (make_image(4),), asked[1].seeds)
    other = reference_logps(model, blind, answers[1][0], banned=qwen3_rig.banned)
    assert (other - torch.tensor(answers[1][0].logps)).abs().max() > 1e-2, "the image matters"


@pytest.mark.parametrize(
    ("name", "reported"),
    [
        ("model.language_model.layers.1.self_attn.q_norm.weight", "layers.1.self_attn.q_norm.weight"),
        ("model.visual.deepstack_merger_list.1.linear_fc2.weight", "deepstack_merger_list.1.linear_fc2.weight"),
        ("model.visual.pos_embed.weight", "pos_embed.weight"),
    ],
)
def test_one_wrong_value_on_the_way_is_found(
    qwen3_rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, reported: str
) -> None:
    tensors = weights(qwen3_rig.model(0), tmp_path)
    flip_one_bit_on_the_way(name, monkeypatch)
    with pytest.raises(RuntimeError, match="differ from those sent") as error:
        qwen3_rig.engine.send_weights(iter(tensors.items()), version=1, verify=True)
    assert reported in str(error.value)


def test_what_vllm_would_lose_in_its_sleep_is_what_we_know_of(qwen3_rig: Rig) -> None:
    """On CPU nothing is lost; a tensor of a kind that is not named here would have to be looked at before it is."""
    (saved,) = qwen3_rig.engine._session.call("sleep", keep_weights=False)
    qwen3_rig.engine._session.call("wake", tag="weights")
    qwen3_rig.engine._session.call("wake", tag="kv_cache")
    on_device = [name for name in saved if not name.endswith("_scale_cpu[0]")]
    assert on_device == [".deepstack_input_embeds[0]", ".deepstack_input_embeds[1]"]
