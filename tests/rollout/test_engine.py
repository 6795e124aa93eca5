"""Sampling and weight transfer of a real vLLM engine, against transformers."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from megatron_vppo.rollout.records import UNFINISHED, Completion, SampleRequest, SamplingSettings
from megatron_vppo.rollout.sampling_loop import TOKENS_PER_PIECE
from megatron_vppo.system.stop_signals import StopRequested
from tests.rollout.rig import Rig, flip_one_bit_on_the_way, make_image, prompt_ids, reference_logps, weights

LOGP_TOLERANCE = 1e-5


@pytest.fixture(scope="module", autouse=True)
def first_load(rig: Rig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Dummy weights are refused until the first load."""
    with pytest.raises(RuntimeError, match="call send_weights first"):
        rig.engine.generate([SampleRequest(prompt_ids(0), (), (1,))], SamplingSettings(max_tokens=1))
    load(rig, seed=0, folder=tmp_path_factory.mktemp("first"))
    yield


def load(rig: Rig, *, seed: int, folder, version: int = 0, verify: bool = True):
    model = rig.model(seed)
    report = rig.engine.send_weights(iter(weights(model, folder).items()), version=version, verify=verify)
    return model, report


def requests(seeds: tuple[int | None, ...] = (11, 12, 13)) -> list[SampleRequest]:
    """Two images, one image, text alone."""
    return [
        SampleRequest(prompt_ids(2), (make_image(1), make_image(2, width=56, height=140)), seeds),
        SampleRequest(prompt_ids(1, text="what is the sum?"), (make_image(3),), seeds),
        SampleRequest(prompt_ids(0, text="no image"), (), seeds),
    ]


def largest_difference(rig: Rig, model, asked: list[SampleRequest], answers: list[list[Completion]], **kwargs) -> float:
    differences = [
        (reference_logps(model, request, completion, banned=rig.banned, **kwargs) - torch.tensor(completion.logps))
        for request, completions in zip(asked, answers, strict=True)
        for completion in completions
    ]
    return float(torch.cat(differences).abs().max())


def test_logps_equal_transformers(rig: Rig) -> None:
    model = rig.model(0)
    asked = requests()
    answers = rig.engine.generate(asked, SamplingSettings(max_tokens=24, stop_token_ids=(rig.eos,)))
    assert largest_difference(rig, model, asked, answers) < LOGP_TOLERANCE
    # Alive: another image changes the log-probs of the same tokens by far more than the tolerance.
    swapped = SampleRequest(asked[1].token_ids, (make_image(4),), asked[1].seeds)
    assert largest_difference(rig, model, [swapped], answers[1:2]) > 1e-2
    # Alive: the sampled tokens are neither certain nor all the same.
    assert len({token for completions in answers for c in completions for token in c.token_ids}) > 20


def test_temperature_and_top_p_change_the_reported_distribution(rig: Rig) -> None:
    model, asked = rig.model(0), requests()[1:2]
    hot = rig.engine.generate(asked, SamplingSettings(max_tokens=24, temperature=1.7))
    assert largest_difference(rig, model, asked, hot, temperature=1.7) < LOGP_TOLERANCE
    cut = rig.engine.generate(asked, SamplingSettings(max_tokens=24, top_p=0.5))
    for completion in cut[0]:
        own = reference_logps(model, asked[0], completion, banned=rig.banned)
        gain = torch.tensor(completion.logps) - own  # -log of the kept probability, which is at least top_p
        assert float(gain.min()) > -LOGP_TOLERANCE
        assert float(gain.max()) < -torch.tensor(0.5).log() + LOGP_TOLERANCE
        assert float(gain.max()) > 0.1


def test_seeds_reproduce_and_are_independent(rig: Rig) -> None:
    settings = SamplingSettings(max_tokens=16, stop_token_ids=(rig.eos,))
    alone = rig.engine.generate([requests((5, 6, 2**63 - 1))[1]], settings)[0]
    others = requests((7,) * 8)
    together = rig.engine.generate([*others, requests((2**63 - 1, 5, 5))[1]], settings)[-1]
    assert [c.token_ids for c in together] == [alone[2].token_ids, alone[0].token_ids, alone[0].token_ids]
    assert len({c.token_ids for c in alone}) == 3
    free = rig.engine.generate([requests((None,) * 4)[1]], settings)[0]
    assert len({c.token_ids for c in free}) == 4


