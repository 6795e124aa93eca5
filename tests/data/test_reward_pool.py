"""Rewards from real worker processes: texts, results, hangs, crashes, and the end of the parent."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megatron_vppo.algorithm.types import Prompt, Response, Reward
from megatron_vppo.config.schema import DataConfig, RewardConfig
from megatron_vppo.data.columns import RowExtras
from megatron_vppo.data.reward_pool import RewardPool
from megatron_vppo.setup.rewards import reward_of
from tests.data.rows import open_rows

pytestmark = pytest.mark.distributed

TOKENIZER = Tokenizer(
    models.BPE(vocab={token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
)
"""One token per byte."""
TOKENIZER.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
TOKENIZER.decoder = decoders.ByteLevel()
TOKENIZER.add_special_tokens(["<eos>"])

FUNCTIONS = """
import os, sys, time

def _one(item):
    text = item["response"]
    if text == "hang":
        while True:
            pass
    if text == "raise":
        raise KeyError("no such thing")
    if text == "die":
        os._exit(7)
    print("noise on stdout")
    assert sys.stdin.read() == ""
    return {"overall": len(text) / 10, "accuracy": 1.0, "format": 0.5, "tokens": item["response_length"],
            "match": item["ground_truth"] == text}

def sequential(item):
    return _one(item)

def batch(items):
    return [_one(item) | {"size": len(items)} for item in items]

def numbers(items):
    return [float(item["response"]) for item in items]

def modules(item):
    heavy = {name: name in sys.modules for name in ("torch", "transformers")}
    return {"overall": 0.0, **heavy, "rank": "RANK" in os.environ}

def short(items):
    return [1.0] * (len(items) - 1)

def slow(item):
    time.sleep(float(item["response"]))
    return float(item["response"])
