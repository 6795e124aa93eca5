"""Rows as LLaMA-Factory, verl, EasyR1 and the released sets have them, by the settings of docs/data.md.

The rows are written here in the shapes of those sets, with names, types and order of their columns; images are ours.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_vppo.data.columns import RowExtras
from megatron_vppo.data.dataset import RowError, VisionDataset
from megatron_vppo.data.prompts import load_prompts
from tests.data.rows import open_rows
from tests.data.test_prompts import READING, builder

ASKED = "<image>Find x. You first think, then put the answer into \\boxed{}."
TURNS = [
    [{"role": "user", "content": ASKED}, {"role": "assistant", "content": "48"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image> or <image>?"},
        {"role": "assistant", "content": "<think>The left.</think> \\boxed{left}"},
    ],
    [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}],
]
IMAGES = [["./images/a.png"], ["images/b.png", "images/c.jpg"], []]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


def rows_of(dataset: VisionDataset) -> list[tuple[str, str, str | None, list[tuple[int, int]]]]:
    copy = pickle.loads(pickle.dumps(dataset))
    return [
        (
            copy.problem(n),
            copy.answer(n),
            copy.system(n),
            [copy.check_image(n, i) for i in range(len(copy.image_cells(n)))],
        )
        for n in range(len(copy))
    ]


def encoded(folder: Path, *names: str, **more: Any) -> list[dict[str, Any]]:
    return [{"bytes": (folder / name).read_bytes(), **{key: value for key, value in more.items()}} for name in names]


# --- LLaMA-Factory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_messages_and_images(kind: str, image_folder: Path, tmp_path: Path) -> None:
    rows = [{"messages": turns, "images": images} for turns, images in zip(TURNS, IMAGES, strict=True)]
    path = tmp_path / f"geo.{kind}"
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        lines = (json.dumps(row) + "\n" for row in rows)
        path.write_text(json.dumps(rows, indent=2) if kind == "json" else "".join(lines))
    expected = [
        (ASKED, "48", None, [(90, 60)]),
        ("<image> or <image>?", "left", "Be brief.", [(60, 120), (100, 80)]),
        ("2+2?", "4", None, []),
    ]
    assert rows_of(open_rows(str(path), problem_key="messages")) == expected
    (tmp_path / "elsewhere").mkdir()
    moved = path.rename(tmp_path / "elsewhere" / path.name)
    again = open_rows(str(moved), problem_key="messages", image_dir=str(tmp_path))
    assert rows_of(again) == expected, "paths from data.image_dir"


def test_sharegpt_and_names_of_their_own(image_folder: Path, tmp_path: Path) -> None:
    said = {"system": "Be brief.", "human": "<image>?", "gpt": "\\boxed{3}"}
    row = {"conversations": [{"from": who, "value": text} for who, text in said.items()], "images": ["images/a.png"]}
    (tmp_path / "share.jsonl").write_text(json.dumps(row))
    expected = [("<image>?", "3", "Be brief.", [(90, 60)])]
    assert rows_of(open_rows(str(tmp_path / "share.jsonl"), problem_key="conversations")) == expected
    names = {"role_tag": "who", "content_tag": "says", "user_tag": "pupil", "assistant_tag": "teacher"}
    turns = zip(("system", "pupil", "teacher"), said.values(), strict=True)
    row = {"talk": [{"who": who, "says": text} for who, text in turns], "images": ["images/a.png"]}
    (tmp_path / "own.jsonl").write_text(json.dumps(row))
    with pytest.raises(RowError, match=r"row 0: column 'talk': turn 0 has from=None"):
        open_rows(str(tmp_path / "own.jsonl"), problem_key="talk").problem(0)
    (tmp_path / "dataset_info.json").write_text(json.dumps({"own": {"file_name": "own.jsonl", "tags": names}}))
    assert rows_of(open_rows(str(tmp_path / "own.jsonl"), problem_key="talk")) == expected


def test_a_column_of_answers_wins_over_the_last_turn(tmp_path: Path) -> None:
    row = {"messages": TURNS[2], "answer": 4.50}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert open_rows(str(tmp_path / "rows.jsonl"), problem_key="messages").answer(0) == "4.5"
    (tmp_path / "open.jsonl").write_text(json.dumps({"messages": TURNS[2][:1]}))
    with pytest.raises(RowError, match="row 0: column 'messages' holds no answer"):
        open_rows(str(tmp_path / "open.jsonl"), problem_key="messages").answer(0)


def test_rows_of_several_questions_are_bad_rows(processor, tmp_path: Path) -> None:
    talks = [TURNS[2], [*TURNS[2], *TURNS[2]], [{"role": "user", "content": " "}]]
    (tmp_path / "rows.json").write_text(json.dumps([{"messages": turns} for turns in talks]))
    dataset = open_rows(str(tmp_path / "rows.json"), problem_key="messages")
    found = load_prompts(dataset, builder(processor), split="train", **{**READING, "on_bad_row": "skip"})
    assert found.rows == (0,)
    reasons = [error.reason for error in found.report.bad_rows]
    assert "the turns are user, assistant, user, assistant; a row is one question" in reasons[0]
    assert "holds no text" in reasons[1]


def test_a_rows_system_turn_is_its_system_prompt(processor, tmp_path: Path) -> None:
    talks = [[{"role": "system", "content": "Be brief."}, *TURNS[2]], TURNS[2]]
    (tmp_path / "rows.json").write_text(json.dumps([{"messages": turns} for turns in talks]))
    dataset = open_rows(str(tmp_path / "rows.json"), problem_key="messages")

    def texts(system_prompt: str | None) -> list[str]:
        build = builder(processor, system_prompt=system_prompt)
        prompts = load_prompts(dataset, build, split="train", **{**READING, "on_bad_row": "skip"})
        return [processor.tokenizer.decode(prompt.token_ids).split("<|im_end|>")[0] for prompt in prompts]

    start = "<|im_start|>system\n"
    assert texts(None) == [f"{start}Be brief.", f"{start}You are a helpful assistant."]
    assert texts("Be brief.") == [f"{start}Be brief."] * 2
    assert texts("Think.") == [f"{start}Think."], "the row that says otherwise is a bad one"
    with pytest.raises(
        RowError, match=r"row 0: its system turn 'Be brief\.' is not data\.system_prompt 'Think\.'; set"
    ):
        load_prompts(dataset, builder(processor, system_prompt="Think."), split="train", **READING)


# --- verl and EasyR1 --------------------------------------------------------------------------------------------------


def verl_rows(folder: Path) -> list[dict[str, Any]]:
    """Makes rows of the columns that verl's preparation of Geometry3K writes."""
    return [
        {
            "data_source": "hiyouga/geometry3k",
            "prompt": [{"role": "user", "content": f"<image>Find {name}."}],
            "images": encoded(folder, name),
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": answer},
            "extra_info": {"split": "train", "index": n, "answer": answer, "question": "q"},
        }
        for n, (name, answer) in enumerate((("a.png", "2 \\sqrt { 221 }"), ("c.jpg", "007")))
    ]


