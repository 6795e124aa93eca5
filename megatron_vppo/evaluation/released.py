"""The numbers of rows that the benchmarks were released with: another number is a copy with rows missing or doubled."""

from __future__ import annotations

from pathlib import Path

from megatron_vppo.config.choices import BenchmarkSource

_NATIVE: dict[BenchmarkSource, dict[str, int]] = {
    # AI4Math/MathVerse; testmini without 'Text Only' is what some copies call testmini
    "mathverse": {"testmini": 3940, "text only": 788, "testmini and text only": 4728},
    # DynaMath/DynaMath_Sample: 501 questions in ten variants
    "dynamath": {"ten variants": 5010, "one variant": 501},
    # FanqingM/MMK12
    "mmk12": {"test": 2000},
    # hiyouga/geometry3k
    "geometry3k": {"test": 601},
    # MathLLMs/MathVision
    "mathvision": {"test": 3040, "testmini": 304},
    # We-Math/We-Math
    "we_math": {"testmini": 1740},
    # lscpku/LogicVista and Yijia-Xiao/LogicVista
    "logicvista": {"test": 448},
    # MMMU/MMMU_Pro, each of its three configurations
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
