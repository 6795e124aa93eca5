"""Text of others in HTML."""

from __future__ import annotations

from html import escape

from megatron_vppo.system.visible import UNSEEN, symbol, visible


def html_text(text: str) -> str:
    """Writes a text as the content of an element. A character that acts without being seen becomes a symbol, in an
    element `<code class="unseen">`.
    """
    return UNSEEN.sub(lambda found: f'<code class="unseen">{escape(symbol(found[0]))}</code>', escape(text))


def plain_text(text: str) -> str:
    """Writes a text where no element may stand: in `<title>`, or between the quotes of an attribute."""
    return escape(visible(text), quote=True)
