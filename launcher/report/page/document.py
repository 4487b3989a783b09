"""One self-contained HTML page: no request, no script, light and dark, readable on a phone and on paper."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --warn: #b45309; }
@media (prefers-color-scheme: dark) { :root { --warn: #f0b429; } }
* { box-sizing: border-box; }
body { max-width: 60rem; margin: 0 auto; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.2; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .3rem; }
p, figcaption { max-width: 46rem; } figure { margin: .5rem 0; } figcaption { font-size: .9rem; opacity: .85; }
svg { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; } details { margin: .4rem 0; } summary { cursor: pointer; font-size: .9rem; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } thead th { background: var(--soft); }
.note { border-left: 3px solid var(--warn); padding-left: .6rem; overflow-wrap: anywhere; }
footer { margin-top: 3rem; font-size: .8rem; opacity: .75; overflow-wrap: anywhere; }
@media print { body { max-width: none; font-size: 11pt; } section { break-inside: avoid; } }
"""


@dataclass(frozen=True, slots=True)
class DataTable:
    """Rows of text under their headings."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a page: title and text, an SVG element if there is a figure, and the same values as a table."""

    title: str
    text: str
    svg: str | None
    table: DataTable
    notes: tuple[str, ...] = ()


def page(title: str, summary: str, sections: Sequence[Section], footer: str) -> str:
    """The whole page as HTML."""
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="icon" href="data:,">',  # an empty icon, so that browsers do not request one
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>",
        f"<body><h1>{html.escape(title)}</h1><p>{html.escape(summary)}</p>",
        *map(section_html, sections),
        f"<footer>{html.escape(footer)}</footer></body></html>",
    ]
    return "\n".join(parts) + "\n"


def section_html(section: Section) -> str:
    """One section; the table of a figure is collapsed, a section without a figure is open."""
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in section.notes)
    heading = f"<h2>{html.escape(section.title)}</h2>"
    table = table_html(section.table)
    if section.svg is None:
        return f"<section>{heading}<p>{html.escape(section.text)}</p>{notes}{table}</section>"
    figure = f"<figure>{section.svg}<figcaption>{html.escape(section.text)}</figcaption></figure>"
    return f"<section>{heading}{figure}{notes}<details><summary>as a table</summary>{table}</details></section>"


def table_html(table: DataTable) -> str:
    """A table that scrolls horizontally if the page is narrow."""
    head = "".join(f'<th scope="col">{html.escape(heading)}</th>' for heading in table.headings)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
