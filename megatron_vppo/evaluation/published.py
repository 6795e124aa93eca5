"""Published accuracies on the benchmarks of VPPO's paper, to be shown next to one's own runs.

All of the paper's are avg@8 in percent at temperature 1.0, by exact match of the boxed answer, without seeds or errors.
MMK12 is the set that the authors validated on, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

VPPO8 = ("MathVerse", "DynaMath", "MMK12", "Geo3K", "MathVision", "We-Math", "LogicVista", "MMMU-Pro")
"""The benchmarks of the paper, in its order, by the names that examples/eval/vppo8.yaml gives them."""

_PAPER = "arXiv 2510.09285 v2"
_VL7 = "Qwen2.5-VL-7B"
_VL32 = "Qwen2.5-VL-32B"
_VL8 = "Qwen3-VL-8B"
_VL3 = "Qwen2.5-VL-3B"


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """One row of a published table."""

    model: str
    """The name that the source gives it."""
    base: str
    """The model that it was trained from."""
    accuracy: Mapping[str, float]
    """Percent, by the name of the benchmark."""
    average: float | None
    """Percent; the mean of the eight, unless `note` says otherwise. None: the source has none."""
    source: str
    note: str = field(default="")


def _eight(base: str, source: str, model: str, *numbers: float, note: str = "") -> PublishedRow:
    """Builds a row from the eight benchmarks and the average, as the paper's tables list them."""
    *eight, average = numbers
    return PublishedRow(model, base, dict(zip(VPPO8, eight, strict=True)), average, source, note)


_REPRODUCED = "the paper's own run of a published model, with its authors' prompts"
_ON_GEO3K = f"{_REPRODUCED}; trained on Geometry3K"
_T1, _README = f"{_PAPER}, table 1", "README of VPPO-RL"

MAIN = (
    _eight(_VL7, _T1, "Qwen2.5-VL-7B", 39.0, 55.7, 42.5, 37.1, 18.4, 46.4, 42.4, 25.1, 38.3),
    _eight(_VL7, _T1, "GRPO", 66.5, 65.8, 72.3, 40.2, 30.7, 68.1, 45.6, 35.2, 53.1),
    _eight(_VL7, _T1, "DAPO", 68.3, 66.6, 82.1, 41.5, 30.5, 68.0, 46.8, 35.9, 55.0),
    _eight(_VL7, _T1, "VPPO", 71.6, 68.1, 82.8, 46.5, 33.3, 71.5, 47.9, 37.9, 57.5),
    _eight(_VL7, _T1, "PAPO-D-7B", 68.6, 66.8, 80.6, 44.1, 30.6, 68.3, 46.7, 36.3, 55.3),
    _eight(_VL7, _T1, "MM-Eureka-7B", 67.1, 65.4, 67.5, 40.3, 31.1, 65.5, 46.3, 30.3, 51.7, note=_REPRODUCED),
    _eight(_VL7, _T1, "ThinkLite-7B", 64.2, 64.6, 62.6, 37.6, 32.0, 66.5, 39.4, 28.0, 49.4, note=_REPRODUCED),
    _eight(_VL7, _T1, "VL-Rethinker-7B", 68.8, 65.7, 68.3, 40.7, 31.9, 68.9, 46.3, 37.0, 53.5, note=_REPRODUCED),
    _eight(_VL7, _T1, "NoisyRollout-7B", 67.8, 65.5, 50.0, 51.8, 22.1, 71.0, 47.3, 34.5, 51.3, note=_ON_GEO3K),
    _eight(_VL7, _T1, "R1-ShareVL-7B", 68.0, 65.1, 70.9, 41.2, 30.1, 69.9, 45.6, 35.1, 53.2, note=_REPRODUCED),
    _eight(_VL32, _T1, "Qwen2.5-VL-32B", 68.5, 68.7, 68.8, 47.0, 39.3, 71.0, 52.8, 39.6, 57.0),
    _eight(_VL32, _T1, "GRPO", 74.2, 71.6, 80.7, 51.4, 42.8, 76.7, 58.3, 45.4, 62.6),
    _eight(_VL32, _T1, "DAPO", 73.3, 72.6, 86.4, 51.4, 42.8, 76.2, 58.9, 46.4, 63.5),
    _eight(_VL32, _T1, "VPPO", 75.1, 73.1, 86.3, 53.4, 44.6, 77.7, 59.2, 47.1, 64.6),
    _eight(_VL32, _T1, "MM-Eureka-32B", 71.8, 72.0, 73.4, 51.0, 43.2, 75.0, 56.8, 43.1, 60.8, note=_REPRODUCED),
    _eight(_VL32, _T1, "NoisyRollout-32B", 73.0, 72.2, 60.2, 56.6, 27.9, 75.7, 56.2, 43.1, 58.1, note=_ON_GEO3K),
    _eight(_VL8, _README, "Qwen3-VL-8B-Instruct", 67.7, 72.2, 62.0, 57.5, 37.8, 69.0, 50.1, 33.7, 56.3),
    _eight(_VL8, _README, "VPPO-8B", 83.8, 80.0, 80.6, 71.9, 55.9, 84.3, 62.3, 52.4, 71.4, note="no GRPO or DAPO row"),
)
"""The main results."""

