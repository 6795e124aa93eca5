"""Functions that misbehave: every message says what the reward function did, and no value is taken for another."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.data.test_reward_pool import grade, make_pool

pytestmark = pytest.mark.distributed


def error_of(tmp_path: Path, source: str, reward_type: str) -> str | None:
    (tmp_path / "score.py").write_text(source)
    with make_pool(f"{tmp_path}/score.py:f", reward_type=reward_type) as pool:
        return grade(pool, ["a", "b"])[0].error


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ("None", "TypeError: the reward function returned None for 'overall', which is no number"),
        ("b'1.0'", "TypeError: the reward function returned b'1.0' for 'overall', which is no number"),
        ("[1.0]", "TypeError: the reward function returned [1.0] for 'overall', which is no number"),
        ("(1.0, {})", "TypeError: the reward function returned (1.0, {}) for 'overall', which is no number"),
        ("10**400", "TypeError: the reward function returned 1000"),
        ("{'overall': 1.0, 'format': None}", "returned None for 'format', which is no number"),
    ],
)
def test_a_result_that_is_no_number_is_shown(tmp_path: Path, result: str, words: str) -> None:
    error = error_of(tmp_path, f"def f(item): return {result}", "sequential")
    assert error is not None and words in error


@pytest.mark.parametrize(
    "result", ["1.0", "None", "{'overall': [1.0]}", "{1.0}", "'1'", "{item['response'] for item in i}"]
)
def test_a_batch_that_is_no_list_is_refused(tmp_path: Path, result: str) -> None:
    """A set has no order: its scores would have gone to the wrong responses."""
    error = error_of(tmp_path, f"def f(i): return {result}", "batch")
    assert error is not None and error.startswith("TypeError: the reward function returned a ")
    assert "and it should return a list with a reward for each response (reward.reward_type=batch)" in error


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt: "),
        ("raise BaseException('base')", "BaseException: base"),
        ("raise Mute", "Mute: "),
        ("import os; os.closerange(3, 100); return 1.0", "the worker process ended (exit code 1)"),
    ],
)
def test_every_end_of_a_function_has_its_own_name(tmp_path: Path, body: str, words: str) -> None:
    """All of these were "the worker process ended (exit code -9)"."""
    mute = "class Mute(Exception):\n    def __str__(self): raise RuntimeError\n"
    error = error_of(tmp_path, f"{mute}def f(item):\n    {body}\n", "sequential")
    assert error is not None and error.startswith(words)


def test_a_batch_function_may_empty_its_list(tmp_path: Path) -> None:
    source = "def f(items):\n    n = len(items)\n    items.clear()\n    return [1.0] * n\n"
    assert error_of(tmp_path, source, "batch") is None


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def f(a, b): ...", "is f(a, b), which cannot be called (missing a required argument: 'b'). Known are"),
        ("async def f(item): ...", "is an async function"),
        ("g = 1", "no function 'f' in that file"),
    ],
)
def test_refusals_of_ours_have_no_traceback(tmp_path: Path, source: str, words: str) -> None:
    (tmp_path / "score.py").write_text(source)
    with pytest.raises(ValueError) as caught:
        make_pool(f"{tmp_path}/score.py:f")
    assert words in str(caught.value) and "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            b"import no_such_module\n",
            "line 1, in <module>\n    import no_such_module\nModuleNotFoundError: No module named",
        ),
        (b"def f(item: return 1\n", "line 1\n    def f(item: return 1\n"),
        (b"x = '\xe4'\ndef f(item): return 1\n", "SyntaxError: "),
        (b"import sys\nsys.exit('no')\n", "line 2, in <module>\n    sys.exit('no')\nSystemExit: no"),
    ],
)
def test_errors_of_the_users_file_show_its_lines_alone(tmp_path: Path, source: bytes, words: str) -> None:
    (tmp_path / "score.py").write_bytes(source)
    with pytest.raises(ValueError) as caught:
        make_pool(f"{tmp_path}/score.py:f")
    message = str(caught.value)
    assert f"cannot be loaded:\nreward.reward_function={tmp_path}/score.py:f cannot be imported:\n" in message
    assert words in message and "reward_worker.py" not in message and "importlib" not in message


def test_a_file_that_ends_its_process_is_named(tmp_path: Path) -> None:
    (tmp_path / "score.py").write_text("import os\nos._exit(3)\n")
    with pytest.raises(ValueError, match=r"reward\.reward_function=.*score\.py:f: .* ended while starting .*code 3"):
        make_pool(f"{tmp_path}/score.py:f")


def test_a_host_that_starts_no_more_processes_keeps_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers that had started already went on waiting."""
    started: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def limited(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        if len(started) == 2:
            raise BlockingIOError("Resource temporarily unavailable")
        started.append(start(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", limited)
    with pytest.raises(BlockingIOError):
        make_pool(num_workers=4)
    assert [process.poll() is None for process in started] == [False, False]
