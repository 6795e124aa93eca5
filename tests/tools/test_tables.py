"""The tables: rows against scikit-learn, worded answers against a reader of their own, and what their tokens are."""

import itertools
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_dataset
from digits.checkpoint import make_config, make_model, make_processor, make_tokenizer, save_checkpoint
from digits.cold_start import load_rows, prompt_inputs
from digits.rows import write_data
from sklearn.datasets import load_digits
from tables.reads import answer_pattern, measure, token_kinds
from tables.table import READINGS, TABLE
from transformers import Qwen2_5_VLForConditionalGeneration

from megatron_vppo.config.load import load_config
from megatron_vppo.data.graders.mathruler import grade

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "tables_cpu"
MIXED = (0, 1, 2, 3)
"""One cell in each wording."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tables")
    write_data(out, TABLE, train=24, val=8, held_out=0.25, seed=5)
    return out


@pytest.mark.parametrize(("split", "count"), [("train", 24), ("val", 8)])
def test_rows_are_what_scikit_learn_says(folder, split, count):
    rows = load_dataset("parquet", data_files=str(folder / f"{split}.parquet"), split="train", cache_dir=folder / "hf")
    labels = json.loads((folder / "labels.json").read_text())[split]
    truth = load_digits()
    assert len(rows) == len(labels["scans"]) == count
    for row, scans in zip(rows, labels["scans"], strict=True):
        assert row["problem"].count("<image>") == 1
        assert row["answer"] == str(truth.target[scans].sum())[-1]
        (image,) = row["images"]
        assert image.size == (112, 112)
        blocks = np.asarray(image.convert("L"), dtype=float).reshape(16, 7, 16, 7).mean(axis=(1, 3))
        top_left, top_right, bottom_left, bottom_right = 255 - truth.images[scans] * 255 / 16
        expected = np.block([[top_left, top_right], [bottom_left, bottom_right]])
        assert np.corrcoef(blocks.ravel(), expected.ravel())[0, 1] > 0.97


def test_the_held_out_scans_are_not_trained_on(folder):
    labels = json.loads((folder / "labels.json").read_text())
    assert not set(np.ravel(labels["train"]["scans"])) & set(np.ravel(labels["val"]["scans"]))


def test_a_solution_word_for_word():
    assert TABLE.solution((9, 4, 0, 8), MIXED) == (
        r"a: I see 9. 0+9=9. b is 4. 9+4=3. c shows 0, 3+0=3. d: 8, so 3+8=1. \boxed{1}"
    )


def test_every_solution_adds_up_and_has_60_to_120_tokens():
    """All 256 choices of wordings; the reader knows the digits and the sums, but no wording."""
    tokenizer = make_tokenizer()
    generator = np.random.default_rng(0)
    room = load_config(EXAMPLE / "config.yaml").data.max_response_length
    lengths = []
    for wordings in itertools.product(range(len(READINGS)), repeat=4):
        digits = generator.integers(10, size=4).tolist()
        text = TABLE.solution(digits, wordings)
        numbers = [int(number) for number in re.findall(r"\d", text)]
        *cells, boxed = numbers
        before = 0
        for cell, digit in enumerate(digits):
            after = int(str(before + digit)[-1])
            assert cells[4 * cell : 4 * cell + 4] == [digit, before, digit, after]
            before = after
        assert boxed == before == TABLE.answer(digits)
        last_digit = str(sum(digits))[-1]
        assert grade(text, last_digit).reward == 1
        assert grade(text, str((int(last_digit) + 1) % 10)).reward == 0
        lengths.append(len(tokenizer(text)["input_ids"]) + 1)
    assert (min(lengths), max(lengths)) == (65, 81)
    assert max(lengths) <= min(room, TABLE.longest_solution)


def test_the_kinds_of_a_solutions_tokens():
    tokenizer = make_tokenizer()
    text = TABLE.solution((9, 4, 0, 8), MIXED)
    tokens = [*(tokenizer.decode(token) for token in tokenizer(text)["input_ids"]), "<|im_end|>"]
    kinds = token_kinds(tokens, answer_pattern())
    assert kinds is not None
    shown = [
        {"read": "R", "sum": "S", "word": token}[kind] for token, kind in zip(tokens[:-1], kinds[:-1], strict=True)
    ]
    assert "".join(shown) == r"a: I see R. S+S=S. b is R. S+S=S. c shows R, S+S=S. d: R, so S+S=S. \boxed{S}"
    assert kinds[-1] == "word"
    for other in (text.replace("b is", "b was"), text.replace("9+4=3", "9+5=3"), text[:-1], "x" + text):
        other_kinds = token_kinds([*other, "<|im_end|>"], answer_pattern())
        assert (other_kinds is None) == (other != text.replace("9+4=3", "9+5=3")), "a wrong sum is worded as ever"


def test_measured_by_kind():
    """Dependency 3 on reads, 1 on sums, 0 on words; the filter has kept every read and every other sum."""
    text = TABLE.solution((1, 2, 3, 4), (1, 1, 1, 1))
    tokens = [*text.replace(r"\boxed", "#"), "<|im_end|>"]
    tokens[tokens.index("#")] = r"\boxed"
    kinds = token_kinds(tokens, answer_pattern())
    sums = itertools.count()
    record = {
        "tokens": tokens,
        "dependency": [{"read": 3.0, "sum": 1.0, "word": 0.0}[kind] for kind in kinds],
        "old_logps": [{"read": -0.5, "sum": -0.25, "word": 0.0}[kind] for kind in kinds],
        "kept": [int(kind == "read" or (kind == "sum" and next(sums) % 2)) for kind in kinds],
    }
    found = measure([record, {"dependency": None}, {**record, "tokens": ["x"] * len(tokens)}])
    assert (found["answers"], found["worded_otherwise"]) == (2, 1)
    assert found["tokens"] == {"mean": 65, "least": 65, "most": 65}
    assert found["read"] == {
        "share_of_tokens": 4 / 65, "mean_dependency": 3, "share_of_dependency": 12 / 25, "mean_nll": 0.5,
        "share_kept": 1,
    }  # fmt: skip
    assert found["sum"] == {
        "share_of_tokens": 13 / 65, "mean_dependency": 1, "share_of_dependency": 13 / 25, "mean_nll": 0.25,
        "share_kept": 6 / 13,
    }  # fmt: skip
    assert (found["word"]["share_of_tokens"], found["word"]["mean_dependency"]) == (48 / 65, 0)
    with pytest.raises(SystemExit, match="none of 1 answers"):
        measure([{**record, "tokens": ["x"] * len(tokens)}])


def run(program: str, monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", [program, *map(str, words)])
    runpy.run_path(str(ROOT / "tools" / program), run_name="__main__")


def test_the_programs_write_data_and_a_model(tmp_path, monkeypatch):
    """With a learning rate of zero the model is the one that it begins with."""
    data, start, out = (tmp_path / name for name in ("data", "start", "model"))
    run("tables/make_data.py", monkeypatch, "--out", data, "--train-tables", 16, "--val-tables", 2)
    assert np.shape(json.loads((data / "labels.json").read_text())["train"]["digits"]) == (16, 4)

    settings = ("--band", 0, 1, "--max-steps", 2, "--batch", 4, "--lr", 0, "--threads", torch.get_num_threads())
    model = ("--data", data, "--start", start, "--out", out, *settings)
    with pytest.raises(SystemExit):  # no model yet
        run("tables/make_model.py", monkeypatch, *model)
    processor = make_processor()
    begun = make_model(make_config(processor.tokenizer), seed=3)
    save_checkpoint(begun, processor, start)
    (start / "built.json").write_text(json.dumps({"arguments": {"family": "qwen2.5-vl", "seed": 3}}))
    run("tables/make_model.py", monkeypatch, *model)
    built = json.loads((out / "built.json").read_text())
    assert built["result"]["steps"] == 2 and built["arguments"]["start"]["seed"] == 3
    loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(out, dtype="auto").state_dict()
    for name, weight in begun.state_dict().items():
        assert torch.equal(weight, loaded[name]), name

    inputs = prompt_inputs(processor, load_rows(data, "val", processor), torch.arange(2))
    assert inputs["image_grid_thw"].tolist() == [[1, 8, 8]] * 2
    assert inputs["input_ids"].shape[1] <= load_config(EXAMPLE / "config.yaml").data.max_prompt_length


@pytest.mark.extended
def test_the_whole_build_is_right_about_some(tmp_path, monkeypatch):
    """Minutes: the start model of the example, and the one that it begins with."""
    for task, start in (("digits", ()), ("tables", ("--start", tmp_path / "digits" / "model"))):
        folder = tmp_path / task
        run(f"{task}/make_data.py", monkeypatch, "--out", folder / "data")
        run(f"{task}/make_model.py", monkeypatch, "--data", folder / "data", *start, "--out", folder / "model")
        assert 0.3 <= json.loads((folder / "model" / "built.json").read_text())["result"]["accuracy"] <= 0.45
