# SPDX-License-Identifier: Apache-2.0
"""The pictures of docs/how-it-works.md, drawn from what is written here: `python docs/site/pictures.py` writes
docs/pictures/*.svg, which are committed, since a forge shows them too. A test compares both, and the picture of the
states with the tables in `postcopy.wire.states`."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

PICTURES = Path(__file__).parents[1] / "pictures"

INK, GREY, LINE = "#1f2937", "#6b7280", "#9ca3af"
SOURCE, DESTINATION, NEUTRAL = "#dbeafe", "#dcfce7", "#f3f4f6"  # who may run the machine
BAD = "#b91c1c"


class Picture:
    """Shapes in the order in which they are drawn."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.shapes = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
            ' font-family="Helvetica, Arial, DejaVu Sans, sans-serif" font-size="13" role="img">',
            f"<title>{escape(title)}</title>",
            '<defs><marker id="to" viewBox="0 0 8 8" refX="7.5" refY="4" markerWidth="8" markerHeight="8"'
            f' orient="auto-start-reverse"><path d="M0 0 8 4 0 8z" fill="{INK}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>',
        ]

    def box(self, x: float, y: float, width: float, height: float, fill: str, stroke: str = LINE) -> None:
        self.shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="{fill}" stroke="{stroke}"/>'
        )

    def text(self, x: float, y: float, text: str, *, anchor: str = "middle", fill: str = INK, more: str = "") -> None:
        self.shapes.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{fill}"{more}>{escape(text)}</text>'
        )

    def path(self, points: str, *, dashed: bool = False, arrow: bool = True, stroke: str = INK) -> None:
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        end = ' marker-end="url(#to)"' if arrow else ""
        self.shapes.append(f'<path d="{points}" fill="none" stroke="{stroke}" stroke-width="1.4"{dash}{end}/>')

    def svg(self) -> str:
        return "\n".join([*self.shapes, "</svg>", ""])


# ---- Sequences


@dataclass(frozen=True)
class Step:
    """An arrow between two columns; from a column to itself: something that happens there."""

    start: int
    end: int
    text: str
    dashed: bool = False
    strong: bool = False


def sequence(title: str, columns: list[tuple[str, str, str]], steps: list[Step], width: int = 760) -> str:
    """Columns are a name, a line under it and a colour; time goes down."""
    pitch, top, row = width / len(columns), 70, 42
    height = top + row * len(steps) + 30
    picture = Picture(width, height, title)
    middle = [pitch * (number + 0.5) for number in range(len(columns))]
    for x, (name, below, fill) in zip(middle, columns, strict=True):
        picture.box(x - pitch / 2 + 12, 12, pitch - 24, 44, fill)
        picture.text(x, 31, name, more=' font-weight="bold"')
        picture.text(x, 48, below, fill=GREY, more=' font-size="11.5"')
        picture.path(f"M{x:g} 56V{height - 12}", arrow=False, stroke=LINE)
    for number, step in enumerate(steps):
        y = top + row * number + 30
        bold = ' font-weight="bold"' if step.strong else ""
        label = f"{number + 1}. {step.text}"
        if step.start == step.end:
            x, size = middle[step.start], 7.1 * len(label) + 18
            x = min(max(x, size / 2 + 8), width - size / 2 - 8)
            picture.box(x - size / 2, y - 17, size, 26, NEUTRAL if not step.strong else "#fef3c7")
            picture.text(x, y + 1, label, more=bold)
        else:
            start, end = middle[step.start], middle[step.end]
            picture.path(f"M{start:g} {y:g}H{end - (1 if end > start else -1):g}", dashed=step.dashed)
            size = 6.8 * len(label) + 8
            x = min(max((start + end) / 2, size / 2 + 8), width - size / 2 - 8)
            picture.shapes.append(
                f'<rect x="{x - size / 2:g}" y="{y - 19:g}" width="{size:g}" height="15" fill="#fff" opacity="0.85"/>'
            )
            picture.text(x, y - 7, label, more=bold)
    return picture.svg()


def page_fault() -> str:
    return sequence(
        "The life of a page fault",
        [
            ("vCPU or system call", "destination host", DESTINATION),
            ("kernel", "userfaultfd", NEUTRAL),
            ("fault thread", "pager, in C", DESTINATION),
            ("page server", "source host, in C", SOURCE),
        ],
        [
            Step(0, 1, "touches a missing page"),
            Step(1, 1, "blocks the thread"),
            Step(1, 2, "fault event"),
            Step(2, 3, "asks for the page, once"),
            Step(3, 2, "the page, with checksums"),
            Step(2, 2, "verifies it, claims the page"),
            Step(2, 1, "UFFDIO_COPY: places it"),
            Step(1, 0, "wakes it: it goes on"),
            Step(3, 2, "meanwhile: all other pages", dashed=True),
        ],
    )


