"""Engines that sleep: what their client allows, what is still there afterwards, and vLLM's control plane around it.

vLLM has no sleep on CPU: its scheduler and executor go through all the states there, but its worker keeps its memory.
Memory itself: tests/gpu.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from vllm.model_executor.layers.quantization.online.fp8 import Fp8PerBlockOnlineLinearMethod

from megatron_vppo.rollout import engine as engine_module
from megatron_vppo.rollout.engine import RolloutEngine
from megatron_vppo.rollout.records import EngineSettings, LiveWeight, SampleRequest, SamplingSettings
from megatron_vppo.rollout.transfer.vllm_layout import ExpectedDigests, StreamCheck, parameters_of
from megatron_vppo.rollout.worker import WorkerExtension, _live_weights
from tests.rollout.rig import Rig, prompt_ids, reference_logps, weights
from tests.rollout.settings import engine_settings

LOGP_TOLERANCE = 1e-5

SCALES_ON_THE_HOST = {"_k_scale_cpu", "_v_scale_cpu"}
"""Not lost on a GPU; on CPU they count as any other. See also test_engine_qwen3.py."""


def attribute(name: str) -> str:
    return name.rpartition(".")[2].partition("[")[0]


# --- A real engine on CPU ---------------------------------------------------------------------------------------------


def test_vllm_takes_weights_half_awake_and_answers_when_awake(rig: Rig, tmp_path: Path) -> None:
    """The requests of a training step, in their order."""
    request = [SampleRequest(prompt_ids(0), (), (1, 2))]
    settings = SamplingSettings(max_tokens=8, stop_token_ids=(rig.eos,))
    call = rig.engine._session.call
    for version, keep in ((5, False), (6, True)):
        model = rig.model(version)
        saved = call("sleep", keep_weights=keep)
        assert {leaf for worker in saved for leaf in map(attribute, worker)} == (set() if keep else SCALES_ON_THE_HOST)
        call("wake", tag="weights")
        rig.engine.send_weights(iter(weights(model, tmp_path).items()), version=version, verify=True)
        call("wake", tag="kv_cache")
        (answers,) = rig.engine.generate(request, settings)
        assert {answer.weight_version for answer in answers} == {version}
        for answer in answers:
            expected = reference_logps(model, request[0], answer, banned=rig.banned)
            assert float((expected - torch.tensor(answer.logps)).abs().max()) < LOGP_TOLERANCE


def test_names_to_preserve_are_those_of_vllms_parameters(rig: Rig, tmp_path: Path) -> None:
    """Read from the loaded model: stacked layers under vLLM's name, and every one of them is a parameter there."""
    sender = rig.engine._require_ready()
    names = [name for name in weights(rig.model(0), tmp_path) if name.startswith("visual.")]
    parameters = sender.preserve(names)
    everything = {weight.parameter for worker in sender._workers for weight in worker}
    assert set(parameters) == {name for name in everything if name.startswith("visual.")}
    assert "visual.blocks.0.mlp.gate_up_proj.weight" in parameters, "of gate_proj and up_proj"
    rig.engine.preserve(names)
    rig.engine.preserve(())


# --- The client, with an engine that only says yes --------------------------------------------------------------------


WEIGHTS = [
    LiveWeight(name, name, False, 1) for name in ("visual.patch_embed.proj.weight", "language_model.model.norm.weight")
]


class YesMan:
    """Stands in for an engine's process: notes requests and consents to each."""

    requests: ClassVar[list[tuple[str, dict[str, Any]]]]
    is_lost = False

    def __init__(self, settings: EngineSettings, *, log_path: Path, silence_seconds: float | None) -> None:
        YesMan.requests = []
        self.is_first = True

    def send(self, message: tuple[str, dict[str, Any]] | None) -> None:
        self.requests.append(message or ("end of sampling", {}))

    def receive(self, **waiting: Any) -> tuple[str, Any]:
        first, self.is_first = self.is_first, False
        if first:
            return "done", [WEIGHTS]
        return "done", [] if self.requests[-1][0] == "end of sampling" else None

    def close(self, **kwargs: Any) -> None:
        pass


VISION = "visual.patch_embed.proj.weight"
NORM = "model.norm.weight"


