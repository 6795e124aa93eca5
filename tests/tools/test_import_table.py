"""The page of the import has the table that the program writes, and the table has every key."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import import_table
import pytest

from tests.importing.their_keys import SET_BY_PROGRAM, SETTABLE


def test_the_page_has_the_table() -> None:
    page = import_table.PAGE.read_text(encoding="utf-8")
    body = page[page.index(import_table.BEGIN) + len(import_table.BEGIN) : page.index(import_table.END)]
    assert body == import_table.table(), "run python tools/import_table.py"


def test_the_table_has_every_key() -> None:
    cells = [line.split(" | ")[0].removeprefix("| ") for line in import_table.table().splitlines()[2:]]
    single = {cell for cell in cells if not cell.endswith("keys)")}
    assert single == {k for k in SETTABLE if not k.startswith(("worker.critic.", "worker.ref."))}
    assert len(cells) == len(single) + 3
    groups = [int(re.findall(r"\((\d+) keys\)", cell)[0]) for cell in cells[-3:]]
    assert groups == [36, 12, 17]
    assert set(re.findall(r"[\w.]+", cells[-1])) >= SET_BY_PROGRAM.keys()


def test_rows_say_what_becomes_of_a_key() -> None:
    lines = import_table.table().splitlines()
    for line in (
        "| worker.rollout.n | 1 | `rollout.n` | at least 2 |",
        "| data.prompt_key | prompt | `data.prompt_key` | the same |",
        "| algorithm.adv_estimator | grpo | `algorithm.advantage` | grpo and rloo |",
        "| worker.rollout.name | vllm |  | only vllm: vLLM is the only engine; set vllm |",
        "| data.video_fps | 2.0 |  | dropped: of videos |",
        "| algorithm.filter_low | 0.01 | `algorithm.filter_low` | only with algorithm.online_filtering |",
        "| trainer.logger | [console, wandb] | `trainer.loggers` | console, tensorboard, file: always on; mlflow is "
        "refused |",
    ):
        assert line in lines


def test_an_old_table_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = shutil.copy(import_table.PAGE, tmp_path / "import.md")
    whole = page.read_text()
    page.write_text(whole.replace("| data.video_fps |", "| data.video |"))
    monkeypatch.setattr(import_table, "PAGE", page)
    import_table.main()
    assert page.read_text() == whole
