"""What only a CUDA device can show. Without one these files are not collected."""

from collections.abc import Iterator

import pytest
import torch

from megatron_vppo.parallel import head_chunk

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]


@pytest.fixture(autouse=True)
def _compiled_anew() -> Iterator[None]:
    """A run has one model; the many of these tests would reach torch's limit of variants of one compiled function."""
    yield
    torch._dynamo.reset()
    head_chunk.compiled.cache_clear()
