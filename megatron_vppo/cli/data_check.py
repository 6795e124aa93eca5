"""`vppo data check`: what a data set holds, and what it has in common with another, as text, JSON and a page."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from megatron_vppo.cli.arguments import positive
from megatron_vppo.cli.launch import quieten_libraries
from megatron_vppo.cli.output import say
from megatron_vppo.config.choices import ImagePlace
from megatron_vppo.config.schema import DataConfig, PromptConfig, RunConfig

SHOWN = 10
"""Rows of a kind that the text lists. JSON and the page have all."""
_OF_PATH = ("prompt_key", "answer_key", "image_key", "image_place", "image_dir")
"""The options that say how a PATH is read, with the names of their settings."""


def add_data_check_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options. Columns are named as in the settings data.prompt_key, answer_key and image_key."""
    parser.add_argument(
        "source", metavar="PATH", nargs="?", help="as data.train_files: a file, folder or hub id, @split behind"
    )
    parser.add_argument("--against", metavar="OTHER", help="another set, whose rows are looked for in this one")
    parser.add_argument(
        "--config", metavar="FILE", help="the file of a run in place of PATH: all of its data files, each with its own "
        "settings, and the rows that training and validation share",
    )  # fmt: skip
    for key in ("prompt_key", "answer_key", "image_key"):
        option = f"--{key.replace('_', '-')}"
        parser.add_argument(option, metavar="COLUMN", help=f"as data.{key} (default: {_default(key)})")
    parser.add_argument(
        "--image-place", choices=get_args(ImagePlace),
        help=f"as data.image_place: where images are in a problem without <image> (default: {_default('image_place')})",
    )  # fmt: skip
    parser.add_argument("--image-dir", metavar="FOLDER", help="as data.image_dir: where relative image paths begin")
    parser.add_argument("--model", metavar="MODEL", help="folder or hub id of a model: count the tokens of its prompts")
    parser.add_argument("--format-prompt", metavar="FILE", help="as data.format_prompt, for --model")
    parser.add_argument("--workers", type=positive, default=os.cpu_count() or 1, metavar="N", help="processes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write everything as a page")


def _default(key: str) -> Any:
    return DataConfig.model_fields[key].default


def run_data_check(options: argparse.Namespace) -> int:
    """Surveys data sets, and says what is wrong. Returns 1 if a row is broken, or if two sets have it.

    Raises ValueError for a set or a column that is not there, and for a source that is named twice or not at all.
    """
    from megatron_vppo.config.load import load_config
    from megatron_vppo.data.survey import survey
    from megatron_vppo.observability.survey_page import write_survey_page
    from megatron_vppo.system.whole import whole_file

    if (options.source is None) == (options.config is None):
        raise ValueError("vppo data check takes a PATH, or the file of a run by --config")
    unused = [
        name
        for name in (*_OF_PATH, "against", "format_prompt")
        if options.config and getattr(options, name) is not None
    ]
    if unused:
        words = " and ".join(f"--{name.replace('_', '-')}" for name in unused)
        raise ValueError(f"vppo data check --config takes no {words}: the file of the run says what is read")
    run = None if options.config is None else load_config(options.config)
    data = PromptConfig(format_prompt=options.format_prompt) if run is None else run.data
    builder = None if options.model is None else _builder(options.model, data)
    opened, pairs = _opened(options) if run is None else _opened_of_run(run)
    surveys = [survey(dataset, workers=options.workers, builder=builder) for dataset in opened]
    report: dict[str, Any] = {
        "sets": [_facts(one) for one in surveys],
        "shared": [_shared(surveys[one], surveys[other]) for one, other in pairs],
    }
    if options.json is not None:
        with whole_file(options.json) as file:
            file.write(json.dumps(report, indent=1).encode())
    if options.html is not None:
        write_survey_page(report, options.html)
    say("\n".join(_lines(report)))
    return int(any(one["broken"] for one in report["sets"]) or any(found["same"] for found in report["shared"]))


Pairs = list[tuple[int, int]]
"""The sets that are compared, by their numbers."""