ABLATIONS = (
    _eight(_VL7, f"{_PAPER}, table 2", "advantage shaping alone", 70.4, 67.5, 83.3, 43.5, 31.3, 69.3, 47.4, 37.3, 56.3),
    _eight(_VL7, f"{_PAPER}, table 2", "token filter alone", 71.2, 68.6, 80.9, 45.3, 34.7, 70.3, 48.2, 37.3, 57.1),
    _eight(_VL7, f"{_PAPER}, table 3", "shaping 0.8 to 1.2", 68.7, 67.5, 82.9, 43.4, 31.9, 69.4, 46.5, 36.7, 55.9),
    _eight(_VL7, f"{_PAPER}, table 3", "shaping from 0.8", 69.8, 67.6, 82.6, 43.1, 31.5, 70.3, 47.1, 37.3, 56.2),
    _eight(_VL7, f"{_PAPER}, table 3", "shaping 0.9 to 1.1", 69.1, 67.6, 82.6, 43.2, 31.5, 69.2, 46.6, 37.2, 55.9),
    _eight(_VL7, f"{_PAPER}, table 4", "random filter, k 0.4", 69.3, 66.2, 76.8, 42.0, 31.0, 69.3, 47.5, 36.2, 54.8),
    _eight(_VL7, f"{_PAPER}, table 4", "entropy filter, k 0.2", 70.1, 67.2, 77.9, 45.0, 32.6, 70.6, 48.0, 36.4, 56.0),
    _eight(_VL7, f"{_PAPER}, table 4", "entropy filter, k 0.4", 69.3, 67.6, 80.0, 42.8, 31.7, 69.4, 47.4, 37.0, 55.7),
    _eight(_VL7, f"{_PAPER}, table 4", "entropy filter, k 0.6", 69.9, 67.4, 81.0, 43.4, 31.4, 69.1, 47.1, 36.9, 55.8),
    _eight(_VL7, f"{_PAPER}, table 4", "entropy filter, k 0.8", 69.6, 66.9, 81.1, 41.6, 31.2, 69.0, 46.6, 36.2, 55.3),
    _eight(_VL7, f"{_PAPER}, table 5", "VPPO on GRPO", 69.7, 66.4, 76.4, 41.0, 31.7, 69.5, 47.6, 35.8, 54.8),
    _eight(_VL7, f"{_PAPER}, table 6", "soft weights", 70.0, 67.2, 82.6, 43.8, 32.6, 70.6, 46.6, 36.3, 56.2),
    _eight(_VL7, f"{_PAPER}, table 7", "reward shaping", 70.7, 68.4, 82.6, 44.7, 33.5, 70.1, 47.1, 37.6, 56.8),
    _eight(_VL7, f"{_PAPER}, table 10", "DAPO, entropy 0.00", 60.2, 61.3, 79.4, 33.8, 26.0, 59.8, 38.4, 32.8, 49.0),
    _eight(_VL7, f"{_PAPER}, table 10", "DAPO, entropy 0.02", 66.2, 64.6, 80.2, 39.9, 28.0, 65.9, 42.8, 34.1, 52.7),
    _eight(_VL7, f"{_PAPER}, table 10", "DAPO, entropy 0.04", 68.3, 64.7, 80.9, 42.2, 29.4, 67.9, 46.0, 35.1, 54.3),
    _eight(_VL7, f"{_PAPER}, table 10", "DAPO, entropy 0.08", 69.3, 66.0, 81.2, 42.9, 31.1, 67.8, 46.0, 35.4, 55.0),
    _eight(_VL7, f"{_PAPER}, table 11", "Gaussian noise", 70.2, 67.7, 82.3, 43.9, 32.9, 69.8, 47.0, 38.0, 56.5),
    _eight(_VL7, f"{_PAPER}, table 11", "Gaussian blur", 69.1, 68.2, 82.4, 45.4, 32.5, 70.0, 46.9, 37.0, 56.4),
    _eight(_VL7, f"{_PAPER}, table 11", "grey image", 71.0, 68.1, 82.1, 43.3, 32.8, 69.0, 47.0, 37.9, 56.4),
    _eight(_VL7, f"{_PAPER}, table 12", "dependency by JSD", 71.8, 67.6, 82.7, 45.1, 32.6, 70.8, 47.8, 36.9, 56.9),
    _eight(_VL7, f"{_PAPER}, table 12", "by top-1 probability", 61.5, 64.4, 74.9, 31.5, 30.1, 62.3, 44.7, 33.3, 50.3),
    _eight(_VL7, f"{_PAPER}, table 13", "5 responses", 70.7, 68.2, 80.7, 44.8, 32.9, 69.5, 48.4, 36.8, 56.5),
    _eight(_VL7, f"{_PAPER}, table 13", "12 responses", 71.3, 68.1, 83.5, 46.9, 32.9, 70.2, 48.3, 37.8, 57.4),
    _eight(_VL7, f"{_PAPER}, table 13", "16 responses", 72.2, 68.4, 84.2, 46.5, 33.2, 71.1, 48.7, 37.0, 57.7),
    _eight(_VL7, f"{_PAPER}, table 15", "DAPO for VPPO's 17 h", 68.6, 67.0, 81.9, 42.1, 30.6, 67.6, 46.2, 36.3, 55.0),
)
"""The paper's ablations."""

