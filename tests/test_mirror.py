"""Tests lie where the code that they test lies, and every proof is named on the page that says what is proved.

The tests of a module are in the folder of the same name below tests/, in the file of its name with `test_` before it; a
second file about the same module adds its subject to the name. Whole-package claims are in `tests/proofs/`, programs in
`tests/tools/`.
"""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
PACKAGE = ROOT / "megatron_vppo"

ELSEWHERE = {"proofs", "gpu", "performance", "reliability", "slurm", "tools"}
"""Folders of tests that are about no single room."""

WHOLE_ROOM = {"conversion/test_wrong_input.py": "each case goes through several modules of the converters"}
"""Tests of a room that are about no single module, with the reason."""


def misplaced(tests: list[str], modules: set[str]) -> list[str]:
    """The test files, by path below tests/, whose name is not that of a module in the folder of the same name."""
    found = []
    for test in tests:
        folder, _, file = test.rpartition("/")
        words = file.removeprefix("test_").removesuffix(".py").split("_")
        names = {"/".join(filter(None, [folder, "_".join(words[:n])])) for n in range(1, len(words) + 1)}
        if test not in WHOLE_ROOM and not names & modules:
            found.append(test)
    return found


def modules() -> set[str]:
    return {path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py")}


def test_tests_lie_where_their_modules_lie() -> None:
    paths = [path.relative_to(TESTS) for path in TESTS.rglob("test_*.py")]
    tests = [path.as_posix() for path in paths if len(path.parts) > 1 and path.parts[0] not in ELSEWHERE]
    assert len(tests) > 80
    assert misplaced(tests, modules()) == []
    assert set(WHOLE_ROOM) <= set(tests)


def test_every_proof_is_named_on_its_page() -> None:
    page = (ROOT / "docs" / "proofs.md").read_text(encoding="utf-8")
    proofs = [path.name for path in (TESTS / "proofs").glob("test_*.py")]
    assert len(proofs) > 15
    assert [name for name in proofs if name not in page] == []


def test_a_misplaced_test_is_found() -> None:
    tests = ["data/test_images.py", "data/test_images_cache.py", "data/test_pictures.py", "models/test_images.py"]
    assert misplaced(tests, {"data/images", "models/build"}) == ["data/test_pictures.py", "models/test_images.py"]