VERL = {"problem_key": "prompt", "answer_key": "reward_model.ground_truth"}


def test_verl_parquet(image_folder: Path, tmp_path: Path) -> None:
    datasets.Dataset.from_list(verl_rows(image_folder)).to_parquet(tmp_path / "train.parquet")
    assert rows_of(open_rows(str(tmp_path / "train.parquet"), **VERL)) == [
        ("<image>Find a.png.", "2 \\sqrt { 221 }", None, [(90, 60)]),
        ("<image>Find c.jpg.", "007", None, [(100, 80)]),
    ]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json"])
def test_verl_rows_for_reward_functions(image_folder: Path, tmp_path: Path, kind: str) -> None:
    """The source and the further information of a row, with numbers as numbers."""
    rows: list[dict[str, Any]] = [{**row, "images": ["images/a.png"]} for row in verl_rows(image_folder)]
    rows[0]["extra_info"] |= {"level": 2.5, "is_new": True, "box": [[1, 2], [3, 4]], "of": {"book": "Elements"}}
    rows[1]["extra_info"] |= {"level": 0.1, "is_new": False, "box": [], "of": {"book": None}}
    rows.append({**rows[0], "extra_info": None, "data_source": None})
    path = tmp_path / f"train.{kind}"
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    dataset = open_rows(f"{path}@train[:3]", **VERL)
    assert [dataset.extras(row) for row in range(2)] == [
        RowExtras("hiyouga/geometry3k", row["extra_info"]) for row in rows[:2]
    ]
    assert dataset.extras(2) == RowExtras(None, None)


