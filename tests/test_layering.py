"""The borders between the rooms, read from the sources with `ast`. Standard library only, so that it runs anywhere.

    cli
    trainer  fidelity  sweep  evaluation                   wings: none imports another, but launching planning
                         launching  ->  planning
                         |              conversion  importing
    setup                |                                 from settings to parts
    models <- parallel        data <- rollout              Megatron's tower and vLLM's, which never meet below `setup`
    algorithm   weights   config   observability   system  ground floor: imports at most `system`
    config.choices                                         the one module that every room may import; imports nothing

What each room may import is in ROOMS; docs/architecture.md has the same drawing. Imports inside functions and under
TYPE_CHECKING count like any other: a border is a border.

Also a program: `python tests/test_layering.py` prints the violations and exits with 1 if there are any.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "megatron_vppo"
ROOT = Path(__file__).resolve().parents[1]

# Outside packages with a border of their own; whatever is not here may be imported by every room but `algorithm`.
GUARDED = {"megatron", "vllm", "transformers", "datasets", "PIL", "transformer_engine"}


@dataclass(frozen=True)
class Room:
    """The imports that a folder of the package may have besides the standard library."""

    ours: frozenset[str]
    """Other folders of the package."""
    guarded: frozenset[str]
    """Members of GUARDED."""


def room(ours: str = "", guarded: str = "") -> Room:
    return Room(frozenset(ours.split()), frozenset(guarded.split()))


GROUND = "algorithm weights config observability system"
ENGINES = "data models parallel rollout"

ROOMS = {
    # Ground floor: formulas, tensor names and files, settings, what a person sees, the operating system.
    "algorithm": room(),
    "weights": room("system", "megatron"),
    "config": room(),
    "observability": room("system", "PIL"),
    "system": room(),
    # Rows, images, rewards.
    "data": room("algorithm system", "datasets PIL transformers"),
    # Megatron's tower.
    "models": room("weights", "megatron transformer_engine transformers"),
    "parallel": room("algorithm models weights system", "megatron"),
    # vLLM's tower.
    "rollout": room("algorithm data system", "vllm PIL"),
    # From settings to parts.
    "setup": room(f"{GROUND} {ENGINES}", "megatron transformers"),
    # Wings: each belongs to one command, none imports another.
    "trainer": room(f"{GROUND} {ENGINES} setup", "megatron transformers PIL"),
    "fidelity": room(f"{GROUND} {ENGINES} setup", "megatron transformers"),
    "planning": room("models weights", "transformers"),
    # Engines without a trainer; benchmarks from local copies.
    "evaluation": room("algorithm config data models rollout observability system setup", "datasets PIL transformers"),
    # From settings to a job of a cluster.
    "launching": room(f"{GROUND} {ENGINES} setup planning", "megatron transformers"),
    # Settings of others into ours.
    "importing": room("config"),
    # Runs are other processes, so it needs no engine.
    "sweep": room("config observability system setup"),
    # Of `parallel` only the layout of one rank; engines for the log-probs.
    "conversion": room("models weights parallel rollout observability system", "megatron transformers PIL"),
    "cli": room(f"{GROUND} {ENGINES} setup trainer fidelity sweep evaluation planning launching conversion importing"),
}
ALGORITHM_OUTSIDE = {"torch"}
# "The only place that builds process groups or calls a schedule" is parallel/.
SCHEDULES = "megatron.core.pipeline_parallel"
# The choices that settings have. Every room may import them, and they import nothing but `typing`.
CHOICES = f"{PACKAGE}.config.choices"


@dataclass(frozen=True)
class Import:
    line: int
    module: str
    """Absolute dotted name; for `from a import b` it is `a.b`, because b may be a module."""


def imports_of(source: str, module: str) -> Iterator[Import]:
    """Every import in the source of `module` (a dotted name; a package's __init__ as `package.__init__`)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")[: -node.level] if node.level else []
            stem = ".".join([*parts, *([node.module] if node.module else [])])
            yield from (Import(node.lineno, f"{stem}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name, argument = ast.unparse(node.func), node.args[0].value
            if name in {"importlib.import_module", "import_module", "__import__"} and isinstance(argument, str):
                yield Import(node.lineno, argument)


def violation(home: str, module: str) -> str | None:
    """Returns the reason why the folder `home` of the package may not import `module`; None if it may."""
    top, _, rest = module.partition(".")
    rules = ROOMS[home]
    if f"{module}.".startswith(f"{CHOICES}."):
        return None
    if top == PACKAGE:
        target = rest.partition(".")[0]
        if target == home or target in rules.ours or target in {"", "__version__"}:
            return None
        if target not in ROOMS:
            return f"{module} lies in no room"
        return f"{home} may not import {PACKAGE}.{target}"
    if top in sys.stdlib_module_names:
        return None
    if home == "algorithm":
        return None if top in ALGORITHM_OUTSIDE else f"algorithm imports torch and the standard library, not {top}"
    if top in GUARDED and top not in rules.guarded:
        return f"{home} may not import {top}"
    if f"{module}.".startswith(f"{SCHEDULES}.") and home != "parallel":
        return f"{home} may not call schedules; only parallel does"
    return None


def violations_in(source: str, module: str) -> list[str]:
    home = module.split(".")[1]
    if home not in ROOMS:
        return [f"{module}: lies in no room; add its folder to ROOMS or move it into one"]
    found = []
    for imported in imports_of(source, module):
        reason = violation(home, imported.module)
        if module == CHOICES and imported.module.partition(".")[0] not in {"__future__", "typing"}:
            reason = f"config.choices imports typing alone, not {imported.module}"
        if reason:
            found.append(f"{module}, line {imported.line}: {reason}")
    return found


def modules() -> Iterator[tuple[str, str]]:
    """(dotted name, source) of every file of the package but its top __init__."""
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts != (PACKAGE, "__init__"):
            yield ".".join(parts), path.read_text(encoding="utf-8")


def all_violations() -> list[str]:
    return [found for module, source in modules() for found in violations_in(source, module)]


# --- The package as it is ---------------------------------------------------------------------------------------------


def test_every_module_keeps_the_borders() -> None:
    assert all_violations() == []


def test_the_whole_package_was_read() -> None:
    homes = {module.split(".")[1] for module, _ in modules()}
    assert homes == set(ROOMS)


def circle_in(arrows: dict[str, set[str]]) -> list[str]:
    """The first circle found, as the modules along it; empty if there is none."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(arrows.get(module, ())):
            if found := walk(target, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(arrows) if (found := walk(module, []))), [])


def arrows_of(sources: dict[str, str]) -> dict[str, set[str]]:
    """Lists the package's modules that each module imports; a name imported from a module counts as that module."""
    arrows: dict[str, set[str]] = {module: set() for module in sources}
    for module, source in sources.items():
        for imported in imports_of(source, module):
            for target in (imported.module, imported.module.rpartition(".")[0]):
                if target in sources:
                    arrows[module].add(target)
                    break
    return arrows


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circle_in(arrows_of(dict(modules()))) == []


def test_a_planted_circle_is_found() -> None:
    sources = {
        "megatron_vppo.a": "from megatron_vppo.b import x",
        "megatron_vppo.b": "def f():\n    from megatron_vppo import c",
        "megatron_vppo.c": "import megatron_vppo.a",
    }
    assert circle_in(arrows_of(sources)) == ["megatron_vppo.a", "megatron_vppo.b", "megatron_vppo.c", "megatron_vppo.a"]


def documented_rooms(text: str) -> dict[str, Room]:
    """The rooms by the table of docs/architecture.md: | `room/` | subject | rooms | guarded packages |."""
    groups = {"nothing": "", "ground floor": GROUND, "engines": ENGINES, "everything": " ".join({*ROOMS} - {"cli"})}
    rooms = {}
    for name, ours, guarded in re.findall(r"^\| `(\w+)/` \|[^|]*\|([^|]*)\|([^|]*)\|$", text, flags=re.MULTILINE):
        cells = [cell.strip() for cell in ours.split(",")]
        rooms[name] = room(" ".join(groups.get(cell, cell) for cell in cells), guarded.replace(",", " "))
    return rooms


def test_the_documented_table_says_the_same() -> None:
    assert documented_rooms((ROOT / "docs/architecture.md").read_text(encoding="utf-8")) == ROOMS


# --- Planted violations: the check has to see each of them ------------------------------------------------------------

PLANTED = [
    ("algorithm.vppo", "import numpy"),
    ("algorithm.vppo", "import megatron.core"),
    ("algorithm.vppo", "from megatron_vppo.config.schema import RunConfig"),
    ("algorithm.vppo", "from ..data import images"),
    ("algorithm.vppo", "def f():\n    from transformers import AutoModel"),
    ("algorithm.vppo", "from megatron_vppo.config.choices_of_mine import Recompute"),
    ("weights.stream", "from megatron_vppo.models.qwen_vl import QwenVLModel"),
    ("weights.stream", "from megatron_vppo.parallel.offload import TrainerMemory"),
    ("data.images", "from megatron_vppo.models.families import family_of"),
    ("data.images", "from megatron_vppo.config import schema"),
    ("data.images", "import vllm"),
    ("data.images", "import megatron.core.parallel_state as mpu"),
    ("models.qwen25_vl.vision", "from megatron_vppo.parallel import layout"),
    ("models.qwen25_vl.vision", "from ...parallel.layout import Layout"),
    ("models.qwen25_vl.vision", "from megatron_vppo.data.geometry import ImageGeometry"),
    ("models.qwen25_vl.vision", "import vllm"),
    ("models.qwen25_vl.vision", "from megatron.core.pipeline_parallel.schedules import get_forward_backward_func"),
    ("parallel.policy", "import vllm"),
    ("parallel.policy", "from megatron_vppo import rollout"),
    ("parallel.policy", "from megatron_vppo.data.images import VisionInputs"),
    ("parallel.policy", "from megatron_vppo.observability.metrics import RunLog"),
    ("parallel.policy", "from megatron_vppo.trainer.loop import train"),
    ("rollout.engine", "from megatron.core import parallel_state"),
    ("rollout.engine", "from megatron_vppo.weights.stream import stream"),
    ("rollout.engine", "from megatron_vppo.models import families"),
    ("rollout.engine", "import importlib\nimportlib.import_module('megatron.core')"),
    ("rollout.engine", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import megatron"),
    ("setup.engines", "from megatron_vppo.trainer.loop import train"),
    ("trainer.loop", "from megatron_vppo.cli.main import main"),
    ("trainer.loop", "import vllm"),
    ("trainer.loop", "from megatron_vppo.fidelity import measure"),
    ("fidelity.measure", "from megatron_vppo.trainer.loop import Run"),
    ("sweep.execute", "from megatron_vppo.launching.sbatch import BatchJob"),
    ("planning.layouts", "from megatron_vppo.config.schema import RunConfig"),
    ("planning.layouts", "from megatron_vppo.setup import engines"),
    ("planning.candidate", "from megatron_vppo.parallel.offload import TrainerMemory"),
    ("conversion.verify", "from megatron_vppo.planning.sizes import language_sizes"),
    ("evaluation.suite", "from megatron_vppo.trainer.grader import Grader"),
    ("evaluation.suite", "from megatron_vppo.sweep.results import VariantResults"),
    ("evaluation.suite", "import megatron.core"),
    ("launching.dry_run", "from megatron_vppo.trainer.placement import Placement"),
    ("planning.layouts", "from megatron_vppo.launching.dry_run import DryRun"),
    ("conversion.verify", "from megatron_vppo.config.schema import RunConfig"),
    ("importing.sources", "from megatron_vppo.setup.preflight import check_run"),
    ("cli.main", "from vllm import LLM"),
    ("config.choices", "from megatron_vppo.config.schema import RunConfig"),
    ("config.choices", "import pydantic"),
    ("config.load", "from megatron_vppo.algorithm import types"),
    ("config.load", "from megatron_vppo.observability import metrics"),
    ("observability.metrics", "from megatron_vppo.config import schema"),
    ("observability.metrics", "import megatron_vppo.algorithm.types"),
    ("system.whole", "from megatron_vppo.observability.json_lines import read_lines"),
    ("helpers.misc", "import os"),
]


def test_planted_violations_are_caught() -> None:
    missed = [(module, text) for module, text in PLANTED if not violations_in(text, f"{PACKAGE}.{module}")]
    assert missed == []


LEGAL = [
    ("algorithm.vppo", "import math\nimport torch\nfrom megatron_vppo.algorithm.types import Response"),
    ("algorithm.vppo", "from . import types\nfrom .types import Response"),
    ("algorithm.vppo", "from megatron_vppo.config.choices import NegativeAdvantages"),
    ("rollout.seeds", "from megatron_vppo.config import choices"),
    ("config.choices", "from __future__ import annotations\nfrom typing import Literal"),
    ("data.images", "from PIL import Image\nfrom ..algorithm.types import ImageRef"),
    (
        "models.qwen25_vl.vision",
        "from . import weight_map\nfrom ..layers.packed import PackedBatch\nimport megatron.core",
    ),
    ("models.qwen25_vl.__init__", "from . import weight_map\nfrom .vision import VisionTower"),
    ("parallel.policy", "from megatron.core.pipeline_parallel.schedules import get_forward_backward_func"),
    ("rollout.engine", "import vllm\nfrom megatron_vppo.algorithm.types import Sampler"),
    ("setup.policy", "from megatron_vppo.config.schema import RunConfig\nfrom megatron_vppo.parallel import policy"),
    ("trainer.loop", "from megatron_vppo.parallel import policy\nfrom megatron_vppo.rollout import engine"),
    ("cli.main", "from megatron_vppo.trainer import loop\nfrom megatron_vppo.config.load import load_config"),
    ("config.load", "import yaml\nimport pydantic\nfrom megatron_vppo.config.schema import RunConfig"),
]


def test_legal_imports_pass() -> None:
    assert [violations_in(text, f"{PACKAGE}.{module}") for module, text in LEGAL] == [[]] * len(LEGAL)


if __name__ == "__main__":
    problems = all_violations()
    print("\n".join(problems) or "the borders between the rooms hold")
    sys.exit(bool(problems))