def migrate() -> str:
    return sequence(
        "The life of a migration",
        [
            ("operator", "postcopy ctl", NEUTRAL),
            ("source", "runs the machine", SOURCE),
            ("destination", "runs it afterwards", DESTINATION),
        ],
        [
            Step(0, 1, "migrate host-b:7777"),
            Step(1, 2, "offer: kind, RAM blocks, options"),
            Step(2, 2, "checks memory, threads, rights"),
            Step(2, 1, "accept, ready"),
            Step(1, 1, "pauses the machine: downtime begins"),
            Step(1, 2, "page maps, device state"),
            Step(2, 1, "prepared"),
            Step(1, 2, "COMMIT: the point of no return", strong=True),
            Step(2, 2, "runs the machine: downtime ends"),
            Step(2, 1, "requests of pages that it touches"),
            Step(1, 2, "these first, all others meanwhile", dashed=True),
            Step(2, 1, "complete"),
            Step(1, 0, "moved; memory is freed"),
        ],
    )


# ---- States, in the words of `status`

BOXES: dict[str, tuple[int, int, str]] = {  # centre, and who may run the machine
    "connecting": (90, 80, SOURCE),
    "setup": (250, 80, SOURCE),
    "active": (410, 80, SOURCE),
    "in-doubt": (680, 80, NEUTRAL),
    "failed": (90, 210, SOURCE),
    "cancelled": (250, 210, SOURCE),
    "postcopy-active": (410, 210, DESTINATION),
    "postcopy-paused": (680, 210, DESTINATION),
    "completed": (410, 330, DESTINATION),
    "postcopy-recover": (680, 330, DESTINATION),
    "reclaimed": (90, 440, SOURCE),
    "postcopy-failed": (680, 440, DESTINATION),
}


def states() -> str:
    picture = Picture(820, 480, "The states of a migration, as status shows them")
    picture.text(20, 27, "The machine belongs to", anchor="start", fill=GREY)
    legend = ((190, SOURCE, "the source"), (300, DESTINATION, "the destination"), (440, NEUTRAL, "not known here"))
    for x, fill, text in legend:
        picture.box(x, 15, 15, 15, fill)
        picture.text(x + 21, 27, text, anchor="start", fill=GREY)

    def arrow(points: str, label: str = "", x: float = 0, y: float = 0, anchor: str = "middle") -> None:
        picture.path(points)
        for line, words in enumerate(label.split("\n")):
            picture.text(x, y + 15 * line, words, fill=GREY, anchor=anchor, more=' font-size="11.5"')

    arrow("M148 80H191")
    arrow("M308 80H351")
    arrow("M232 100C210 130 170 160 122 189", "fails before COMMIT", 160, 142, "end")
    arrow("M250 100V189", "migrate-cancel", 258, 170, "start")
    arrow("M410 100V189")
    picture.text(402, 150, "COMMIT", fill=BAD, anchor="end", more=' font-weight="bold"')
    arrow("M468 80H621", "connection lost", 545, 72)
    picture.text(545, 97, "(at the destination)", fill=GREY, more=' font-size="11.5"')
    arrow("M640 100C610 140 540 170 478 189", "the source had\ndecided; if not: failed", 620, 142, "start")
    arrow("M487 214H602", "connection lost", 545, 232)
    arrow("M410 230V309", "every page has arrived", 402, 274, "end")
    arrow("M664 230V309", "peer is back", 657, 288, "end")
    arrow("M704 310V231", "lost again", 711, 274, "start")
    arrow("M599 322C550 312 500 280 468 231", "goes on", 512, 300, "end")
    arrow("M757 220C800 260 800 390 757 432", "peer refuses\nfor good", 780, 372, "end")
    arrow("M603 440H149", "reclaim --force at the source: the destination is dead", 376, 430)
    for name, (x, y, fill) in BOXES.items():
        half = max(4.2 * len(name) + 14, 58)
        picture.box(x - half, y - 20, 2 * half, 40, fill)
        picture.text(x, y + 5, name, more=' font-weight="bold"')
    return picture.svg()


DRAWN = {"page-fault": page_fault, "migrate": migrate, "states": states}

if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    for name, draw in DRAWN.items():
        (PICTURES / f"{name}.svg").write_text(draw())
