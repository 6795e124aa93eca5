"""The page of `vppo data check`: what a data set holds, what is wrong with it, and what two sets have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from megatron_vppo.observability import report as report_of_run
from megatron_vppo.observability.report.text import html_text, plain_text
from megatron_vppo.system.whole import whole_file

Report = Mapping[str, Any]
"""The JSON of `vppo data check`."""


def write_survey_page(report: Report, path: Path) -> None:
    """Writes the page, which refers to no other file, whole or not at all."""
    with whole_file(path) as file:
        file.write(render_survey(report).encode("utf-8"))


def render_survey(report: Report) -> str:
    """Renders the page as one HTML document."""
    style = files(report_of_run).joinpath("page.css").read_text(encoding="utf-8")
    title = str(report["sets"][0]["source"])
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{plain_text(title)}</title><style>{style}</style></head><body>"
        f'<header class="page"><p class="eyebrow">vppo data check</p><h1>{html_text(title)}</h1></header>'
        f"<main>{''.join(_set_html(one) for one in report['sets'])}"
        f"{''.join(_shared_html(one) for one in report['shared'])}</main></body></html>"
    )


def _set_html(one: Report) -> str:
    facts = [("rows", one["rows"]), ("usable", one["usable"]), ("broken", len(one["broken"]))]
    facts += [("that repeat another row", sum(len(rows) - 1 for rows in one["repeated"]))]
    for count, rows in one["images_per_row"].items():
        facts.append((f"with {count} image{'' if count == '1' else 's'}", rows))
    spread = [(name, one[name]) for name in ("width", "height", "prompt_tokens") if one.get(name)]
    html = [_table(("", "rows"), facts)]
    if spread:
        columns = list(spread[0][1])
        html.append(_table(("", *columns), [(name, *values.values()) for name, values in spread]))
    if one["broken"]:
        html.append(f"<h3>Broken rows</h3>{_list(one['broken'])}")
    if one["repeated"]:
        html.append(f"<h3>Rows that are the same</h3>{_list([', '.join(map(str, rows)) for rows in one['repeated']])}")
    return _section(str(one["source"]), "".join(html))


def _shared_html(found: Report) -> str:
    facts = [
        ("the same question about the same images", len(found["same"])),
        ("the same images, another question", len(found["images"])),
        ("the same question, other images", len(found["question"])),
    ]
    pairs = [f"row {a} is row {b} of the other" for a, b in found["same"]]
    html = _table(("", "rows"), facts) + (f"<h3>The same rows</h3>{_list(pairs)}" if pairs else "")
    return _section(f"Rows of {found['one']} that {found['other']} has too", html)


def _section(title: str, content: str) -> str:
    return f'<section><header class="sectionhead"><h2>{html_text(title)}</h2></header>{content}</section>'


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    names = "".join(f"<th>{html_text(name)}</th>" for name in head)
    lines = "".join(f"<tr>{''.join(f'<td>{html_text(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{names}</tr></thead><tbody>{lines}</tbody></table>"


def _list(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{html_text(line)}</li>' for line in lines)}</ul>"