def test_verl_numbers_paths_and_rows_without_images(image_folder: Path, tmp_path: Path) -> None:
    truths = [{"style": "rule", "ground_truth": value} for value in (12.0, 0.1, None)]
    turns = [[{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]] * 3
    kind = pa.struct([("style", pa.string()), ("ground_truth", pa.float32())])
    table = pa.table({"prompt": turns, "reward_model": pa.array(truths, kind), "extra_info": [{"index": 1}] * 3})
    pq.write_table(table, tmp_path / "text.parquet")
    dataset = open_rows(str(tmp_path / "text.parquet"), **VERL)
    assert not dataset.has_image_column and dataset.system(0) == "s"
    assert [dataset.answer(0), dataset.answer(1)] == ["12", "0.1"]
    with pytest.raises(RowError, match=r"row 2: column 'reward_model\.ground_truth' holds no answer"):
        dataset.answer(2)
    row = {**verl_rows(image_folder)[0], "images": [{"path": "images/a.png"}]}
    (tmp_path / "paths.jsonl").write_text(json.dumps(row))
    assert rows_of(open_rows(str(tmp_path / "paths.jsonl"), **VERL))[0][3] == [(90, 60)]
    with pytest.raises(RowError, match=r"column 'reward_model\.truth' holds no answer"):
        open_rows(str(tmp_path / "paths.jsonl"), problem_key="prompt", answer_key="reward_model.truth").answer(0)
    with pytest.raises(ValueError, match=r"no column 'reward\.truth'; it has data_source, .*Set data\.answer_key"):
        open_rows(str(tmp_path / "paths.jsonl"), problem_key="data_source", answer_key="reward.truth")


# --- Released sets ----------------------------------------------------------------------------------------------------


def test_the_authors_sets(image_folder: Path, tmp_path: Path) -> None:
    """VPPO_ViRL39K_train and VPPO_MMK12_validation, and PAPO's sets, of which they are copies: bytes without a path."""
    bytes_alone = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.null())]))
    rows = [encoded(image_folder, "a.png", path=None), encoded(image_folder, "b.png", "c.jpg", path=None)]
    columns = {"id": ["1", "2"], "problem": ["<image>p", "<image><image>q"], "answer": ["3", "B"]}
    (tmp_path / "data").mkdir()
    table = pa.table({**columns, "images": pa.array(rows, bytes_alone)})
    pq.write_table(table, tmp_path / "data" / "train-00000-of-00001.parquet")
    expected = [("<image>p", "3", None, [(90, 60)]), ("<image><image>q", "B", None, [(60, 120), (100, 80)])]
    assert rows_of(open_rows(str(tmp_path))) == expected
    assert rows_of(open_rows(f"{tmp_path}@train[1:]")) == expected[1:]


def test_virl39k(image_folder: Path, tmp_path: Path) -> None:
    """TIGER-Lab/ViRL39K: paths into the unpacked images.zip next to the file, and answers in a box."""
    row = {
        "question": "<image>p", "answer": r"\boxed{17^\circ}", "PassRate_32BTrained": 0.5, "PassRate_7BBase": -1.0,
        "category": "geometry", "source": "s", "qid": "q", "image": ["images/a.png"],
    }  # fmt: skip
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "39Krelease.parquet")
    dataset = open_rows(str(tmp_path / "39Krelease.parquet"), problem_key="question", image_key="image")
    assert rows_of(dataset) == [("<image>p", r"\boxed{17^\circ}", None, [(90, 60)])]


def test_mmk12(image_folder: Path, tmp_path: Path) -> None:
    """FanqingM/MMK12: one image in a column of its own, and no mark of it in the question."""
    (image,) = encoded(image_folder, "a.png", path="a.png")
    row = {"id": "1", "image": image, "question": "As shown. A. 1 B. 2", "answer": "B", "subject": "math"}
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    columns = {"problem_key": "question", "image_key": "image"}
    dataset = open_rows(f"{tmp_path}@test", image_place="first", **columns)
    assert rows_of(dataset) == [("<image>As shown. A. 1 B. 2", "B", None, [(90, 60)])]
    assert open_rows(f"{tmp_path}@test", **columns).problem(0) == "As shown. A. 1 B. 2"


def test_images_without_marks_come_first_and_marks_stay(image_folder: Path, tmp_path: Path) -> None:
    rows = [
        {"problem": "a <image> b", "answer": "1", "images": ["images/a.png"]},
        {"problem": "two", "answer": "1", "images": ["images/a.png", "images/b.png"]},
        {"problem": "none", "answer": "1", "images": []},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    dataset = open_rows(str(tmp_path / "rows.json"), image_place="first")
    assert [dataset.problem(n) for n in range(3)] == ["a <image> b", "<image><image>two", "none"]


def test_geometry3k(image_folder: Path, tmp_path: Path) -> None:
    """hiyouga/geometry3k: a list of the Image feature, and three splits by the names of files."""
    features = datasets.Features(
        images=datasets.List(datasets.Image()), problem=datasets.Value("string"), answer=datasets.Value("string")
    )
    (tmp_path / "data").mkdir()
    for split, name in (("train", "a.png"), ("validation", "b.png"), ("test", "c.jpg")):
        row = {"images": encoded(image_folder, name, path=name), "problem": f"<image>{split}", "answer": "48"}
        table = datasets.Dataset.from_list([row], features=features)
        table.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    for split, size in (("train", (90, 60)), ("validation", (60, 120)), ("test", (100, 80))):
        assert rows_of(open_rows(f"{tmp_path}@{split}")) == [(f"<image>{split}", "48", None, [size])]
