"""Which devices an engine gets. Engines themselves: tests/rollout."""

from __future__ import annotations

import pytest

from megatron_vppo.rollout.child import child_environment
from megatron_vppo.rollout.records import EngineSettings
from megatron_vppo.trainer.engines import engine_devices


def test_engines_share_out_the_gpus_of_a_machine() -> None:
    devices = [engine_devices(None, device_count=8, local_rank=rank, size=2) for rank in (0, 2, 4, 6)]
    assert devices == ["0,1", "2,3", "4,5", "6,7"]


def test_visible_devices_of_the_trainer_are_kept() -> None:
    assert engine_devices("3,GPU-5f,7,1", device_count=4, local_rank=1, size=2) == "GPU-5f,7"


def test_an_engine_over_the_end_of_the_machine_is_refused() -> None:
    with pytest.raises(ValueError, match="need GPUs 3 to 4 of a machine that has 4"):
        engine_devices(None, device_count=4, local_rank=3, size=2)


def test_the_engine_process_sees_only_its_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    settings = EngineSettings(model="m", max_model_len=8, device="cuda", cuda_visible_devices="2,3")
    assert child_environment(settings)["CUDA_VISIBLE_DEVICES"] == "2,3"
    unset = EngineSettings(model="m", max_model_len=8, device="cuda")
    assert child_environment(unset)["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"
