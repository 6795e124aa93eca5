"""A vLLM engine on a GPU: its memory is free while it sleeps, and its answers afterwards are those of its weights."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_vppo.rollout.engine import RolloutEngine
from megatron_vppo.rollout.records import SampleRequest, SamplingSettings, WeightTransfer
from tests.rollout.settings import engine_settings
from tests.rollout.tiny_model import (
    build_config,
    build_model,
    build_qwen3_config,
    build_tokenizer,
    save_model_folder,
    save_qwen3_folder,
)

pytest.importorskip("vllm", reason="vLLM is not installed on this machine")
pytestmark = [pytest.mark.gpu, pytest.mark.slow]

START_SECONDS = 600
MIB = 2**20
FAMILIES = {"Qwen2.5-VL": (save_model_folder, build_config), "Qwen3-VL": (save_qwen3_folder, build_qwen3_config)}
GREEDY = SamplingSettings(max_tokens=32, temperature=0.0)


def _weights(family: str, seed: int) -> dict[str, torch.Tensor]:
    """Under the names of released checkpoints or of newer files, which the engine takes alike."""
    model = build_model(FAMILIES[family][1](build_tokenizer(), tied=False), seed=seed)
    return {name: tensor.to("cuda", torch.bfloat16) for name, tensor in model.state_dict().items()}


def _ask(engine: RolloutEngine) -> list[tuple[int, ...]]:
    prompts = [tuple(build_tokenizer()(f"<|im_start|>user\n{text}<|im_end|>\n")["input_ids"]) for text in ("one", "2")]
    answers = engine.generate([SampleRequest(ids, (), (1,)) for ids in prompts], GREEDY)
    return [completion.token_ids for (completion,) in answers]


@pytest.fixture(
    scope="module",
    params=[
        ("Qwen2.5-VL", "ipc", None, "graphs"),
        ("Qwen2.5-VL", "ipc", None, "eager"),
        ("Qwen3-VL", "ipc", None, "graphs"),
        ("Qwen2.5-VL", "shm", None, "eager"),
        ("Qwen2.5-VL", "ipc", "fp8_per_tensor", "graphs"),
    ],
    ids=lambda param: " ".join(map(str, param)),
)
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RolloutEngine, str]]:
    family: str
    transfer: WeightTransfer
    family, transfer, quantization, execution = request.param
    folder = FAMILIES[family][0](tmp_path_factory.mktemp("tiny"), tied=False)
    settings = engine_settings(
        model=str(folder), max_model_len=256, device="cuda", dtype="bfloat16", max_num_seqs=8,
        gpu_memory_utilization=0.2, load_format="empty", can_sleep=True, weight_transfer=transfer,
        quantization=quantization, unquantized_layers=("visual.*",), enforce_eager=execution == "eager",
    )  # fmt: skip
    with RolloutEngine(settings, log_path=folder / "engine.log", buffer_bytes=60_000) as engine:
        engine.wait_ready(timeout_seconds=START_SECONDS)
        yield engine, family


def _free() -> int:
    return torch.cuda.mem_get_info()[0]


def test_a_step_of_sleep_sync_and_sampling(running: tuple[RolloutEngine, str]) -> None:
    engine, family = running
    first, second = _weights(family, 0), _weights(family, 1)
    vision = [name for name in first if "visual." in name]
    engine.send_weights(iter(first.items()), version=0, verify=True)
    engine.preserve(vision)
    answers = _ask(engine)
    assert len({token for answer in answers for token in answer}) > 5

    awake = _free()
    engine.sleep()
    asleep = _free()
    total = torch.cuda.mem_get_info()[1]
    assert asleep - awake > 0.1 * total, "most of what gpu_memory_utilization gave it is free again"
    engine.wake("weights")
    assert asleep - _free() < 0.05 * total, "the KV cache still sleeps"
    trained = {name: tensor for name, tensor in second.items() if name not in vision}
    report = engine.send_weights(iter(trained.items()), version=1, verify=True, kept=vision)
    assert report.checksums_ok and report.num_checksums > 0, "the preserved tower is among what was compared"
    engine.wake("kv_cache")
    assert _ask(engine) != answers

    engine.sleep()
    engine.wake("weights")
    engine.send_weights(iter(first.items()), version=2, verify=True)
    engine.wake("kv_cache")
    assert _ask(engine) == answers, "the same weights answer as before, whatever lay in the woken memory"

    engine.sleep(keep_weights=True)
    engine.wake("weights")
    engine.wake("kv_cache")
    assert _ask(engine) == answers