def test_banned_tokens_are_never_sampled(rig: Rig) -> None:
    settings = SamplingSettings(max_tokens=64, temperature=2.0)  # the most that vLLM takes
    asked = requests(tuple(range(48)))[1:2]
    answers = rig.engine.generate(asked, settings)
    sampled = [token for completion in answers[0] for token in completion.token_ids]
    assert len(sampled) == 48 * 64
    assert len(set(sampled)) > 150
    assert not set(sampled) & set(rig.banned)
    assert largest_difference(rig, rig.model(0), asked, answers, temperature=2.0) < LOGP_TOLERANCE


def test_stop_token_ends_and_belongs_to_the_response(rig: Rig) -> None:
    asked = requests(tuple(range(32)))[1:2]
    free = rig.engine.generate(asked, SamplingSettings(max_tokens=12))[0]
    assert {c.finish_reason for c in free} == {"length"}
    assert {len(c.token_ids) for c in free} == {12}
    stop = free[0].token_ids[5]
    stopped = rig.engine.generate(asked, SamplingSettings(max_tokens=12, stop_token_ids=(stop,)))
    for long, short in zip(free, stopped[0], strict=True):
        end = long.token_ids.index(stop) + 1 if stop in long.token_ids else 12
        assert short.token_ids == long.token_ids[:end]
        assert len(short.logps) == end
        assert short.finish_reason == ("stop" if stop in long.token_ids else "length")
    assert largest_difference(rig, rig.model(0), asked, stopped) < LOGP_TOLERANCE


def test_send_weights_gives_the_new_model_and_drops_every_cache(rig: Rig, tmp_path) -> None:
    asked, settings = requests(), SamplingSettings(max_tokens=16)
    before = rig.engine.generate(asked, settings)
    assert {c.weight_version for completions in before for c in completions} == {0}
    model, report = load(rig, seed=1, folder=tmp_path, version=7)
    after = rig.engine.generate(asked, settings)  # same prompts and images: every cache would hit
    assert {c.weight_version for completions in after for c in completions} == {7}
    assert largest_difference(rig, model, asked, after) < LOGP_TOLERANCE
    assert largest_difference(rig, rig.model(0), asked, after) > 1e-2
    assert report.checksums_ok and report.num_checksums > 40
    assert report.num_tensors == len(weights(model, tmp_path))
    assert report.num_buffers > 10
    _, unchecked = load(rig, seed=0, folder=tmp_path, version=0, verify=False)
    assert unchecked.checksums_ok is None and unchecked.num_checksums == 0 and unchecked.verify_seconds == 0.0


@pytest.mark.parametrize(
    ("name", "reported"),
    [
        ("model.layers.1.self_attn.v_proj.weight", "layers.1.self_attn.qkv_proj.weight"),
        ("visual.blocks.0.mlp.up_proj.bias", "blocks.0.mlp.gate_up_proj.bias"),
        ("model.embed_tokens.weight", "lm_head.weight in its kernel"),
        ("visual.patch_embed.proj.weight", "visual.patch_embed.proj.weight"),
    ],
)
def test_one_wrong_value_on_the_way_is_found(
    rig: Rig, tmp_path, monkeypatch: pytest.MonkeyPatch, name: str, reported: str
) -> None:
    tensors = weights(rig.model(0), tmp_path)
    flip_one_bit_on_the_way(name, monkeypatch)
    with pytest.raises(RuntimeError, match="differ from those sent") as error:
        rig.engine.send_weights(iter(tensors.items()), version=1, verify=True)
    assert reported in str(error.value) and name in str(error.value)
    with pytest.raises(RuntimeError, match="call send_weights first"):
        rig.engine.generate(requests(), SamplingSettings(max_tokens=1))
    monkeypatch.undo()
    load(rig, seed=0, folder=tmp_path)


