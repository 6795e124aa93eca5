"""Tokenised prompts of data set rows, by template and chat template, and the checks of every row.

A prompt's tokens are those that the model's processor of transformers gives for the same text and images, but no pixel
is read for them: the text is tokenised with one placeholder per image, which is then repeated by the image's grid.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from megatron_vppo.algorithm.types import ImageRef, Prompt
from megatron_vppo.config.choices import BadRows
from megatron_vppo.data.dataset import IMAGE_MARK, RowError, VisionDataset
from megatron_vppo.data.geometry import ImageGeometry
from megatron_vppo.data.row_cache import CheckedRows, Grids, RowCache, TokenIds, UsableRows
from megatron_vppo.data.row_workers import of_rows
from megatron_vppo.system.visible import visible

_ROWS_PER_CHUNK = 256
_MIN_ROWS_PER_WORKER = 4000  # a row takes 1-2 ms, and a process about 8 s to import transformers
_LISTED = 20

logger = logging.getLogger(__name__)


def read_template(path: str) -> str:
    """Reads a prompt template (Jinja, variable `content`), stripped as the authors do.

    Raises ValueError if the file is missing or not Jinja.
    """
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
        jinja2.Environment().parse(text)
    except (OSError, jinja2.TemplateSyntaxError) as error:
        raise ValueError(f"data.format_prompt={path}: {error}") from error
    return text


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    return jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False).from_string(template)


@dataclass(frozen=True)
class PromptBuilder:
    """The maker of token ids from a problem and the grids of its images. Picklable."""

    processor: Any
    """The model's processor of transformers: tokenizer, chat template, image token."""
    geometry: ImageGeometry
    template: str | None = None
    """Jinja source that receives `content` (the problem); None: the problem as it is."""
    system_prompt: str | None = None
    """None: that of the row, or else what the chat template puts there by itself."""

    def text(self, problem: str, *, system: str | None = None) -> str:
        """Returns the whole prompt as text, up to where the response starts; one placeholder per `<image>`.

        Args:
            system: the row's own system turn.

        Raises ValueError if that is another than the system prompt of all rows.
        """
        if None not in (system, self.system_prompt) and system != self.system_prompt:
            raise ValueError(
                f"its system turn {_beginning(system)} is not data.system_prompt {_beginning(self.system_prompt)}; set "
                "data.system_prompt=null, and each row keeps its own"
            )
        system = self.system_prompt if system is None else system
        content = problem if self.template is None else _compiled(self.template).render(content=problem)
        turns: list[dict[str, Any]] = []
        if system is not None:
            turns.append({"role": "system", "content": system})
        turns.append({"role": "user", "content": _content_list(content) if IMAGE_MARK in content else content})
        return self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)

    def compact_ids(self, problem: str, *, num_images: int, system: str | None = None) -> list[int]:
        """Returns token ids with one placeholder per image.

        Raises ValueError if marks and images do not match, or as `text`.
        """
        if (marks := problem.count(IMAGE_MARK)) != num_images:
            raise ValueError(f"the problem has {marks} {IMAGE_MARK!r} for {num_images} image(s)")
        token_ids = list(self.processor.tokenizer(self.text(problem, system=system))["input_ids"])
        if (placeholders := token_ids.count(self.processor.image_token_id)) != num_images:
            raise ValueError(
                f"{placeholders} image placeholders in the tokenised prompt for {num_images} image(s): the problem "
                f"spells {self.processor.image_token!r} out, or a template drops or repeats the content"
            )
        if (video_id := getattr(self.processor, "video_token_id", None)) is not None and video_id in token_ids:
            raise ValueError(f"the problem spells the video placeholder {self.processor.video_token!r} out")
        return token_ids

    def expand(self, compact_ids: Sequence[int], grids: Grids) -> tuple[int, ...]:
        """Repeats the i-th placeholder once per merged patch of the i-th image."""
        expanded: list[int] = []
        image = 0
        for token_id in compact_ids:
            if token_id == self.processor.image_token_id:
                expanded.extend([token_id] * self.geometry.tokens(grids[image]))
                image += 1
            else:
                expanded.append(token_id)
        return tuple(expanded)

    def num_tokens(self, compact_ids: TokenIds, grids: Grids) -> int:
        """Returns the length of what `expand` would return."""
        return len(compact_ids) + sum(self.geometry.tokens(grid) - 1 for grid in grids)