def stream(*names: str) -> Iterator[tuple[str, torch.Tensor]]:
    return iter([(name, torch.ones(2)) for name in names])


@pytest.fixture
def sleeper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[RolloutEngine]:
    monkeypatch.setattr(engine_module, "ChildProcess", YesMan)
    settings = engine_settings(max_model_len=8, device="cuda", load_format="empty", can_sleep=True)
    with RolloutEngine(settings, log_path=tmp_path / "log") as engine:
        engine.wait_ready(timeout_seconds=1)
        yield engine


def test_a_sleeping_engine_refuses(sleeper: RolloutEngine) -> None:
    sleeper.send_weights(stream(VISION, NORM), version=0, verify=False)
    sleeper.sleep()
    with pytest.raises(RuntimeError, match="sample: the rollout engine sleeps; wake its kv_cache and weights first"):
        sleeper.generate([], SamplingSettings(max_tokens=1))
    with pytest.raises(RuntimeError, match="send_weights: the rollout engine sleeps; wake its weights first"):
        sleeper.send_weights(stream(VISION, NORM), version=1, verify=False)
    with pytest.raises(RuntimeError, match="sleep: the rollout engine sleeps"):
        sleeper.sleep()
    with pytest.raises(RuntimeError, match="live_digests: the rollout engine sleeps"):
        sleeper.live_digests()
    sleeper.wake("weights")
    with pytest.raises(RuntimeError, match="already holds its weights"):
        sleeper.wake("weights")
    sleeper.send_weights(stream(VISION, NORM), version=1, verify=False)
    with pytest.raises(RuntimeError, match="sample: the rollout engine sleeps; wake its kv_cache first"):
        sleeper.generate([], SamplingSettings(max_tokens=1))
    sleeper.wake("kv_cache")
    sleeper.generate([], SamplingSettings(max_tokens=1))
    asked = [(method, list(arguments.values())) for method, arguments in YesMan.requests if "weight_up" not in method]
    assert [item for item in asked if item[0] != "update_weights"] == [
        ("sleep", [False]), ("wake", ["weights"]), ("wake", ["kv_cache"]), ("sample", [SamplingSettings(1)]),
        ("end of sampling", []),
    ]  # fmt: skip


def test_woken_memory_without_a_load_is_no_model(sleeper: RolloutEngine) -> None:
    sleeper.send_weights(stream(VISION, NORM), version=0, verify=False)
    sleeper.sleep()
    sleeper.wake("weights")
    sleeper.wake("kv_cache")
    with pytest.raises(RuntimeError, match="call send_weights first"):
        sleeper.generate([], SamplingSettings(max_tokens=1))
    sleeper.send_weights(stream(VISION, NORM), version=0, verify=False)
    sleeper.sleep(keep_weights=True)
    sleeper.wake("weights")
    sleeper.wake("kv_cache")
    sleeper.generate([], SamplingSettings(max_tokens=1))


def test_only_what_is_preserved_need_not_come_again_after_sleep(sleeper: RolloutEngine) -> None:
    sleeper.send_weights(stream(VISION, NORM), version=0, verify=False)
    sleeper.sleep()
    sleeper.wake("weights")
    with pytest.raises(ValueError, match=r"no complete set of weights, .*visual.patch_embed.proj.weight is not there"):
        sleeper.send_weights(stream(NORM), version=1, verify=False, kept=(VISION,))

    sleeper.preserve((VISION,))
    sleeper.send_weights(stream(VISION, NORM), version=1, verify=False)
    sleeper.sleep()
    sleeper.wake("weights")
    assert sleeper.send_weights(stream(NORM), version=2, verify=False, kept=(VISION,)).num_tensors == 1
    sleeper.sleep()
    sleeper.wake("weights")
    with pytest.raises(ValueError, match=r"model.norm.weight is not there"):
        sleeper.send_weights(stream(VISION), version=3, verify=False, kept=(NORM,))


@pytest.mark.parametrize(
    "setting", [{"can_sleep": True}, {"weight_transfer": "ipc"}, {"quantization": "fp8_per_block"}]
)
def test_no_such_thing_on_cpu(setting: dict[str, Any]) -> None:
    (name,) = setting
    with pytest.raises(ValueError, match=f"{name} = .* needs engines on GPUs"):
        engine_settings(max_model_len=8, **setting)


