"""The progress line of a conversion."""

from __future__ import annotations

import io

from megatron_vppo.observability.byte_progress import ByteProgress


def test_the_name_of_a_folder_sends_nothing_to_the_terminal() -> None:
    stream = io.StringIO()
    progress = ByteProgress("writing out\x1b[2J", 10**9, stream=stream)
    progress.add(10**9)
    progress.close()
    assert stream.getvalue().startswith("writing out␛[2J  100%  1.00/1.00 GB")
