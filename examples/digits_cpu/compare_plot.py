"""Held-out accuracy over training steps of the runs that compare.sh made: a plot and a table.

    python examples/digits_cpu/compare_plot.py runs/digits_compare

Writes accuracy.png and accuracy.md into that folder and prints the table. Lines are means over seeds, bands reach from
the lowest to the highest.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from megatron_vppo.observability.metrics import read_metrics

LABELS = {"config": "VPPO", "reference": "VPPO, reference", "dapo": "DAPO", "grpo": "GRPO"}


@dataclass(frozen=True)
class Curve:
    """One method; only the steps at which all of its seeds were validated."""

    seeds: tuple[int, ...]
    steps: tuple[int, ...]
    accuracies: tuple[tuple[float, ...], ...]
    """The accuracy of each seed, for each step."""


def read_curves(runs: Path) -> dict[str, Curve]:
    """Returns the curve of each method with at least one run, in the order of LABELS.

    Raises:
        ValueError: the folder holds no run with validations.
    """
    found: dict[str, dict[int, dict[int, float]]] = defaultdict(dict)
    for folder in runs.iterdir():
        match = re.fullmatch(r"(\w+)-seed(\d+)", folder.name)
        if match and match[1] in LABELS:
            lines = read_metrics(folder)
            accuracy = {int(line["step"]): line["val/accuracy"] for line in lines if "val/accuracy" in line}
            if accuracy:
                found[match[1]][int(match[2])] = accuracy
    if not found:
        raise ValueError(f"no run with validations in {runs}; its folders should be named like dapo-seed1")
    curves = {}
    for name in LABELS:
        if name not in found:
            continue
        seeds = tuple(sorted(found[name]))
        by_seed = [found[name][seed] for seed in seeds]
        steps = tuple(sorted(set.intersection(*(set(a) for a in by_seed))))
        curves[name] = Curve(seeds, steps, tuple(tuple(a[step] for a in by_seed) for step in steps))
    return curves


def table(curves: dict[str, Curve]) -> str:
    """Writes Markdown: accuracy before and after, mean (lowest .. highest), and the mean over a run's validations."""
    lines = ["| method | seeds | steps | before | after | mean over the run |", "|---|---|---|---|---|---|"]
    for name, curve in curves.items():
        first, last = curve.accuracies[0], curve.accuracies[-1]
        whole = [mean(values) for values in zip(*curve.accuracies, strict=True)]
        cells = [f"{mean(v):.3f} ({min(v):.3f} .. {max(v):.3f})" for v in (first, last, whole)]
        lines.append(f"| {LABELS[name]} | {len(curve.seeds)} | {curve.steps[-1]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(curves: dict[str, Curve], path: Path) -> None:
    try:
        import matplotlib
    except ImportError as missing:
        raise SystemExit("the picture needs matplotlib: pip install matplotlib") from missing
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for name, curve in curves.items():
        (line,) = axes.plot(curve.steps, [mean(v) for v in curve.accuracies], marker="o", ms=3, label=LABELS[name])
        low, high = [min(v) for v in curve.accuracies], [max(v) for v in curve.accuracies]
        axes.fill_between(curve.steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="training step", ylabel="held-out accuracy", title="Sum of two handwritten digits")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder with runs named METHOD-seedN")
    options = parser.parse_args()
    curves = read_curves(options.runs)
    text = table(curves)
    (options.runs / "accuracy.md").write_text(text)
    print(text, end="")
    draw(curves, options.runs / "accuracy.png")
    print(options.runs / "accuracy.png")


if __name__ == "__main__":
    main()
