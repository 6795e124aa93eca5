"""The samples of a question share its images: vLLM's processor and tower see each of them once.

Counted in the engine's own process, with the engine and the sampling loop of an evaluation.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vppo.rollout.child import engine_environment
from tests.evaluation.suites import tiny_model
from tests.rollout.settings import engine_settings

SAMPLES, QUESTIONS = 4, 2
COUNT = """
import json, sys
from multiprocessing import Pipe
from transformers import Qwen2_5_VLProcessor
from megatron_vppo.rollout.engine_process import Engine
from megatron_vppo.rollout.records import SampleRequest, SamplingSettings
from megatron_vppo.rollout.sampling_loop import SamplingLoop
from tests.rollout.rig import make_image, prompt_ids
from tests.rollout.settings import engine_settings

SAMPLES, QUESTIONS = int(sys.argv[2]), int(sys.argv[3])
engine = Engine(engine_settings(sys.argv[1], max_model_len=128))
seen = {"processed": 0, "patches": 0}

def counting(model):
    forward = model.visual.forward
    def tower(pixels, *others, **more):
        seen["patches"] += len(pixels)
        return forward(pixels, *others, **more)
    model.visual.forward = tower

engine._llm.apply_model(counting)
call = Qwen2_5_VLProcessor.__call__
def processor(self, images=None, *others, **more):
    seen["processed"] += len(images or [])
    return call(self, images, *others, **more)
Qwen2_5_VLProcessor.__call__ = processor

asked = {
    number: SampleRequest(prompt_ids(1), (make_image(number),), tuple(range(SAMPLES))) for number in range(QUESTIONS)
}
ours, theirs = Pipe()
ours.send(asked)
ended = []
def tell(message):
    ended.extend(message[1])
    if len(ended) == SAMPLES * QUESTIONS:
        ours.send(None)
loop = SamplingLoop(engine._llm, SamplingSettings(max_tokens=4), banned=engine._banned, report=lambda: None)
loop.run(theirs, tell)
seen["responses"] = len(ended)
print("SEEN " + json.dumps(seen), flush=True)
engine.shutdown()
"""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.extended
def test_each_image_is_processed_and_encoded_once(tmp_path: Path) -> None:
    """An image of 112 x 84 pixels has 8 x 6 patches of 14 pixels."""
    model = tiny_model(tmp_path / "model")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environment = engine_environment(engine_settings(str(model)), folder=temporary)
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    words = [sys.executable, "-c", COUNT, str(model), str(SAMPLES), str(QUESTIONS)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("SEEN ")]
    seen = json.loads(line.removeprefix("SEEN "))
    assert seen["responses"] == SAMPLES * QUESTIONS
    assert seen["processed"] == QUESTIONS
    assert seen["patches"] == QUESTIONS * 8 * 6
