"""HTML of the report: a page that needs nothing but itself; all text given is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

CSS = """
:root { --ink: #1d2129; --muted: #5b6270; --line: #e3e6ea; --paper: #fff; --soft: #f6f7f9;
  --good: #00734f; --warn: #a84300; --blue: #005f94; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaee; --muted: #a3aab6; --line: #353b45;
  --paper: #16191f; --soft: #1d2128; --good: #35c79b; --warn: #f58a45; --blue: #4fa8e0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 940px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 44px 0 10px; padding-top: 14px; border-top: 1px solid var(--line); }
p { margin: 0 0 12px; max-width: 72ch; }
.by, figcaption, caption, .absent, footer { color: var(--muted); font-size: 13px; }
.absent { font-style: italic; }
figure { margin: 18px 0 22px; }
figure img { display: block; width: 100%; height: auto; }
figcaption { margin-top: 6px; max-width: 84ch; }
ul.advice { list-style: none; margin: 0; padding: 0; }
ul.advice li { display: grid; grid-template-columns: 92px 1fr; gap: 12px; padding: 9px 0;
  border-bottom: 1px solid var(--line); }
ul.advice b { font-size: 13px; font-weight: 600; color: var(--muted); }
ul.advice .good b { color: var(--good); }
ul.advice .warning b { color: var(--warn); }
.scroll { overflow-x: auto; margin: 14px 0 20px; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums;
  min-width: 60%; }
caption { text-align: left; padding-bottom: 6px; }
th { font-weight: 600; color: var(--muted); text-align: left; border-bottom: 1px solid var(--muted);
  vertical-align: bottom; }
th, td { padding: 4px 14px 4px 0; white-space: nowrap; }
td { border-bottom: 1px solid var(--line); }
td.wrap { white-space: normal; min-width: 24ch; overflow-wrap: anywhere; }
th.n, td.n { text-align: right; }
tr.key td { font-weight: 600; }
.ok { color: var(--good); } .bad { color: var(--warn); font-weight: 600; }
details { margin: 8px 0; } summary { cursor: pointer; color: var(--blue); }
pre { background: var(--soft); padding: 14px; overflow-x: auto; font-size: 12.5px; }
footer { margin-top: 56px; border-top: 1px solid var(--line); padding-top: 12px; }
@media print { h2 { break-after: avoid; } figure, table { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class Html:
    """Markup that is safe to insert; plain strings are escaped wherever they are accepted.

    Args:
        markup: finished HTML.
    """

    markup: str


Text = str | Html


def render(text: Text) -> str:
    """Markup of a text: escaped unless it is `Html` already."""
    return text.markup if isinstance(text, Html) else escape(text)


@dataclass(frozen=True)
class Column:
    """A table column.

    Args:
        title: its header.
        kind: "n" for numbers (right-aligned), "wrap" for long text, "" otherwise.
    """

    title: str
    kind: str = "n"


def table(
    caption: str, columns: Sequence[Column], rows: Iterable[Sequence[Text]], key: int | None = None
) -> Html:
    """A table with a caption.

    Args:
        caption: what the rows are.
        columns: headers and alignment.
        rows: cells, as many as columns.
        key: index of a row to stress.
    """
    head = "".join(f'<th scope="col"{_kind(c)}>{escape(c.title)}</th>' for c in columns)
    body = []
    for number, row in enumerate(rows):
        cells = (f"<td{_kind(c)}>{render(t)}</td>" for c, t in zip(columns, row, strict=True))
        stress = ' class="key"' if number == key else ""
        body.append(f"<tr{stress}>{''.join(cells)}</tr>")
    return Html(
        f'<div class="scroll"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def figure(light: str, dark: str, alt: str, caption: str) -> Html:
    """A figure in two renderings; the browser takes the one that fits its colour scheme.

    Args:
        light: data URI.
        dark: data URI.
        alt: what the figure shows, for those who cannot see it.
        caption: what to read from it.
    """
    return Html(
        "<figure><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{escape(dark)}">'
        f'<img src="{escape(light)}" alt="{escape(alt)}"></picture>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def section(title: str, parts: Sequence[Html | None], absent: str = "Not run.") -> Html:
    """A section; if no part exists, it says so instead of disappearing.

    Args:
        title: heading.
        parts: contents, None where something was not measured.
        absent: what to say without any contents.
    """
    found = "".join(part.markup for part in parts if part is not None)
    body = found or f'<p class="absent">{escape(absent)}</p>'
    return Html(f"<section><h2>{escape(title)}</h2>{body}</section>")


_SIGNS = {"good": "✓", "note": "·", "warning": "!"}  # colour alone would not reach everyone


def advice_list(items: Iterable[tuple[str, str, str]]) -> Html:
    """Statements as (level "good", "note" or "warning", topic, text)."""
    rows = (
        f'<li class="{escape(level)}"><b>{_SIGNS[level]} {escape(topic)}</b>'
        f"<span>{escape(text)}</span></li>"
        for level, topic, text in items
    )
    return Html(f'<ul class="advice">{"".join(rows)}</ul>')


def paragraph(text: str) -> Html:
    """A paragraph of plain text."""
    return Html(f"<p>{escape(text)}</p>")


def folded(title: str, content: Html) -> Html:
    """Content that opens on demand."""
    return Html(f"<details><summary>{escape(title)}</summary>{content.markup}</details>")


def preformatted(text: str) -> Html:
    """Text in a fixed-width block."""
    return Html(f"<pre>{escape(text)}</pre>")


def mark(ok: bool) -> Html:
    """Passed or failed, in words and colour."""
    return Html('<span class="ok">ok</span>' if ok else '<span class="bad">failed</span>')


def page(title: str, byline: str, sections: Iterable[Html], footer: str) -> str:
    """The whole document; its policy forbids the browser every request.

    Args:
        title: heading and window title.
        byline: one line below it.
        sections: contents in order.
        footer: last line.
    """
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body><main>"
        f'<h1>{escape(title)}</h1><p class="by">{escape(byline)}</p>'
        f"{''.join(part.markup for part in sections)}"
        f"<footer>{escape(footer)}</footer></main></body></html>\n"
    )


def _kind(column: Column) -> str:
    return f' class="{column.kind}"' if column.kind else ""