"""


@pytest.fixture
def functions(tmp_path: Path) -> str:
    (tmp_path / "math.py").write_text(
        FUNCTIONS
    )  # a name that hides the standard library's where its folder is searched
    return str(tmp_path / "math.py")


def responses(texts: list[str], answer: str = "42") -> list[Response]:
    return [
        Response(
            prompt=Prompt("train", 100 + i, "?", answer, (1,), (1,), (), ()),
            group_id=0,
            sample=i,
            token_ids=tuple(TOKENIZER.encode(text).ids),
            rollout_logps=(),
            finish_reason="stop",
            weight_version=0,
        )
        for i, text in enumerate(texts)
    ]


def make_pool(
    function: str = "mathruler",
    *,
    num_workers: int = 1,
    timeout_seconds: float = 10.0,
    extras: Callable[[str, int], RowExtras] | None = None,
    **settings: Any,
) -> RewardPool:
    """Opens a pool as a run does, with as many workers for every kind of function."""
    return RewardPool(
        reward_of(
            RewardConfig.model_validate({"reward_function": function, **settings}),
            DataConfig(train_files="lab/shapes@train", val_files="held_out.jsonl"),
        ),
        tokenizer=TOKENIZER.to_str(),
        num_workers=num_workers,
        num_batch_workers=num_workers,
        timeout_seconds=timeout_seconds,
        extras=extras,
    )


def grade_all(pool: RewardPool, submitted: list[Response]) -> list[tuple[str, Reward]]:
    tickets, graded = pool.submit(submitted), dict[int, tuple[str, Reward]]()
    while len(graded) < len(tickets):
        graded |= pool.take(60.0)
    return [graded[ticket] for ticket in tickets]


def grade(pool: RewardPool, texts: list[str]) -> list[Reward]:
    """Returns the rewards. The texts come back with them, whatever became of their workers."""
    graded = grade_all(pool, responses(texts))
    assert [text for text, _ in graded] == texts
    return [reward for _, reward in graded]


def test_built_in_grader_in_workers() -> None:
    texts = [r"\boxed{42}", "42", r"\boxed{41}", r"so \boxed{42.0}"] * 5
    with make_pool(num_workers=2) as pool:
        rewards = grade(pool, texts)
        assert [reward.overall for reward in rewards] == [1.0, 0.0, 0.0, 1.0] * 5
        assert [reward.accuracy for reward in rewards] == [1.0, 0.0, 0.0, 1.0] * 5
        assert grade(pool, []) == []


def test_a_weighted_sum_in_workers() -> None:
    parts = {"number": 0.75, "format": 0.25}
    with make_pool("number", parts=parts, relative_tolerance=0.05, num_workers=2) as pool:
        assert not pool.grades_batches and pool.num_workers == 2
        rewards = grade(pool, [r"<think></think>\boxed{44}", r"\boxed{44}", r"<think></think>\boxed{45}", "none"])
    assert [(reward.overall, reward.accuracy) for reward in rewards] == [(1, 1), (0.75, 1), (0.25, 0), (0, 0)]
    assert rewards[2].metrics == {"number": 0.0, "format": 1.0, "answered": 1.0}


def test_an_answer_that_is_not_of_the_graders_kind_is_an_error() -> None:
    with make_pool("choice") as pool:
        (reward,) = grade(pool, [r"\boxed{B}"])
    assert reward.overall == 0.0 and reward.error is not None
    assert reward.error.startswith("ValueError: the answer '42' is no letter from A to J; ")


def test_functions_of_verl_get_the_data_set_and_the_row(tmp_path: Path) -> None:
    """One response and lists; the data set is that of the split, without what follows @."""
    (tmp_path / "score.py").write_text(
        "def one(data_source, solution_str, ground_truth, extra_info=None, scale=1):\n"
        "    known = (data_source, solution_str, ground_truth, extra_info)\n"
        "    info = {'split': 'train', 'index': 100, 'num_turns': 2, 'rollout_reward_scores': {}}\n"
        "    return {'score': scale, 'acc': known == ('lab/shapes', 'x', '42', info)}\n"
        "def lists(data_sources, solution_strs, ground_truths, extra_infos):\n"
        "    rows = zip(data_sources, solution_strs, ground_truths, extra_infos, strict=True)\n"
        "    return [one(*row) for row in rows]\n"
    )
    with make_pool(f"{tmp_path}/score.py:one", reward_function_kwargs={"scale": 3}) as pool:
        assert pool.convention.endswith("extra_info=None), verl's") and not pool.grades_batches
        assert grade(pool, ["x"])[0] == Reward(overall=3.0, accuracy=1.0, metrics={}, error=None)
        validation = replace(responses(["x"])[0], prompt=replace(responses(["x"])[0].prompt, split="val"))
        assert grade_all(pool, [validation])[0][1].accuracy == 0.0
    with make_pool(f"{tmp_path}/score.py:lists") as pool:
        assert pool.grades_batches
        assert [reward.accuracy for reward in grade(pool, ["x", "y"])] == [1.0, 0.0]


def test_functions_of_verl_get_the_columns_of_their_rows(tmp_path: Path) -> None:
    """They are read from the file for the responses that go to a worker, each row once, and not for other functions."""
    (tmp_path / "score.py").write_text(
        "def one(data_source, solution_str, ground_truth, extra_info):\n"
        "    bonus = extra_info['shape'].pop('sides')\n"  # a copy of its own
        "    return {'score': bonus[extra_info['index'] % 2], 'acc': data_source == 'geo'}\n"
        "def lists(data_sources, solution_strs, ground_truths, extra_infos):\n"
        "    return [one(*row) for row in zip(data_sources, solution_strs, ground_truths, extra_infos)]\n"
        "def easyr1(reward_inputs):\n"
        "    return [float('extra_info' in one) for one in reward_inputs]\n"
    )
    rows = [
        {"problem": "?", "answer": "42", "data_source": "geo", "extra_info": {"index": n, "shape": {"sides": [0.5, n]}}}
        for n in range(110)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset, read = open_rows(str(tmp_path / "rows.jsonl")), list[tuple[str, int]]()

    def extras(split: str, row: int) -> RowExtras:
        read.append((split, row))
        return dataset.extras(row)

    twice = [one for one in responses(["x", "y"]) for _ in range(2)]  # rows 100 and 101
    found = {}
    for name in ("one", "lists", "easyr1"):
        read.clear()
        with make_pool(f"{tmp_path}/score.py:{name}", extras=extras) as pool:
            found[name] = [(reward.overall, reward.accuracy) for _, reward in grade_all(pool, twice)], list(read)
    told = [(0.5, 1.0)] * 2 + [(101.0, 1.0)] * 2
    assert found["one"] == (told, [("train", 100)] * 2 + [("train", 101)] * 2)
    assert found["lists"] == (told, [("train", 100), ("train", 101)])
    assert found["easyr1"] == ([(0.0, 0.0)] * 4, [])


def test_functions_are_called_with_text_without_special_tokens(functions: str) -> None:
    """A character over two tokens is one in the text, half of one is shown as such, and all tokens are counted."""
    with make_pool(f"{functions}:sequential", reward_type="sequential") as pool:
        half, whole = (TOKENIZER.encode(text).ids for text in ("\u4e2d", "\xe9\U0001f600"))
        rows = [replace(responses(["x"])[0], token_ids=(*ids, 256)) for ids in (half[:2], whole, [])]
        graded = grade_all(pool, rows)
    assert [text for text, _ in graded] == ["\ufffd", "\xe9\U0001f600", ""]
    assert [(reward.overall, reward.metrics["tokens"]) for _, reward in graded] == [(0.1, 3.0), (0.2, 7.0), (0.0, 1.0)]


def test_a_hostile_answer_cannot_stop_the_built_in_grader() -> None:
    bomb = r"\boxed{x+99999999!}"  # MathRuler lets sympy compute it
    with make_pool(timeout_seconds=1.0) as pool:
        started = time.monotonic()
        rewards = [reward for _, reward in grade_all(pool, responses([bomb, r"\boxed{1+x}"], answer="x+1"))]
        assert [reward.overall for reward in rewards] == [0.0, 1.0]
        assert [reward.error for reward in rewards] == ["no result after 1 s", None]
        assert time.monotonic() - started < 60


@pytest.mark.parametrize("reward_type", ["sequential", "batch"])
def test_only_the_culprits_score_zero(functions: str, reward_type, caplog) -> None:
    texts = ["four", "hang", "42", "raise", "die", "raise", "end"]
    caplog.set_level(logging.WARNING)
    with make_pool(f"{functions}:{reward_type}", reward_type=reward_type, num_workers=2, timeout_seconds=1.0) as pool:
        rewards = grade(pool, texts)
        assert [reward.overall for reward in rewards] == [0.4, 0.0, 0.2, 0.0, 0.0, 0.0, 0.3]
        assert [reward.accuracy for reward in rewards] == [1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
        size = {"size": 1.0} if reward_type == "batch" else {}
        assert rewards[2].metrics == {"format": 0.5, "tokens": 2.0, "match": 1.0, **size}
        assert rewards[0].metrics["match"] == 0.0
        assert [reward.error for reward in rewards] == [
            None,
            "no result after 1 s",
            None,
            "KeyError: 'no such thing'",
            "the worker process ended (exit code 7)",
            "KeyError: 'no such thing'",
            None,
        ]
        # Each kind is shown once, with the first row it happened on.
        shown = [record.getMessage() for record in caplog.records if "the reward is zero" in record.getMessage()]
        assert len(shown) == 3
        assert sum("row 101" in m and "'hang'" in m for m in shown) == 1
        assert sum("row 103" in m and "KeyError" in m and "'raise'" in m for m in shown) == 1
        assert sum("row 104" in m for m in shown) == 1
        assert [reward.overall for reward in grade(pool, ["ab", "abc"])] == [0.2, 0.3]


def test_an_error_of_the_function_sends_nothing_to_the_terminal(tmp_path: Path, caplog) -> None:
    (tmp_path / "score.py").write_text("def score(item):\n    raise ValueError(item['response'] + '\\ud83d')\n")
    with make_pool(f"{tmp_path}/score.py:score", reward_type="sequential") as pool:
        (reward,) = grade(pool, ["\x1b[2J\u202e"])
    assert reward.error == "ValueError: \x1b[2J\u202e\ud83d"  # exact, for the record
    assert "ValueError: ␛[2J<U+202E><U+D83D>\n" in caplog.text and not {"\x1b", "\u202e"} & set(caplog.text)


@pytest.mark.parametrize(
    ("workers", "count", "sizes"),
    [(1, 5, [5] * 5), (2, 5, [2, 2, 3, 3, 3]), (3, 2, [1, 1]), (3, 7, [2, 2, 2, 2, 3, 3, 3]), (2, 0, [])],
)
def test_a_batch_is_divided_among_the_workers_in_order(
    functions: str, workers: int, count: int, sizes: list[int]
) -> None:
    texts = [str(n) * (n + 1) for n in range(count)]
    with make_pool(f"{functions}:batch", num_workers=workers) as pool:
        rewards = grade(pool, texts)
        assert [reward.metrics["size"] for reward in rewards] == sizes
        assert [reward.overall for reward in rewards] == [(n + 1) / 10 for n in range(count)]


def test_a_part_that_fails_leaves_the_others_whole(functions: str) -> None:
    with make_pool(f"{functions}:batch", num_workers=2) as pool:
        rewards = grade(pool, ["a", "b", "raise", "c"])
        assert [reward.metrics.get("size") for reward in rewards] == [2.0, 2.0, None, 1.0]
        assert [reward.error for reward in rewards] == [None, None, "KeyError: 'no such thing'", None]


def test_plain_numbers_and_unusable_results(functions: str) -> None:
    with make_pool(f"{functions}:numbers") as pool:
        rewards = grade(pool, ["0.25", "-1", "3"])
        assert [(r.overall, r.accuracy, dict(r.metrics)) for r in rewards] == [
            (0.25, 0.25, {}),
            (-1, 0, {}),
            (3, 1, {}),
        ]
        bad = grade(pool, ["1", "nan", "text"])
        assert [r.overall for r in bad] == [1.0, 0.0, 0.0]
        assert bad[1].error == "ValueError: the reward function returned nan for 'overall'"
        assert bad[2].error is not None and "could not convert string to float" in bad[2].error
    with make_pool(f"{functions}:short") as pool:
        assert [r.error for r in grade(pool, ["a", "b"])] == [
            "ValueError: the reward function returned 0 scores for 1 responses"
        ] * 2


def test_results_keep_their_order_and_workers_share_the_work(functions: str) -> None:
    texts = ["0.6", "0.01", "0.3", "0.02", "0.3"]
    with make_pool(f"{functions}:slow", reward_type="sequential", num_workers=3) as pool:
        started = time.monotonic()
        assert [reward.overall for reward in grade(pool, texts)] == [float(text) for text in texts]
        assert time.monotonic() - started < sum(float(text) for text in texts)


def test_rewards_come_as_they_are_ready_and_nothing_is_waited_for(functions: str) -> None:
    """One worker hangs in the first response, while the other grades the rest and more that comes meanwhile."""
    with make_pool(f"{functions}:slow", reward_type="sequential", num_workers=2, timeout_seconds=600) as pool:
        assert not pool.grades_batches and pool.take() == {} and pool.sources() == []
        first = pool.submit(responses(["600", "0"]))
        assert len(pool.sources()) == 2
        found = pool.take(60.0)
        assert [found.pop(ticket)[0] for ticket in first[1:]] == ["0"] and found == {}
        second = pool.submit(responses(["0.01", "0.02"]))
        for text, ticket in zip(("0.01", "0.02"), second, strict=True):
            assert {number: verdict[0] for number, verdict in pool.take(60.0).items()} == {ticket: text}
        assert len({*first, *second}) == 4 and len(pool.sources()) == 1
        assert pool.take() == {}
        third = pool.submit(responses(["0", "0.01", "0.02"]))
        pool.forget()
        assert set(pool.take(60.0)) == set(third[:1]), "the others had not been begun"
        assert pool.take() == {} and grade(pool, ["0.03"])[0].overall == 0.03


def test_workers_are_light_and_no_ranks(functions: str, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "3")
    with make_pool(f"{functions}:modules", reward_type="sequential") as pool:
        assert grade(pool, ["x"])[0].metrics == {"torch": 0.0, "transformers": 0.0, "rank": 0.0}


def test_functions_that_cannot_be_loaded_stop_the_run_at_its_start(functions: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no function 'batchh' in that file; it has sequential, batch, numbers"):
        make_pool(f"{functions}:batchh")
    with pytest.raises(ValueError, match="no such Python file"):
        make_pool(f"{tmp_path}/gone.py:batch")
    (tmp_path / "broken.py").write_text("import no_such_module_anywhere\n")
    with pytest.raises(ValueError, match="No module named 'no_such_module_anywhere'"):
        make_pool(f"{tmp_path}/broken.py:f")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("async def f(item): ...", "is an async function; make it an ordinary one"),
        ("def f(question, reply): ...", "cannot be called .missing a required argument: 'reply'"),
        ("def f(): ...", "cannot be called .too many positional arguments"),
        ("def f(item, *, key): ...", "cannot be called .missing a required argument: 'key'"),
    ],
)
def test_functions_of_another_calling_convention_are_refused(tmp_path: Path, function: str, message: str) -> None:
    """Otherwise every reward would be zero to the end of the run."""
    (tmp_path / "other.py").write_text(function)
    with pytest.raises(ValueError, match=message):
        make_pool(f"{tmp_path}/other.py:f")


def test_every_function_of_one_argument_is_taken(tmp_path: Path) -> None:
    (tmp_path / "ours.py").write_text(
        "import functools\n"
        "def f(item, weight=1.0, **rest): return 1.0\n"
        "def g(*items): return 1.0\n"
        "h = functools.partial(f, weight=2.0)\n"
        "class C:\n    def __call__(self, item): return 1.0\n"
        "c = C()\n"
    )
    for name in ("f", "g", "h", "c"):
        with make_pool(f"{tmp_path}/ours.py:{name}", reward_type="sequential") as pool:
            assert grade(pool, ["x"])[0].overall == 1.0, name


def worker_pids(pool: RewardPool) -> list[int]:
    return [worker.process.pid for worker in pool._workers]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("reward_type", ["sequential", "batch"])
def test_a_worker_that_was_killed_costs_no_reward(functions: str, reward_type, tmp_path: Path, caplog) -> None:
    """The first call ends its own process as the kernel would without memory; the second one finds its mark."""
    file = tmp_path / "killed.py"
    file.write_text(
        "import os, pathlib\n"
        f"mark = pathlib.Path({str(tmp_path)!r}) / 'mark'\n"
        "def sequential(item):\n"
        "    if item['response'] == 'once' and not mark.exists():\n"
        "        mark.touch()\n        os.kill(os.getpid(), 9)\n"
        "    if item['response'] == 'always':\n        os.kill(os.getpid(), 9)\n"
        "    return 1.0\n"
        "def batch(items):\n    return [sequential(item) + len(items) for item in items]\n"
    )
    caplog.set_level(logging.WARNING)
    with make_pool(f"{file}:{reward_type}", reward_type=reward_type) as pool:
        same = 1.0 if reward_type == "sequential" else 4.0
        assert [reward.overall for reward in grade(pool, ["a", "once", "b"])] == [same] * 3
        (line,) = caplog.messages
        these = "response is" if reward_type == "sequential" else "3 responses are"
        assert line == f"the worker process ended (exit code -9); its {these} graded once more"
        alone = 1.0 if reward_type == "sequential" else 2.0
        rewards = grade(pool, ["a", "always"])
        assert [reward.overall for reward in rewards] == [alone, 0.0], "once more, and not for ever"
        assert rewards[1].error == "the worker process ended (exit code -9)"


def test_close_and_a_death_between_calls(functions: str, caplog) -> None:
    pool = make_pool(f"{functions}:numbers", num_workers=2)
    pids = worker_pids(pool)
    os.kill(pids[0], 9)
    assert [reward.overall for reward in grade(pool, ["1", "2"])] == [1.0, 2.0]
    assert "the worker process ended (exit code -9)" in caplog.text, "between two rounds, or when it got its first"
    pids += worker_pids(pool)
    pool.close()
    pool.close()
    assert not any(is_alive(pid) for pid in pids)


def test_workers_die_with_a_parent_that_is_killed(functions: str) -> None:
    """Even one that is stuck in a function and never looks at its pipe again."""
    program = textwrap.dedent(f"""
        import sys, threading
        sys.path.insert(0, {str(Path(__file__).parents[2])!r})
        from tests.data.test_reward_pool import grade, make_pool, worker_pids
        pool = make_pool({f"{functions}:sequential"!r}, reward_type="sequential", num_workers=2, timeout_seconds=600)
        print(*worker_pids(pool), flush=True)
        grade(pool, ["hang"])
    """)
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    time.sleep(0.5)
    assert len(pids) == 2 and all(is_alive(pid) for pid in pids)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_alive(pid) for pid in pids)
