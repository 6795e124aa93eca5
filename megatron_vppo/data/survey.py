"""A survey of a data set before anything is trained on it: broken rows, image sizes, repeated rows, and those that two
sets have in common.

Rows are compared by content. A question counts without its image marks, capitals and runs of spaces; an image by its
pixels, so that a PNG and a lossless WebP of it are the same, and a JPEG is another.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_vppo.data.dataset import IMAGE_MARK, RowError, VisionDataset
from megatron_vppo.data.prompts import PromptBuilder
from megatron_vppo.data.row_workers import of_rows

_ROWS_PER_CHUNK = 64
_LEAST_ROWS_PER_WORKER = 500
"""A worker takes some seconds to start, and a row some hundredths of one."""


@dataclass(frozen=True, slots=True)
class RowPrint:
    """The content of one row, by which it is compared."""

    row: int
    question: bytes
    """A hash of the text."""
    images: tuple[bytes, ...]
    """A hash of the pixels of each image."""
    sizes: tuple[tuple[int, int], ...]
    """Width and height of each image in pixels."""
    tokens: int | None
    """The length of the prompt with its image tokens; None if no model is given."""


@dataclass(frozen=True, slots=True)
class Survey:
    """The usable rows of a data set, and the others with their reasons."""

    source: str
    rows: int
    usable: tuple[RowPrint, ...]
    broken: tuple[RowError, ...]

    @property
    def repeated(self) -> list[list[int]]:
        """The rows that ask the same about the same images, in lists of two or more."""
        return [rows for rows in _grouped(self.usable).values() if len(rows) > 1]

    @property
    def images_per_row(self) -> Counter[int]:
        """Counts rows by their number of images."""
        return Counter(len(one.images) for one in self.usable)


@dataclass(frozen=True, slots=True)
class Shared:
    """The rows of one set whose content another set has, with a row of the other for each."""

    same: tuple[tuple[int, int], ...]
    """The same question about the same images."""
    images: tuple[tuple[int, int], ...]
    """The same images, of which there is at least one, and another question."""
    question: tuple[tuple[int, int], ...]
    """The same question about other images."""


def survey(dataset: VisionDataset, *, workers: int, builder: PromptBuilder | None = None) -> Survey:
    """Reads every row and decodes every image.

    Args:
        builder: makes the prompts whose tokens are counted; None: none are.
        workers: processes that share the work if there are enough rows; the result does not depend on it.
    """
    usable: list[RowPrint] = []
    broken: list[RowError] = []
    workers = min(workers, len(dataset) // _LEAST_ROWS_PER_WORKER)
    for outcome in of_rows(
        _read_row, (dataset, builder), rows=len(dataset), workers=workers, rows_per_chunk=_ROWS_PER_CHUNK
    ):
        if isinstance(outcome, RowError):
            broken.append(outcome)
        else:
            usable.append(outcome)
    return Survey(dataset.source, len(dataset), tuple(usable), tuple(broken))


def shared(one: Survey, other: Survey) -> Shared:
    """Finds the rows of the first set whose content the other has."""
    whole = {(row.question, row.images): row.row for row in reversed(other.usable)}
    by_images = {row.images: row.row for row in reversed(other.usable) if row.images}
    by_question = {row.question: row.row for row in reversed(other.usable)}
    same, images, question = [], [], []
    for row in one.usable:
        if (found := whole.get((row.question, row.images))) is not None:
            same.append((row.row, found))
        elif (found := by_images.get(row.images)) is not None:
            images.append((row.row, found))
        elif (found := by_question.get(row.question)) is not None:
            question.append((row.row, found))
    return Shared(tuple(same), tuple(images), tuple(question))


def quantiles(values: Sequence[int]) -> dict[str, int]:
    """Returns least, tenth, half, nine tenths and most of some numbers; {} of none."""
    if not values:
        return {}
    ordered = sorted(values)
    places = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1.0}
    return {name: ordered[round(share * (len(ordered) - 1))] for name, share in places.items()}


def _grouped(rows: Sequence[RowPrint]) -> dict[tuple[bytes, tuple[bytes, ...]], list[int]]:
    groups: dict[tuple[bytes, tuple[bytes, ...]], list[int]] = {}
    for row in rows:
        groups.setdefault((row.question, row.images), []).append(row.row)
    return groups


# --- Reading ----------------------------------------------------------------------------------------------------------


def _read_row(dataset: VisionDataset, builder: PromptBuilder | None, row: int) -> RowPrint | RowError:
    try:
        problem = dataset.problem(row)
        dataset.answer(row)
        images = [dataset.image(row, index).convert("RGB") for index in range(len(dataset.image_cells(row)))]
        if (marks := problem.count(IMAGE_MARK)) != len(images):
            return dataset.error(row, f"the problem has {marks} {IMAGE_MARK!r} for {len(images)} image(s)")
        sizes = tuple(image.size for image in images)
        tokens = None if builder is None else _prompt_tokens(builder, problem, sizes, system=dataset.system(row))
    except RowError as error:
        return error
    except ValueError as error:  # of the tokenizer and of the resize
        return dataset.error(row, str(error))
    question = " ".join(problem.replace(IMAGE_MARK, " ").casefold().split())
    return RowPrint(
        row=row,
        question=_hash(question.encode()),
        images=tuple(_hash(f"{image.size}".encode() + image.tobytes()) for image in images),
        sizes=sizes,
        tokens=tokens,
    )


def _prompt_tokens(
    builder: PromptBuilder, problem: str, sizes: Sequence[tuple[int, int]], *, system: str | None
) -> int:
    compact = np.asarray(builder.compact_ids(problem, num_images=len(sizes), system=system), dtype=np.int32)
    return builder.num_tokens(compact, tuple(builder.geometry.grid(*size) for size in sizes))


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
