# SPDX-License-Identifier: Apache-2.0
"""A run as one HTML page that needs nothing else: no script, no font, no file beside it."""

from __future__ import annotations

from html import escape

from postcopy.testbed.faultpaths._layout import LEGEND, Section, columns, sections, summary
from postcopy.testbed.faultpaths._model import Run
from postcopy.testbed.faultpaths._report import describe_system

_STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 14px/1.45 system-ui, sans-serif; max-width: 110rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin: 1.8rem 0 .3rem; }
table { border-collapse: collapse; width: 100%; } .wide { overflow-x: auto; }
th, td { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; opacity: .7; } td:first-child { font-family: ui-monospace, monospace; white-space: nowrap; }
p.note, p.legend, .muted { opacity: .65; }
.good { color: light-dark(#176f2c, #56d364); } .warn { color: light-dark(#8a5a00, #e3b341); }
.bad { color: light-dark(#b3141d, #ff7b72); font-weight: 600; }
""".strip()


def to_html(run: Run) -> str:
    """The page."""
    title = f"Which kernel paths block on a missing page: {describe_system(run.system)}"
    verdict = "good" if run.good else "bad"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>{_STYLE}</style></head><body>",
            f"<h1>{escape(title)}</h1>",
            f'<p class="{verdict}">{escape(summary(run))}</p>',
            f'<p class="note">{escape(columns(run))}</p>',
            *(_section(section) for section in sections(run)),
            f'<p class="legend">{escape(LEGEND)}.</p>',
            "</body></html>",
            "",
        ]
    )


def _section(section: Section) -> str:
    note = f'<p class="note">{escape(section.note)}</p>' if section.note else ""
    head = "".join(f"<th>{escape(name)}</th>" for name in section.header)
    rows = []
    for number, row in enumerate(section.rows):
        cells = ("".join(f'<span class="{span.kind}">{escape(span.text)}</span>' for span in cell) for cell in row)
        hint = section.hints[number] if number < len(section.hints) else ""
        start = f'<tr title="{escape(hint)}">' if hint else "<tr>"
        rows.append(start + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return (
        f'<h2>{escape(section.title)}</h2>{note}<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + "\n</tbody></table></div>"
    )
