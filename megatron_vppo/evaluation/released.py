"""The releases of the benchmarks: their hub ids, and their numbers of rows, of which another one is a copy that is not
whole.
"""

from __future__ import annotations

from pathlib import Path

from megatron_vppo.config.choices import BenchmarkSource

HUB_IDS: dict[BenchmarkSource, str] = {
    "mathverse": "AI4Math/MathVerse",
    "dynamath": "DynaMath/DynaMath_Sample",
    "mmk12": "FanqingM/MMK12",
    "geometry3k": "hiyouga/geometry3k",
    "mathvision": "MathLLMs/MathVision",
    "we_math": "We-Math/We-Math",
    "logicvista": "lscpku/LogicVista",
    "mmmu_pro": "MMMU/MMMU_Pro",
}
"""The data set on the hub that each native format is of."""
_OF_VPPO_EVAL = ("DynaMath", "MathVision", "MathLLMs")
_NATIVE: dict[BenchmarkSource, dict[str, int]] = {
    # testmini without 'Text Only' is what some copies call testmini
    "mathverse": {"testmini": 3940, "text only": 788, "testmini and text only": 4728},
    # 501 questions in ten variants
    "dynamath": {"ten variants": 5010, "one variant": 501},
    "mmk12": {"test": 2000},
    "geometry3k": {"test": 601},
    "mathvision": {"test": 3040, "testmini": 304},
    "we_math": {"testmini": 1740},
    # of Yijia-Xiao/LogicVista as well
    "logicvista": {"test": 448},
    # each of its three configurations
    "mmmu_pro": {"test": 1730},
}
_SHAREGPT = {
    # PAPO-Galaxy/PAPO_eval
    "hiyouga_geometry3k": 601,
    "AI4Math_MathVista": 1000,
    "We_Math": 1740,
    "We-Math_We-Math": 1740,
    "PAPO_MMK12": 2000,
    "AI4Math_MathVerse": 2180,
    "AI4Math_MathVerse_vision_dependent": 1308,
    "lscpku_LogicVista": 447,
    "BUAADreamer_clevr_count_70k": 200,
    "MMMU_MMMU_Pro": 1730,
    # chamber111/VPPO-Eval
    "DynaMath_DynaMath_Sample": 3666,
    "MathLLMs_MathVision": 2907,
}
"""By the name of the file, without its shard number and ending."""


def hub_id(source: BenchmarkSource, path: str) -> str | None:
    """Returns the data set on the hub that a file is a copy of; None for one's own.

    Args:
        path: the file's, whose name says whether it is of PAPO_eval or of VPPO-Eval.
    """
    if source == "sharegpt":
        return "chamber111/VPPO-Eval" if any(name in path for name in _OF_VPPO_EVAL) else "PAPO-Galaxy/PAPO_eval"
    return HUB_IDS.get(source)


def unlike_release(source: BenchmarkSource, path: str, rows: int) -> str | None:
    """Returns a warning if a copy has another number of rows than was released; None if not, or if it is not known.

    Args:
        path: that of the file or folder, whose name says which set of PAPO-Eval or VPPO-Eval it is.
    """
    if source == "sharegpt":
        name = Path(path.partition("@")[0]).stem.partition("-00")[0]
        known = {name: _SHAREGPT[name]} if name in _SHAREGPT else {}
    else:
        known = _NATIVE.get(source, {})
    if not known or rows in known.values():
        return None
    released = ", ".join(f"{count} ({name})" for name, count in known.items())
    return f"{path} has {rows} rows, and {released} were released; the copy is another version, or not whole"
