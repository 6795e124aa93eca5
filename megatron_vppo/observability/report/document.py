"""The frame of our pages: one HTML document that refers to no other file."""

from __future__ import annotations

from importlib.resources import files

from megatron_vppo.observability.report.text import plain_text


def document_html(title: str, body: str, *, charts: bool = False, more_style: str = "", more_script: str = "") -> str:
    """Writes a document with our style.

    Args:
        body: HTML.
        charts: True if it has charts whose values page.js is to show.
        more_style: CSS of this page alone.
        more_script: JavaScript of this page alone.
    """
    folder = files(__package__)
    style = folder.joinpath("page.css").read_text(encoding="utf-8")
    script = folder.joinpath("page.js").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{plain_text(title)}</title><style>{style}{more_style}</style></head><body>{body}"
        + (f'<div id="tip" role="status"></div><script>{script}</script>' if charts else "")
        + (f"<script>{more_script}</script>" if more_script else "")
        + "</body></html>"
    )
