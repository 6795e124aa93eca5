"""Engine processes end when they should, leave nothing behind, and say why they failed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_vppo.rollout import os_processes
from megatron_vppo.rollout.engine import RolloutEngine
from megatron_vppo.rollout.records import SampleRequest, SamplingSettings
from tests.rollout.rig import START_SECONDS, make_image, prompt_ids, reference_logps, weights
from tests.rollout.settings import engine_settings
from tests.rollout.tiny_model import build_config, build_model, build_tokenizer, save_model_folder

GONE_SECONDS = 10
LOGP_TOLERANCE = 1e-5

TRAINER = """
    import signal, sys, time
    from pathlib import Path
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
    from megatron_vppo.rollout.engine import RolloutEngine
    from tests.rollout.settings import engine_settings
    engine = RolloutEngine(engine_settings(model=sys.argv[1], max_model_len=64), log_path=Path(sys.argv[2]))
    print(engine.pid, flush=True)
    time.sleep(600)
"""


def wait_until_gone(group: int) -> list[int]:
    deadline = time.monotonic() + GONE_SECONDS
    while (left := os_processes.members(group)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


@pytest.fixture
def trainer(tmp_path: Path):
    """A process that has started an engine, as a trainer would; its engine is still loading."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(TRAINER), str(tmp_path), str(tmp_path / "engine.log")],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert process.stdout is not None
    with process.stdout:
        engine_pid = int(process.stdout.readline())
    deadline = time.monotonic() + 60
    while len(os_processes.members(engine_pid)) < 2 and time.monotonic() < deadline:  # the engine and its watchdog
        time.sleep(0.05)
    assert len(os_processes.members(engine_pid)) >= 2
    yield process, engine_pid
    process.kill()
    process.wait()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_engine_ends_with_its_trainer(trainer, how: signal.Signals, tmp_path: Path) -> None:
    process, engine_pid = trainer
    os.killpg(process.pid, how)  # SIGINT to the group: what Ctrl-C in a terminal does
    process.wait(timeout=30)
    assert wait_until_gone(engine_pid) == []
    assert "KeyboardInterrupt" not in (tmp_path / "engine.log").read_text()


def test_close_while_loading_is_quick_and_idempotent(tmp_path: Path) -> None:
    engine = RolloutEngine(engine_settings(model=str(tmp_path), max_model_len=64), log_path=tmp_path / "engine.log")
    with pytest.raises(RuntimeError, match="call wait_ready first"):
        engine.generate([], SamplingSettings(max_tokens=1))
    start = time.monotonic()
    engine.close()
    engine.close()
    assert time.monotonic() - start < GONE_SECONDS
    assert os_processes.members(engine.pid) == []


def test_time_limit_of_the_start(tmp_path: Path) -> None:
    engine = RolloutEngine(engine_settings(model=str(tmp_path), max_model_len=64), log_path=tmp_path / "engine.log")
    with pytest.raises(RuntimeError, match="did not answer within 0 seconds"):
        engine.wait_ready(timeout_seconds=0.1)
    assert os_processes.members(engine.pid) == []


@pytest.mark.extended
def test_failure_shows_the_end_of_the_log(tmp_path: Path) -> None:
    """An empty folder is no model; vLLM's own words reach the trainer."""
    log_path = tmp_path / "logs" / "engine.log"
    with RolloutEngine(engine_settings(model=str(tmp_path), max_model_len=64), log_path=log_path) as engine:
        with pytest.raises(RuntimeError) as error:
            engine.wait_ready(timeout_seconds=START_SECONDS)
        message = str(error.value)
        assert "ended with exit status 1" in message
        assert str(log_path) in message
        assert "Traceback" in log_path.read_text()
        shown = [line.removeprefix("  | ") for line in message.splitlines()[1:]]
        assert shown == log_path.read_text().splitlines()[-30:]
        assert os_processes.members(engine.pid) == []


def test_bad_settings_are_refused_before_a_process_starts() -> None:
    with pytest.raises(ValueError, match="tensor_parallel_size = 0"):
        engine_settings(max_model_len=64, tensor_parallel_size=0)
    with pytest.raises(ValueError, match="2000 banned_token_ids"):
        engine_settings(max_model_len=64, banned_token_ids=tuple(range(2000)))


@pytest.mark.slow
@pytest.mark.extended
def test_two_workers_with_untied_embeddings_then_a_killed_engine(
    tmp_path: Path, short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards verified, log-probs equal, and after SIGKILL of the engine no process, memory or socket is left."""
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", str(short_folder))
    folder = save_model_folder(tmp_path / "model", tied=False)
    settings = engine_settings(
        model=str(folder),
        max_model_len=128,
        dtype="float32",
        tensor_parallel_size=2,
        max_num_seqs=16,
        cpu_kv_cache_gib=0.125,
        load_format="empty",
    )
    with RolloutEngine(settings, log_path=tmp_path / "engine.log") as engine:
        engine.wait_ready(timeout_seconds=START_SECONDS)
        request = SampleRequest(prompt_ids(1), (make_image(1, width=84, height=84),), (1, 2))
        for seed in (3, 4):  # the second load replaces weights that were loaded, not zeros
            model = build_model(build_config(build_tokenizer(), tied=False), seed=seed)
            tensors = weights(model, tmp_path / "weights")
            assert "lm_head.weight" in tensors
            report = engine.send_weights(iter(tensors.items()), version=seed, verify=True)
            assert report.checksums_ok and report.num_checksums > 80
            for completion in engine.generate([request], SamplingSettings(max_tokens=12))[0]:
                expected = reference_logps(model, request, completion, banned=())
                assert completion.logps == pytest.approx(expected.tolist(), abs=LOGP_TOLERANCE)
        assert len(os_processes.members(engine.pid)) >= 4  # engine, watchdog, two workers
        shared = shared_memory_of(engine.pid)
        assert shared, "the engine's processes share memory; the test would not see it left behind"
        assert any(path.is_socket() for path in short_folder.glob("vppo-engine-*/*"))
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="signal SIGKILL"):
            engine.generate([request], SamplingSettings(max_tokens=12))
        assert wait_until_gone(engine.pid) == []
        assert shared & set(os.listdir("/dev/shm")) == set()
        assert [path for path in short_folder.rglob("*") if path.is_socket()] == []
        assert list(short_folder.glob("vppo-engine-*")) == []


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder for sockets, whose paths have at most 107 bytes: pytest's own folders are too deep."""
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        yield Path(folder)


def shared_memory_of(engine: int) -> set[str]:
    """Names of the shared memory that any process of an engine has mapped, whether they still stand there or not."""
    maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in os_processes.members(engine))
    return set(re.findall(r"/dev/shm/(\S+)", maps))