def _beginning(text: str | None) -> str:
    return repr(text if text is None or len(text) <= 40 else f"{text[:37]}...")


def _content_list(content: str) -> list[dict[str, str]]:
    parts: list[dict[str, str]] = []
    for i, text in enumerate(content.split(IMAGE_MARK)):
        if i > 0:
            parts.append({"type": "image"})
        if text:
            parts.append({"type": "text", "text": text})
    return parts


@dataclass(frozen=True, slots=True)
class PromptReport:
    """The counts of usable and unusable rows of a data set."""

    rows: int
    kept: int
    too_long: tuple[int, ...]
    """Rows over max_prompt_length."""
    bad_rows: tuple[RowError, ...]
    """Rows left out under on_bad_row=skip."""
    transparent: int
    """The number of rows whose transparent pixels the authors' resize shows as they are stored; 0 for any other."""

    def summary(self) -> str:
        """Formats the counts, and the first bad rows with their reasons."""
        lines = [f"{self.kept} of {self.rows} rows kept, {len(self.too_long)} too long, {len(self.bad_rows)} bad"]
        lines += [f"  bad row left out: {error}" for error in self.bad_rows[:_LISTED]]
        if len(self.bad_rows) > _LISTED:
            lines.append(f"  ... and {len(self.bad_rows) - _LISTED} more")
        if self.transparent:
            lines.append(
                f"  {self.transparent} rows have images with transparent pixels. algorithm.resize=easyr1 drops the "
                "transparency, as the authors' code does, and mostly shows black there; set algorithm.resize=smart to "
                "lay them over data.background"
            )
        return "\n".join(lines)


class PromptSet(Sequence[Prompt]):
    """The usable prompts of a data set, in row order.

    It holds compact token ids and grids in arrays; a Prompt is built when it is asked for.
    """

    def __init__(
        self,
        dataset: VisionDataset,
        builder: PromptBuilder,
        *,
        split: str,
        rows: UsableRows,
        report: PromptReport,
    ) -> None:
        self.dataset, self.report, self.split = dataset, report, split
        self._builder, self._usable = builder, rows

    def __len__(self) -> int:
        return len(self._usable)

    @property
    def rows(self) -> tuple[int, ...]:
        """The data set row of each prompt."""
        return tuple(self._usable.rows.tolist())

    def of_row(self, row: int) -> Prompt:
        """Returns the prompt of a row of the data set. Raises KeyError if there is none."""
        index = int(np.searchsorted(self._usable.rows, row))
        if index == len(self) or self._usable.rows[index] != row:
            raise KeyError(row)
        return self[index]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # IndexError and negative indices as for any sequence
        row, compact_ids, grids = (
            int(self._usable.rows[index]),
            self._usable.ids_of(index),
            self._usable.grids_of(index),
        )
        return Prompt(
            split=self.split,
            row=row,
            problem=self.dataset.problem(row),
            answer=self.dataset.answer(row),
            token_ids=self._builder.expand(compact_ids, grids),
            compact_token_ids=compact_ids,
            images=tuple(ImageRef(self.split, row, i) for i in range(len(grids))),
            grids_thw=grids,
        )