def test_incomplete_and_unknown_streams_are_refused(rig: Rig, tmp_path) -> None:
    tensors = weights(rig.model(1), tmp_path)
    less = {name: tensor for name, tensor in tensors.items() if name != "model.layers.0.self_attn.k_proj.bias"}
    with pytest.raises(ValueError, match=r"1 of \d+ weights did not come .* model.layers.0.self_attn.k_proj.bias"):
        rig.engine.send_weights(iter(less.items()), version=1, verify=False)
    with pytest.raises(ValueError, match=r"'lm_head.weight' is unknown .* tied"):
        rig.engine.send_weights(iter([("lm_head.weight", torch.zeros(1)), *tensors.items()]), version=1, verify=False)
    first = next(iter(tensors.items()))
    with pytest.raises(ValueError, match="came twice"):
        rig.engine.send_weights(iter([first, *tensors.items()]), version=1, verify=False)
    with pytest.raises(RuntimeError, match="refused: "):
        wrong_shape = tensors | {"model.norm.weight": torch.zeros(7)}
        rig.engine.send_weights(iter(wrong_shape.items()), version=1, verify=False)
    drained = iter(less.items())
    with pytest.raises(ValueError):
        rig.engine.send_weights(drained, version=1, verify=False)
    assert next(drained, None) is None  # the other trainer ranks' collectives were all joined
    load(rig, seed=0, folder=tmp_path)
    test_logps_equal_transformers(rig)


def test_what_is_frozen_need_not_come_again(rig: Rig, tmp_path) -> None:
    """The engine keeps the vision tower of its last whole load, bit by bit, and answers with it."""
    before, after = rig.model(0), rig.model(1)
    old = weights(before, tmp_path / "old")
    tensors = weights(after, tmp_path / "new")
    trained = {name: tensor for name, tensor in tensors.items() if not name.startswith("visual.")}
    frozen = old.keys() - trained.keys()
    load(rig, seed=0, folder=tmp_path)
    report = rig.engine.send_weights(iter(trained.items()), version=1, verify=True, kept=frozen)
    assert report.num_bytes == sum(tensor.nbytes for tensor in trained.values())
    whole = rig.engine.send_weights(iter({**trained, **{n: old[n] for n in frozen}}.items()), version=2, verify=True)
    assert report.num_checksums == whole.num_checksums, "what is kept was compared with the digests of its own load"

    rig.engine.send_weights(iter(trained.items()), version=3, verify=False, kept=frozen)
    after.model.visual.load_state_dict(before.model.visual.state_dict())
    asked = requests()
    answers = rig.engine.generate(asked, SamplingSettings(max_tokens=8, stop_token_ids=(rig.eos,)))
    assert largest_difference(rig, after, asked, answers) < LOGP_TOLERANCE

    with pytest.raises(ValueError, match="stay as they are"):
        rig.engine.send_weights(iter(tensors.items()), version=4, verify=False, kept=frozen)
    with pytest.raises(ValueError, match="no complete set of weights"):
        rig.engine.send_weights(iter(trained.items()), version=4, verify=False, kept=frozen)
    load(rig, seed=0, folder=tmp_path)


def test_names_of_newer_files_and_any_order_are_accepted(rig: Rig, tmp_path) -> None:
    tensors = weights(rig.model(0), tmp_path)
    renamed = {
        name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else f"model.{name}": tensor
        for name, tensor in reversed(tensors.items())
    }
    assert rig.engine.send_weights(iter(renamed.items()), version=0, verify=True).checksums_ok
    test_logps_equal_transformers(rig)


def test_a_refused_request_leaves_the_engine_usable(rig: Rig) -> None:
    too_long = SampleRequest((1,) * 300, (), (1,))
    with pytest.raises(RuntimeError, match=r"refused: .*(?s:.*)engine.log"):
        rig.engine.generate([too_long], SamplingSettings(max_tokens=4))
    test_logps_equal_transformers(rig)


