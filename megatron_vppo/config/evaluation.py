"""The settings of an evaluation besides its benchmarks. Names and types are those of a run, as `schema.py` has them.

What decides on the responses has no default: either a preset sets it, or the file does. So two evaluations never
differ by a default that one of their authors did not know. What is written out wins over the preset.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from megatron_vppo.config.choices import Dtype, EvalPreset
from megatron_vppo.config.ranges import LARGEST_INT, MOST_RESPONSES, Count, Pixels, ShareAboveZero
from megatron_vppo.config.schema import EngineConfig, PromptConfig, Section


class EvalModelConfig(Section):
    dtype: Dtype | None = None
    """Number format of the weights; None: that of the folder's config.json, bfloat16 if it is another one."""


class EvalDataConfig(PromptConfig):
    max_prompt_length: Count
    """Tokens, image tokens included. Longer prompts are refused at start, with their number. (Preset.)"""
    max_response_length: Count
    """Tokens. (Preset.)"""
    min_pixels: Pixels
    """(Preset.)"""
    max_pixels: Pixels
    """Pixel budget per image. (Preset.)"""


class EvalRolloutConfig(EngineConfig):
    gpu_memory_utilization: float = Field(default=0.9, gt=0, lt=1)
    """Share of each of its GPUs that an engine takes."""
    n: int = Field(gt=0, le=MOST_RESPONSES)
    """Samples per question: k of avg@k. (Preset.)"""
    temperature: float = Field(ge=0, le=2)
    """0: greedy. (Preset.)"""
    top_p: ShareAboveZero
    """(Preset.)"""
    top_k: int = Field(le=LARGEST_INT)
    """-1: off. (Preset.)"""


EVAL_PRESETS: dict[EvalPreset, dict[str, dict[str, Any]]] = {
    # The paper's text, with the pixels of its training; its 32B models had 4096 tokens.
    "paper": {
        "data": {
            "max_prompt_length": 9216, "max_response_length": 2048, "min_pixels": 200704, "max_pixels": 1003520,
        },
        "rollout": {"n": 8, "temperature": 1.0, "top_p": 1.0, "top_k": -1},
        "benchmarks": {"grader": "mathruler"},
    },
    # What PAPO-Eval's programs and scripts do.
    "papo-eval": {
        "data": {"max_prompt_length": 9216, "max_response_length": 1024, "min_pixels": 1024, "max_pixels": 589824},
        "rollout": {"n": 8, "temperature": 1.0, "top_p": 1.0, "top_k": 50},
        "benchmarks": {"grader": "mathruler"},
    },
}  # fmt: skip
"""The values of each preset, by section. Those of `benchmarks` are for every benchmark."""


def with_preset(values: Any) -> Any:
    """Lays the settings of an evaluation over those of the preset that they name.

    Values that validation will refuse anyway come back as they are.
    """
    named = values.get("preset") if isinstance(values, dict) else None
    preset = next((preset for name, preset in EVAL_PRESETS.items() if name == named), None)
    if preset is None:
        return values
    filled = dict(values)
    for name in ("data", "rollout"):
        section = values.get(name, {})
        if isinstance(section, dict):
            filled[name] = {**preset[name], **section}
    if isinstance(values.get("benchmarks"), list):
        filled["benchmarks"] = [
            {**preset["benchmarks"], **one} if isinstance(one, dict) else one for one in values["benchmarks"]
        ]
    return filled