def _opened(options: argparse.Namespace) -> tuple[list[Any], Pairs]:
    """Opens the sets that the command names."""
    from megatron_vppo.data.dataset import open_dataset

    sources = [source for source in (options.source, options.against) if source is not None]
    given = {name: getattr(options, name) for name in _OF_PATH}
    read_by = {name: _default(name) if value is None else value for name, value in given.items()}
    problem_key = read_by.pop("prompt_key")
    opened = [open_dataset(source, problem_key=problem_key, **read_by) for source in sources]
    return opened, [(0, 1)] if len(opened) == 2 else []


def _opened_of_run(run: RunConfig) -> tuple[list[Any], Pairs]:
    """Opens the data files of a run: each for training is compared with those after it, and with all held-out ones."""
    from megatron_vppo.setup.inputs import open_datasets

    opened = open_datasets(run)
    names = list(opened)
    train = [number for number, name in enumerate(names) if name.partition("/")[0] == "train"]
    return list(opened.values()), [(one, other) for one in train for other in range(one + 1, len(names))]


def _shared(one: Any, other: Any) -> dict[str, Any]:
    """Returns what two Surveys have in common, as JSON holds it."""
    from megatron_vppo.data.survey import shared

    found = shared(one, other)
    kinds = {kind: list(map(list, getattr(found, kind))) for kind in ("same", "images", "question")}
    return {"one": one.source, "other": other.source, **kinds}


def _facts(one: Any) -> dict[str, Any]:
    """Returns a Survey as JSON holds it."""
    from megatron_vppo.data.survey import quantiles

    sizes = [size for row in one.usable for size in row.sizes]
    return {
        "source": one.source,
        "rows": one.rows,
        "usable": len(one.usable),
        "broken": [str(error) for error in one.broken],
        "repeated": one.repeated,
        "images_per_row": {str(count): rows for count, rows in sorted(one.images_per_row.items())},
        "width": quantiles([width for width, _ in sizes]),
        "height": quantiles([height for _, height in sizes]),
        "prompt_tokens": quantiles([row.tokens for row in one.usable if row.tokens is not None]),
    }


def _builder(model: str, data: PromptConfig) -> Any:
    """Returns the maker of a model's prompts."""
    quieten_libraries()
    from megatron_vppo.data.geometry import ImageGeometry
    from megatron_vppo.data.prompts import PromptBuilder, read_template
    from megatron_vppo.models.model_files import open_without_weights
    from megatron_vppo.setup.model_folder import model_folder

    processor = open_without_weights(model_folder(model)).processor
    geometry = ImageGeometry.from_processor(
        processor.image_processor, min_pixels=data.min_pixels, max_pixels=data.max_pixels, mode="smart"
    )
    template = None if data.format_prompt is None else read_template(data.format_prompt)
    return PromptBuilder(processor, geometry, template=template, system_prompt=data.system_prompt)


# --- Text -------------------------------------------------------------------------------------------------------------


def _lines(report: Mapping[str, Any]) -> Iterator[str]:
    for one in report["sets"]:
        yield f"{one['source']}: {one['usable']} of {one['rows']} rows usable"
        images = ", ".join(f"{rows} rows with {count}" for count, rows in one["images_per_row"].items())
        yield f"  images: {images or 'none'}"
        for name in ("width", "height", "prompt_tokens"):
            if one[name]:
                values = ", ".join(f"{where} {value}" for where, value in one[name].items())
                yield f"  {name.replace('_', ' ')}: {values}"
        yield from _listed("broken", one["broken"])
        yield from _listed("the same rows", [", ".join(map(str, rows)) for rows in one["repeated"]])
    for found in report["shared"]:
        yield f"{found['one']} and {found['other']}:"
        yield from _listed("the same question about the same images", [f"row {a} is row {b}" for a, b in found["same"]])
        yield f"  the same images, another question: {len(found['images'])}"
        yield f"  the same question, other images: {len(found['question'])}"


def _listed(title: str, lines: list[str]) -> Iterator[str]:
    yield f"  {title}: {len(lines)}"
    yield from (f"    {line}" for line in lines[:SHOWN])
    if len(lines) > SHOWN:
        yield f"    ... and {len(lines) - SHOWN} more"