def load_prompts(
    dataset: VisionDataset,
    builder: PromptBuilder,
    *,
    split: str,
    max_prompt_length: int,
    max_images: int,
    on_bad_row: BadRows,
    num_workers: int,
    with_extras: bool = False,
    cache: RowCache | None = None,
) -> PromptSet:
    """Checks and tokenises every row. Prompts that are too long are left out, counted and reported.

    Args:
        max_images: a row with more is a bad one, since the rollout engine takes no more.
        on_bad_row: 'error' raises, 'skip' leaves the row out.
        num_workers: processes that share the work if there are enough rows; the result does not depend on it.
        with_extras: a row is a bad one, too, if a reward function could not get its extras.
        cache: where the outcome of an earlier check may be, and where that of this one goes.

    Raises:
        RowError: the first bad row, under on_bad_row='error'.
        ValueError: no prompt is left.
    """
    checked = None if cache is None else cache.load()
    if checked is None:
        checked = _check_all(
            dataset,
            builder,
            max_prompt_length=max_prompt_length,
            max_images=max_images,
            on_bad_row=on_bad_row,
            num_workers=num_workers,
            with_extras=with_extras,
        )
        if cache is not None:
            cache.save(checked)
    report = PromptReport(
        rows=len(dataset),
        kept=len(checked.usable),
        too_long=checked.too_long,
        bad_rows=checked.bad,
        transparent=checked.transparent,
    )
    if not len(checked.usable):
        raise ValueError(
            f"{dataset.source}: no usable prompt. {report.summary()}\n"
            f"If prompts are too long, raise data.max_prompt_length ({max_prompt_length} tokens) or lower "
            "data.max_pixels."
        )
    tell = logger.warning if report.too_long or report.bad_rows or report.transparent else logger.info
    tell("%s", visible(f"{dataset.source}: {report.summary()}"))
    return PromptSet(dataset, builder, split=split, rows=checked.usable, report=report)


def _check_all(
    dataset: VisionDataset,
    builder: PromptBuilder,
    *,
    max_prompt_length: int,
    max_images: int,
    on_bad_row: BadRows,
    num_workers: int,
    with_extras: bool,
) -> CheckedRows:
    """See `load_prompts`."""
    too_long: list[int] = []
    bad: list[RowError] = []
    transparent: list[int] = []
    workers = min(num_workers, len(dataset) // _MIN_ROWS_PER_WORKER)

    def usable_rows() -> Iterator[tuple[int, TokenIds, Grids]]:
        # No name holds the iterator: an error of a row then ends the workers at once, not when its traceback is let go.
        for row, outcome in enumerate(
            of_rows(
                _check_row,
                (dataset, builder, with_extras),
                rows=len(dataset),
                workers=workers,
                rows_per_chunk=_ROWS_PER_CHUNK,
            )
        ):
            if isinstance(outcome, _UsableRow) and (images := len(outcome.grids)) > max_images:
                outcome = dataset.error(row, f"{images} images; rollout.max_images_per_prompt is {max_images}")
            if isinstance(outcome, RowError):
                if on_bad_row == "error":
                    raise dataset.error(row, f"{outcome.reason}. Mend the row, or set data.on_bad_row=skip")
                bad.append(outcome)
            elif builder.num_tokens(outcome.compact_ids, outcome.grids) > max_prompt_length:
                too_long.append(row)
            else:
                if outcome.is_transparent:
                    transparent.append(row)
                yield row, outcome.compact_ids, outcome.grids

    usable = UsableRows.of(usable_rows())
    return CheckedRows(usable=usable, too_long=tuple(too_long), bad=tuple(bad), transparent=len(transparent))


@dataclass(frozen=True, slots=True)
class _UsableRow:
    """A row that passed all checks but the length of its prompt."""

    compact_ids: TokenIds
    grids: Grids
    is_transparent: bool
    """True if an image has transparent pixels and the resize drops transparency."""


Outcome = _UsableRow | RowError


def _check_row(dataset: VisionDataset, builder: PromptBuilder, with_extras: bool, row: int) -> Outcome:
    try:
        problem = dataset.problem(row)
        dataset.answer(row)
        if with_extras:
            dataset.extras(row).to_bytes()
        num_images = len(dataset.image_cells(row))
        compact_ids = builder.compact_ids(problem, num_images=num_images, system=dataset.system(row))
        grids = []
        for index in range(num_images):
            size = dataset.check_image(row, index)
            grids.append(builder.geometry.grid(*size))
        drops_transparency = builder.geometry.mode == "easyr1"
        return _UsableRow(
            np.asarray(compact_ids, dtype=np.int32),
            tuple(grids),
            is_transparent=drops_transparency and any(dataset.is_transparent(row, i) for i in range(num_images)),
        )
    except RowError as error:
        return error
    except ValueError as error:
        hint = "" if dataset.has_image_column else "; there is no column of images, see data.image_key"
        return dataset.error(row, f"{error}{hint}")
