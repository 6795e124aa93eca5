"""Lines for the terminal."""

from __future__ import annotations

from megatron_vppo.system.visible import visible


def say(text: str) -> None:
    """Prints a line, or several, at once. Characters that a terminal would obey are shown as symbols."""
    print(visible(text), flush=True)