def test_without_can_sleep_there_is_no_sleep(rig: Rig) -> None:
    with pytest.raises(RuntimeError, match="started without can_sleep"):
        rig.engine.sleep()


# --- Tensors that vLLM does not save ----------------------------------------------------------------------------------


class Worker(WorkerExtension):
    def __init__(self, model: torch.nn.Module) -> None:
        self.model_runner = SimpleNamespace(get_model=lambda: model)
        self.device = torch.device("cpu")


def test_plain_tensors_of_a_model_survive() -> None:
    model = torch.nn.Module()
    model.layer = torch.nn.Linear(2, 2)
    model.layer.scratch = [torch.zeros(3), torch.arange(4)]
    model.layer.view_of_weight = model.layer.weight.data[:1]
    model.kv_cache = torch.zeros(5)
    worker = Worker(model)
    assert worker.vppo_save_scratch() == ["layer.scratch[0]", "layer.scratch[1]"]
    for tensor in model.layer.scratch:
        tensor.fill_(77)
    worker.vppo_restore_scratch()
    assert [tensor.tolist() for tensor in model.layer.scratch] == [[0, 0, 0], [0, 1, 2, 3]]
    model.layer.scratch[0].fill_(1)
    worker.vppo_restore_scratch()
    assert model.layer.scratch[0].tolist() == [1, 1, 1], "only once: later wakes find it as it was left"


# --- Quantised weights ------------------------------------------------------------------------------------------------


def test_scales_of_quantised_weights_are_preserved_with_them() -> None:
    qkv = "language_model.model.layers.0.self_attn.qkv_proj"
    workers = [[LiveWeight(f"{qkv}.weight", f"{qkv}.weight", False, 1, scales=(f"{qkv}.weight_scale_inv",))]]
    parts = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    assert parameters_of(parts, workers) == (f"{qkv}.weight", f"{qkv}.weight_scale_inv")
    with pytest.raises(ValueError, match=r"vLLM holds .* as one"):
        parameters_of(parts[:2], workers)


def test_quantised_weights_are_known_by_their_layer_and_not_compared() -> None:
    """A layer that vLLM quantised, one that it did not, and a stream of 16-bit weights for both."""
    model = torch.nn.Module()
    model.language_model = torch.nn.Module()
    model.language_model.model = torch.nn.Module()
    layer = model.language_model.model.o_proj = torch.nn.Linear(4, 4, dtype=torch.bfloat16)
    norm = model.language_model.model.norm = torch.nn.LayerNorm(4, dtype=torch.bfloat16, bias=False)
    layer.quant_method = Fp8PerBlockOnlineLinearMethod.__new__(Fp8PerBlockOnlineLinearMethod)
    bfloat16_weight = layer.weight.detach().clone()
    layer.weight = torch.nn.Parameter(bfloat16_weight.to(torch.float8_e4m3fn), requires_grad=False)
    layer.weight_scale_inv = torch.nn.Parameter(torch.ones(1), requires_grad=False)
    worker = [weight for weight, _ in _live_weights(model)]
    prefix = "language_model.model"
    assert {weight.parameter: weight.scales for weight in worker} == {
        f"{prefix}.o_proj.weight": (f"{prefix}.o_proj.weight_scale_inv",),
        f"{prefix}.o_proj.bias": (),
        f"{prefix}.norm.weight": (),
    }

    check = StreamCheck([worker])
    expected = ExpectedDigests([worker], dtype=torch.bfloat16)
    sent = {
        "model.o_proj.weight": bfloat16_weight, "model.o_proj.bias": layer.bias, "model.norm.weight": norm.weight,
    }  # fmt: skip
    for name, tensor in sent.items():
        parameter, part = check.take(name)
        expected.add(tensor, parameter=parameter, part=part)
    check.finish()
    live = {
        f"{prefix}.{name}": hashlib.sha256(tensor.detach().view(torch.uint8).numpy()).hexdigest()
        for name, tensor in (("o_proj.bias", layer.bias), ("norm.weight", norm.weight))
    }
    assert expected.compare([live]) == 2
    with pytest.raises(RuntimeError, match=r"1 weights of the rollout engine differ.*norm"):
        expected.compare([{**live, f"{prefix}.norm.weight": ""}])
