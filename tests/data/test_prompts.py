"""Prompts against the model's processor, checks of rows, and the order of training."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_vppo.algorithm.types import ImageRef
from megatron_vppo.data.dataset import RowError, VisionDataset
from megatron_vppo.data.geometry import ImageGeometry
from megatron_vppo.data.prompts import PromptBuilder, load_prompts, read_template
from tests.data.images import noise_image
from tests.data.rows import open_rows

MIN_PIXELS, MAX_PIXELS = 4 * 784, 40 * 784

LIMITS = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}

THINK = (
    "\n\nYou first think through the reasoning process as an internal monologue, enclosed within <think> </think> "
    "tags. Then, provide your final answer enclosed within \\boxed{}."
)

ROWS = [
    {"problem": "  <image>How many dots?  ", "answer": "3", "images": ["a.png"]},
    {
        "problem": "Compare <image> and <image>, then <image>.",
        "answer": "left",
        "images": ["b.png", "c.jpg", "turned.jpg"],
    },
    {"problem": "What is {{2+2}}? \u00e9\u4e2d", "answer": "4", "images": []},
]

READING = {"max_prompt_length": 4096, "max_images": 8, "on_bad_row": "error", "num_workers": 0}


def write(folder: Path, rows: list[dict]) -> VisionDataset:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_rows(str(folder / "rows.jsonl"))


def builder(processor, **options) -> PromptBuilder:
    geometry = ImageGeometry.from_processor(
        processor.image_processor, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS, mode="smart"
    )
    return PromptBuilder(processor, geometry, **options)


def load(folder: Path, processor, rows: list[dict], **options):
    options = {**READING, "split": "train", **options}
    return load_prompts(write(folder, rows), builder(processor), **options)


@pytest.mark.parametrize("name, ending", [("math_format_perception", THINK), (None, "")])
@pytest.mark.parametrize("system_prompt", [None, "Be brief."])
def test_token_ids_equal_the_processors(processor, image_folder, repo_root, name, ending, system_prompt) -> None:
    dataset = write(image_folder, ROWS)
    path = None if name is None else str(repo_root / f"examples/format_prompt/{name}.jinja")
    template = None if path is None else read_template(path)
    build = builder(processor, template=template, system_prompt=system_prompt)
    prompts = load_prompts(dataset, build, split="val", **READING)
    for row, prompt in enumerate(prompts):
        problem = ROWS[row]["problem"]
        body = (problem.strip() if name else problem) + ending
        body = body.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
        system = system_prompt or "You are a helpful assistant."
        text = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{body}<|im_end|>\n<|im_start|>assistant\n"
        images = [dataset.image(row, i).convert("RGB") for i in range(len(ROWS[row]["images"]))]
        expected = processor(text=[text], images=images or None, size=LIMITS)
        assert list(prompt.token_ids) == list(expected["input_ids"][0])
        assert list(prompt.compact_token_ids) == processor.tokenizer(text)["input_ids"]
        grids = expected["image_grid_thw"] if images else []
        assert prompt.grids_thw == tuple(tuple(int(v) for v in grid) for grid in grids)
        assert prompt.images == tuple(ImageRef("val", row, i) for i in range(len(images)))
        assert (prompt.split, prompt.row, prompt.problem) == ("val", row, problem)
    assert [prompt.answer for prompt in prompts] == ["3", "left", "4"]
    assert prompts[-1] == prompts[2] and prompts[:2] == [prompts[0], prompts[1]]


def test_too_long_prompts_are_left_out_and_counted(processor, image_folder, caplog) -> None:
    everything = load(image_folder, processor, ROWS)
    lengths = [len(prompt.token_ids) for prompt in everything]
    assert lengths[0] < lengths[1]
    kept = load(image_folder, processor, ROWS, max_prompt_length=lengths[1] - 1)
    assert kept.rows == (0, 2) and kept.report.too_long == (1,)
    assert kept[1] == everything[2] == kept.of_row(2)
    for row in (1, 3):
        with pytest.raises(KeyError):
            kept.of_row(row)
    assert "2 of 3 rows kept, 1 too long, 0 bad" in caplog.text
    assert load(image_folder, processor, ROWS, max_prompt_length=lengths[1]).rows == (0, 1, 2)
    with pytest.raises(ValueError, match=r"no usable prompt.*3 too long[\s\S]*data\.max_prompt_length \(5 tokens\)"):
        load(image_folder, processor, ROWS, max_prompt_length=5)


def test_a_row_with_more_images_than_the_engine_takes_is_a_bad_one(processor, image_folder) -> None:
    with pytest.raises(RowError, match=r"row 1: 3 images; rollout\.max_images_per_prompt is 2"):
        load(image_folder, processor, ROWS, max_images=2)
    kept = load(image_folder, processor, ROWS, max_images=2, on_bad_row="skip")
    assert kept.rows == (0, 2) and [error.row for error in kept.report.bad_rows] == [1]


BAD_ROWS = {
    "1 '<image>' for 2 image": {"problem": "<image>?", "answer": "1", "images": ["a.png", "b.png"]},
    "1 '<image>' for 0 image": {"problem": "<image>?", "answer": "1", "images": []},
    "0 '<image>' for 1 image": {"problem": "what?", "answer": "1", "images": ["a.png"]},
    "2 image placeholders": {"problem": "<image> <|image_pad|>", "answer": "1", "images": ["a.png"]},
    "video placeholder": {"problem": "<image> <|video_pad|>", "answer": "1", "images": ["a.png"]},
    "cannot be read: No such file": {"problem": "<image>?", "answer": "1", "images": ["gone.png"]},
    "unreadable or truncated": {"problem": "<image>?", "answer": "1", "images": ["rows.jsonl"]},
    "aspect ratio is over 200": {"problem": "<image>?", "answer": "1", "images": ["strip.png"]},
    "column 'problem' holds no text": {"problem": " ", "answer": "1", "images": []},
    "column 'problem' holds half of a character": {"problem": "say \ud83d", "answer": "1", "images": []},
    "column 'answer' holds no answer": {"problem": "?", "answer": None, "images": []},
}


@pytest.fixture
def with_strip(image_folder: Path) -> Path:
    noise_image(402, 2).save(image_folder / "strip.png")
    return image_folder


@pytest.mark.parametrize("reason", list(BAD_ROWS))
def test_a_bad_row_stops_the_run_with_its_name(processor, with_strip, reason) -> None:
    with pytest.raises(RowError) as caught:
        load(with_strip, processor, [ROWS[0], BAD_ROWS[reason]])
    assert "rows.jsonl, row 1: " in str(caught.value) and reason in str(caught.value)
    assert "data.on_bad_row=skip" in str(caught.value)


def test_a_row_whose_extras_cannot_be_sent_is_a_bad_one_where_they_are_read(processor, image_folder) -> None:
    deep: Any = "end"
    for _ in range(900):
        deep = {"in": deep}
    rows = [ROWS[2], {**ROWS[2], "extra_info": deep}]
    assert len(load(image_folder, processor, rows)) == 2
    with pytest.raises(RowError, match=r"row 1: columns 'data_source' and 'extra_info' hold records too deep"):
        load(image_folder, processor, rows, with_extras=True)
    kept = load(image_folder, processor, rows, with_extras=True, on_bad_row="skip")
    assert kept.rows == (0,)


def test_bad_rows_are_skipped_counted_and_listed(processor, with_strip, caplog) -> None:
    rows = [ROWS[0], *BAD_ROWS.values(), ROWS[2]]
    prompts = load(with_strip, processor, rows, on_bad_row="skip")
    assert prompts.rows == (0, len(rows) - 1) and prompts[1].problem == ROWS[2]["problem"]
    assert [error.row for error in prompts.report.bad_rows] == list(range(1, len(rows) - 1))
    for error, reason in zip(prompts.report.bad_rows, BAD_ROWS, strict=True):
        assert reason in error.reason
        assert str(error) in caplog.text


def test_a_row_sends_nothing_to_the_terminal(processor, image_folder, caplog) -> None:
    """The row keeps its text; what is said about it has symbols for escape sequences and the like."""
    rows = [ROWS[0], {"problem": "<image>?", "answer": "1", "images": ["\x1b[2J\u202egnp.a"]}]
    prompts = load(image_folder, processor, rows, on_bad_row="skip")
    assert "\x1b[2J\u202egnp.a" in prompts.report.bad_rows[0].reason
    assert "␛[2J<U+202E>gnp.a" in caplog.text and "\x1b" not in caplog.text and "\u202e" not in caplog.text


@pytest.mark.distributed
def test_transparency_that_the_authors_resize_drops_is_reported(processor, image_folder, caplog) -> None:
    """Said once at start, with the setting that shows it; the project's own resize has nothing to say."""
    Image.new("RGBA", (90, 60)).save(image_folder / "clear.png")
    noise_image(90, 60, mode="RGBA").save(image_folder / "opaque.png")
    rows = [{"problem": "<image>?", "answer": "1", "images": [name]} for name in ("clear.png", "opaque.png", "a.png")]
    dataset = write(image_folder, rows)
    for mode, expected in (("smart", 0), ("easyr1", 1)):
        caplog.clear()
        geometry = dataclasses.replace(builder(processor).geometry, mode=mode)
        build = PromptBuilder(processor, geometry)
        report = load_prompts(dataset, build, split="train", **READING).report
        assert report.transparent == expected
        said = [record for record in caplog.records if "1 rows have images with transparent pixels" in record.message]
        assert len(said) == expected


@pytest.mark.extended
def test_number_of_workers_changes_nothing(processor, image_folder, monkeypatch) -> None:
    monkeypatch.setattr("megatron_vppo.data.prompts._MIN_ROWS_PER_WORKER", 1)
    monkeypatch.setattr("megatron_vppo.data.prompts._ROWS_PER_CHUNK", 2)
    rows = [ROWS[i % 3] | {"answer": str(i)} for i in range(9)] + [BAD_ROWS["1 '<image>' for 0 image"]]
    alone = load(image_folder, processor, rows, on_bad_row="skip")
    shared = load(image_folder, processor, rows, on_bad_row="skip", num_workers=2)
    assert list(shared) == list(alone) and shared.rows == alone.rows == tuple(range(9))
    assert [str(e) for e in shared.report.bad_rows] == [str(e) for e in alone.report.bad_rows]
    assert list(pickle.loads(pickle.dumps(shared))) == list(alone)


def test_template_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.format_prompt=.*missing\.jinja"):
        read_template(str(tmp_path / "missing.jinja"))
    (tmp_path / "bad.jinja").write_text("{{ content ")
    with pytest.raises(ValueError, match=r"data\.format_prompt=.*bad\.jinja"):
        read_template(str(tmp_path / "bad.jinja"))