_PIVOT = "arXiv 2609.18057 (PIVOT)"
_TPAE = "arXiv 2609.39168 (TPAE)"
_PIVOT_SETTING = "avg@8, entropy penalty 0.06 for all; benchmarks of that paper"
_TPAE_SETTING = "seven benchmarks, in that paper's own harness"


def _mean_alone(base: str, source: str, model: str, average: float, note: str) -> PublishedRow:
    return PublishedRow(model, base, {}, average, source, note)


INDEPENDENT = (
    PublishedRow(
        "VPPO", _VL7, {"MMK12": 80.57}, None, "VPPO-RL issue 13", "a user's run; Geo3K and MathVision lower as well"
    ),
    *(
        _mean_alone(base, _PIVOT, model, average, f"{_PIVOT_SETTING}; trained on {data}")
        for base, data, rows in (
            (_VL3, "Geo3K", {"GRPO": 42.78, "DAPO": 46.06, "PAPO-D": 48.44, "VPPO": 48.67, "PIVOT": 51.25}),
            (_VL7, "Geo3K", {"GRPO": 52.99, "DAPO": 52.32, "PAPO-D": 54.84, "VPPO": 55.53, "PIVOT": 57.85}),
            (_VL3, "ViRL39K", {"DAPO": 53.99, "PAPO-D": 55.23, "VPPO": 53.83, "PIVOT": 55.68}),
        )
        for model, average in rows.items()
    ),
    _mean_alone(_VL7, _TPAE, "VPPO-7B", 47.59, _TPAE_SETTING),
    _mean_alone(_VL7, _TPAE, "TPAE-D", 48.71, _TPAE_SETTING),
    _mean_alone(_VL7, _TPAE, "Shuffle-R1", 47.32, _TPAE_SETTING),
    _mean_alone(_VL8, _TPAE, "TPAE-D", 61.35, _TPAE_SETTING),
)
"""The numbers of others. Their averages are over other benchmarks, and do not compare with the paper's."""
