"""Tests that need a CUDA device. Without one these files are not collected."""

from collections.abc import Generator

import pytest
import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]


@pytest.fixture(autouse=True, scope="session")
def _room_for_variants() -> None:
    """A run has one model; the many of these tests would reach torch's limit of variants of one compiled function."""
    torch._dynamo.config.recompile_limit = 64


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Failures are shown at once: what comes at the end is lost when time on the device runs out."""
    report = yield
    if report.failed:
        item.config.get_terminal_writer().line(f"\n{report.longreprtext}")
    return report
