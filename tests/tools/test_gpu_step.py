"""gpu_step.py on the toy: the fields of its JSON, its FLOPs by hand, and what the authors' way computes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from bench.authors_way import AuthorsWay, SequenceAttention
from bench.device import time_together
from bench.flops import GroupShape, scoring_flops, update_flops
from bench.gpu_step import TOY, _guarded, _parser, _speedup, group_shapes, layers_that_fit, measure, toy_config
from bench.our_way import OurSettings, OurWay
from bench.workload import make_workload, with_layers
from transformers import AutoModelForImageTextToText

from megatron_vppo.models.flops import model_cost
from megatron_vppo.parallel.layout import destroy_layout, init_layout
from megatron_vppo.planning.published import published_config

CPU = torch.device("cpu")
TEMPERATURE = 0.8


def test_flops_of_the_toy_by_hand() -> None:
    group = GroupShape(prompt_tokens=10, patches=16, response_tokens=(3, 5))
    # Two language layers: q and o 64x64, k and v 64x32, three MLP matrices 64x96; 2 FLOPs per parameter and token.
    per_token = 2 * 2 * (2 * 4096 + 2 * 2048 + 3 * 6144)
    # Scores and values, width 64, half of the square, two layers; sequences of 10 + 3 - 1 and 10 + 5 - 1 tokens.
    attention = 2 * 2 * 64 * (12**2 + 14**2)
    head = 2 * 320 * 64 * (3 + 5)
    rows = per_token * (12 + 14) + attention + head
    # qkv and o 4 x 48x48, MLP 3 x 48x64, two layers; patches of 1176 values; merger 192x192 and 192x64 per 4 patches.
    per_patch = 2 * (2 * (4 * 2304 + 3 * 3072) + 1176 * 48 + (192 * 192 + 192 * 64) // 4)
    # One layer over the image, one over windows of 4 x 4 patches: scores and values, width 48.
    image = 16 * per_patch + 2 * 2 * 48 * (16 * 16 + 16 * 16)
    assert rows == 3_609_600 and image == 3_477_504
    cost = model_cost(toy_config())
    assert scoring_flops([group], cost) == 2 * rows + (1 + 2) * image  # two views; the image, and one per response
    assert update_flops([group, group], cost) == 2 * 3 * (rows + image)


@pytest.mark.extended
def test_every_case_is_measured_and_reported() -> None:
    report = measure(_parser().parse_args(["--small", "--seconds-per-case", "0.1"]))
    assert report["dtype"] == "float32" and report["ceilings"]["product_tflops"] > 0
    assert {"torch", "transformers", "megatron-core"} <= report["versions"].keys() and "cpu" in report["hardware"]
    toy = report["models"]["toy"]
    workload = make_workload(toy_config(), TOY)
    groups, cost = group_shapes(workload), model_cost(toy_config())
    assert toy["tflop"] == {"score": scoring_flops(groups, cost) / 1e12, "update": update_flops(groups, cost) / 1e12}
    read = sum(len(r.prompt.token_ids) + len(r.token_ids) - 1 for r in workload.responses)
    assert toy["tokens"] == {"score": 2 * read, "update": read}
    for case in ("bfloat16", "authors"):
        for phase in ("score", "update"):
            measured = toy["cases"][case][phase]
            assert measured["runs"] >= 2 and measured["peak_mib"] is None
            assert measured["tokens_per_s"] == pytest.approx(toy["tokens"][phase] / measured["seconds"], rel=2e-2)
            assert measured["tflops"] == pytest.approx(toy["tflop"][phase] / measured["seconds"], rel=5e-2, abs=1e-4)
    for recipe in ("fp8 tensorwise", "fp8 blockwise"):
        assert "an NVIDIA GPU" in toy["cases"][recipe]["score"]["skipped"]
        assert "an NVIDIA GPU" in toy["cases"][recipe]["update"]["skipped"]
    assert toy["ratios"]["fp8_score_over_bfloat16"] == {"fp8 tensorwise": None, "fp8 blockwise": None}
    assert toy["ratios"]["update_over_authors"] > 0
    assert toy["settings"]["authors_attention"] == SequenceAttention.NAME


def test_the_authors_way_scores_what_transformers_says_row_by_row() -> None:
    config = toy_config()
    workload = make_workload(config, TOY)
    authors = AuthorsWay(
        config, workload, device=CPU, dtype=torch.float32, temperature=TEMPERATURE, rows_per_update=2,
        rows_per_experience=4,
    )  # fmt: skip
    views = authors.score()
    model = AutoModelForImageTextToText.from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    model.load_state_dict(authors._model.state_dict())
    for row, response in enumerate(workload.responses):
        ids = torch.tensor([[*response.prompt.token_ids, *response.token_ids]])
        with torch.no_grad():
            logits = model(
                input_ids=ids, pixel_values=workload.values(workload.pixels[response.group_id].bytes_PD),
                image_grid_thw=torch.tensor(response.prompt.grids_thw),
                mm_token_type_ids=(ids == config.image_token_id).int(),
            ).logits[0]  # fmt: skip
        count = len(response.token_ids)
        logp_NV = (logits[-count - 1 : -1] / TEMPERATURE).log_softmax(-1)
        expected_N = logp_NV.gather(1, torch.tensor(response.token_ids)[:, None])[:, 0]
        for view_BT in views:
            torch.testing.assert_close(view_BT[row, :count], expected_N, rtol=0, atol=5e-6)
    before = copy.deepcopy(authors._model.state_dict())
    norm = authors.update(workload.train_batch(vocabulary=320))
    assert math.isfinite(norm) and norm > 0
    assert all(not torch.equal(before[name], after) for name, after in authors._model.state_dict().items())


def test_our_way_gives_all_its_memory_back() -> None:
    config, layout = toy_config(), init_layout(tensor=1, pipeline=1, timeout_seconds=60)
    workload = make_workload(config, TOY)
    settings = OurSettings(
        "torch", "none", TEMPERATURE, rows_per_update=2, rows_per_experience=2, head_chunk_tokens=8, shared_prefix=True
    )  # fmt: skip
    ours = OurWay(config, workload, layout=layout, dtype=torch.bfloat16, settings=settings, fp8=None)
    ours.update(workload.train_batch(vocabulary=320))
    trainable = ours._policy.trainable
    parameters = sum(p.numel() for p in trainable.stages[0].parameters())

    def held() -> int:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in ours._tensors()}
        return sum(storages.values())

    # bfloat16 weights and float32 gradients in padded buffers; float32 master weights and two moments.
    assert held() == pytest.approx(parameters * (2 + 4 + 4 + 8), rel=0.01)
    buffers = [buffer for ddp in trainable.ddps for buffer in ddp.buffers]
    ours.close()
    assert held() == 0
    assert all(b.param_data.untyped_storage().nbytes() == b.grad_data.untyped_storage().nbytes() == 0 for b in buffers)
    destroy_layout()


def test_rows_are_what_was_asked_for() -> None:
    workload = make_workload(toy_config(), TOY)
    assert workload.shape()["rows"] == 6 and [r.group_id for r in workload.responses] == [0, 0, 0, 1, 1, 1]
    # 56 x 56 and 56 x 84 pixels: 4 x 4 and 4 x 6 patches, a quarter as many tokens, two marks, five words.
    assert workload.shape()["patches"] == [16, 24] and workload.shape()["prompt_tokens"] == [11, 13]
    batch = workload.train_batch(vocabulary=320)
    assert batch.response_mask_BT.sum() == sum(len(r.token_ids) for r in workload.responses)
    assert make_workload(toy_config(), TOY).responses == workload.responses
    with pytest.raises(ValueError, match="--layers 3: the model has 2 language layers"):
        with_layers(toy_config(), 3)


def test_layers_that_fit_leave_room_for_activations() -> None:
    config = published_config("qwen2.5-vl-7b")
    layer = 3584 * (2 * 3584 + 2 * 512) + 3584 + 2 * 512 + 3 * 3584 * 18944 + 2 * 3584
    rest = 8_292_166_656 - 28 * layer  # of the published count
    for layers in (1, 11, 28):
        enough = math.ceil((rest + layers * layer) * 20 / 0.6)
        assert layers_that_fit(config, enough + 20) == layers
        if layers > 1:
            assert layers_that_fit(config, enough - 20) == layers - 1
    assert layers_that_fit(config, 10**13) == 28
    with pytest.raises(ValueError, match="choose a smaller --model"):
        layers_that_fit(config, 2**30)


def test_a_failing_case_is_reported_and_not_raised() -> None:
    def fails() -> None:
        raise torch.OutOfMemoryError("planted: out of memory\nand more")

    assert _guarded(fails, CPU) == {"error": "OutOfMemoryError: planted: out of memory"}
    phases = {"bfloat16": {"update": {"seconds": 2.0}}, "authors": {"update": _guarded(fails, CPU)}}
    assert _speedup(phases, "bfloat16", "authors", "update") is None
    phases["authors"]["update"] = {"seconds": 5.0}
    assert _speedup(phases, "bfloat16", "authors", "update") == 2.5


def test_runs_are_measured_in_turn_after_two_that_are_not() -> None:
    calls: list[str] = []
    timings = time_together({name: lambda name=name: calls.append(name) for name in "ab"}, device=CPU, seconds=0.0)
    assert calls == ["a", "a", "b", "b", "a", "b", "a", "b"]
    assert len(timings["a"].seconds) == 2 and timings["a"].peak_mib is None
