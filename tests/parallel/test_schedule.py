"""The micro-batches that a rank runs through its stages, and the ranks whose results count. Several: test_policy.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from megatron_vppo.algorithm.types import PerturbKey
from megatron_vppo.parallel.batching import ResponseTokens, View
from megatron_vppo.parallel.image_runs import Showing, showings
from megatron_vppo.parallel.layout import Layout, single_rank
from megatron_vppo.parallel.schedule import ScheduleRunner
from tests.models.tiny import save_tiny_model, tiny_config
from tests.parallel.policy_rig import BANNED, PIXELS, make_responses, make_settings, make_stages


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScheduleRunner]:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder, tiny_config(tied=True, vocab=299))
    with single_rank() as layout:
        yield ScheduleRunner(
            make_stages(folder, layout),
            hf_config=AutoConfig.from_pretrained(folder),
            layout=layout,
            settings=make_settings(rows=2),
            pixels=PIXELS,
        )


def placed(layout: Layout, *, stage: int, tensor_rank: int) -> Layout:
    """A rank of two stages on two tensor-parallel ranks each."""
    return dataclasses.replace(layout, pipeline=2, pipeline_rank=stage, tensor=2, tensor_rank=tensor_rank)


def test_results_are_those_of_one_rank_of_the_last_stage(
    runner: ScheduleRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = runner.layout
    counting = []
    for stage, tensor_rank in ((0, 0), (0, 1), (1, 0), (1, 1)):
        monkeypatch.setattr(runner, "layout", placed(layout, stage=stage, tensor_rank=tensor_rank))
        if runner.holds_results:
            counting.append((stage, tensor_rank))
    assert counting == [(1, 0)]


def test_micro_batches_are_neighbours_of_a_group(runner: ScheduleRunner) -> None:
    assert runner.update_micro_batches(make_responses()) == [(0, 1), (2,), (3, 4), (5, 6), (7,)]


def test_the_head_of_a_model_without_gradients(runner: ScheduleRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    weight_Vh = runner.stages[0].head_weight_Vh()
    for rank in (0, 1):
        monkeypatch.setattr(runner, "layout", placed(runner.layout, stage=1, tensor_rank=rank))
        head = runner.vocab_head(trained=False)
        assert head.weight_Vh is weight_Vh and head.weight_grad_Vh is None
        assert head.vocab_start == rank * len(weight_Vh)


def test_every_micro_batch_is_read_once_in_order(runner: ScheduleRunner) -> None:
    """Without gradient, and while the stage is not in training; a rank without rows runs a row without tokens."""
    read: list[tuple[list[int], int]] = []

    def collect(tokens: ResponseTokens, hidden_C1h: Tensor) -> None:
        assert not hidden_C1h.requires_grad and not runner.stages[0].training
        assert tokens.at is not None
        read.append((sorted(set(tokens.at[0].tolist())), len(hidden_C1h)))

    views = [[View(0, None), View(1, None)], [View(2, None)]]
    runner.forward(make_responses(), showings(make_responses(), views, ranks=1), collect)
    rows = make_responses()
    prompts, answers = [len(row.prompt.token_ids) for row in rows], [len(row.token_ids) - 1 for row in rows]
    assert read == [([0, 1], prompts[0] + sum(answers[:2])), ([2], prompts[2] + answers[2])], "0 and 1 share a prompt"
    assert runner.stages[0].training
    read.clear()
    runner.forward(make_responses(), [], collect)
    assert read == [([], prompts[0] + answers[0])] and torch.is_grad_enabled()


def test_a_forward_pass_leaves_the_amaxes_of_fp8_alone(runner: ScheduleRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer notes them in a history as TransformerEngine's does; recipe 'delayed' takes its next scales from that."""
    layer = runner.stages[0].language.decoder.layers[0].self_attention.linear_qkv
    history, seen = torch.zeros(3, 1), []
    monkeypatch.setattr(layer, "fp8_meta", {"scaling_fwd": SimpleNamespace(amax_history=history)}, raising=False)

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        history[0] = torch.maximum(history[0], args[0].abs().max())
        seen.append(history[0].item())

    with layer.register_forward_pre_hook(note):
        runner.forward(
            make_responses(), [Showing([View(0, None)]), Showing([View(1, None)])], lambda batch, hidden_C1h: None
        )
    assert len(seen) == 2 and seen[0] > 0 and history.tolist() == [[0.0]] * 3


@pytest.mark.parametrize(("token", "reason"), [(BANNED[1], "banned"), (299, "outside the vocabulary of 299")])
def test_a_token_that_the_head_cannot_score_is_refused(runner: ScheduleRunner, token: int, reason: str) -> None:
    responses = make_responses()
    responses[1] = dataclasses.replace(responses[1], token_ids=(5, token, 6))
    views = [[View(0, None), View(1, None), View(1, PerturbKey(1, 1))]]
    with pytest.raises(ValueError, match=f"^1 of 7 target tokens .*{reason}"):
        runner.forward(responses, [Showing(view) for view in views], lambda batch, hidden: None)