def test_requests_come_and_completions_leave_while_it_samples(rig: Rig) -> None:
    settings, asked = SamplingSettings(max_tokens=24), requests((1, 2))
    expected = rig.engine.generate(asked, settings)
    rig.engine.begin_sampling(settings)
    assert rig.engine.take() == [] and rig.engine.unfinished == 0
    found = []
    for number, request in ((7, asked[0]), (3, asked[1]), (5, asked[2])):
        rig.engine.ask({number: request})
        assert rig.engine.unfinished == 2
        with pytest.raises(RuntimeError, match="still works on another request"):
            rig.engine.live_digests()
        while rig.engine.unfinished:
            found += rig.engine.take(1.0)
    rig.engine.end_sampling()
    by_place = {(one.number, one.sample): one.completion for one in found}
    assert by_place.keys() == {(number, sample) for number in (3, 5, 7) for sample in (0, 1)}
    for number, completions in zip((7, 3, 5), expected, strict=True):
        for sample, one in enumerate(completions):
            assert by_place[number, sample].token_ids == one.token_ids
            assert by_place[number, sample].logps == pytest.approx(one.logps, abs=LOGP_TOLERANCE)


def test_what_is_unfinished_is_dropped(rig: Rig, tmp_path) -> None:
    """vLLM refuses to reset its prefix cache, which a load does, as long as it has requests."""
    for _ in range(2):
        rig.engine.begin_sampling(SamplingSettings(max_tokens=200))
        rig.engine.ask({number: request for number, request in enumerate(requests(tuple(range(16))))})
        rig.engine.take(0.5)
        rig.engine.end_sampling()
        assert rig.engine.unfinished == 0
        load(rig, seed=0, folder=tmp_path)
    test_logps_equal_transformers(rig)


def test_what_is_unfinished_is_given_back_and_goes_on(rig: Rig) -> None:
    """Greedy responses that were cut and continued equal those that were not. One ends when the others have 40 tokens,
    of which the last ones are not handed out yet."""
    greedy, asked = SamplingSettings(max_tokens=120, temperature=0.0), requests((1, 2))
    expected = rig.engine.generate(asked, greedy)
    early = SampleRequest(prompt_ids(0, text="early"), (), (1,), begun=((7,) * 80,))
    rig.engine.begin_sampling(replace(greedy, keeps_unfinished=True))
    rig.engine.ask(dict(enumerate([*asked, early])))
    while not (ended := rig.engine.take(1.0)):
        pass
    assert [(one.number, one.completion.finish_reason) for one in ended] == [(3, "length")]
    assert len(ended[0].completion.token_ids) == 40
    cut = {(one.number, one.sample): one.completion for one in rig.engine.end_sampling()}
    assert cut.keys() == {(number, sample) for number in range(3) for sample in (0, 1)}
    for (number, sample), one in cut.items():
        assert one.finish_reason == UNFINISHED and 40 - TOKENS_PER_PIECE < len(one.token_ids) < 120
        assert_same(one, expected[number][sample], slice(len(one.token_ids)))
    again = [
        replace(request, begun=tuple(cut[number, sample].token_ids for sample in (0, 1)))
        for number, request in enumerate(asked)
    ]
    for number, completions in enumerate(rig.engine.generate(again, greedy)):
        for sample, rest in enumerate(completions):
            assert_same(rest, expected[number][sample], slice(len(again[number].begun[sample]), None))
            assert rest.finish_reason == "length"


def assert_same(part: Completion, whole: Completion, place: slice) -> None:
    assert part.token_ids == whole.token_ids[place]
    assert part.logps == pytest.approx(whole.logps[place], abs=LOGP_TOLERANCE)


def test_sampling_is_cut_off_at_once(rig: Rig) -> None:
    request = SampleRequest(token_ids=prompt_ids(0), images=(), seeds=tuple(range(8)))
    os.kill(rig.engine.pid, signal.SIGSTOP)  # the tiny model could answer before anybody asks
    try:
        with pytest.raises(StopRequested):
            rig.engine.generate([request], SamplingSettings(max_tokens=64), stop_wanted=lambda: True)
    finally:
        os.kill(rig.engine.pid, signal.SIGCONT)
    with pytest.raises(RuntimeError, match="still works on another request"):
        rig.engine.live_digests()
    rig.engine.end_sampling()  # for the other tests
