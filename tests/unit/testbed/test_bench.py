# SPDX-License-Identifier: Apache-2.0
"""The picture of `postcopy bench contention`, and what is refused before anything is measured."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from postcopy.cli import main
from postcopy.testbed.bench import Figure, _plot


def contention_bars() -> list[_plot.Bar]:
    idle = {"idle-p50": 1.0, "idle-p99": 2.0, "idle-max": 50.0}
    rounds = [{"p50": p50, "p99": 20.0, "max": 4000.0} | idle for p50 in (1.5, 2.0, 30.0)]
    return _plot.bars(
        [
            Figure(f"{name} / none", 2.0, 1.5, True, rounds)
            for name in ("mmap p50, 1 fault pending", "munmap p50, bulk <placement>")
        ]
    )


def test_bars_hold_medians_and_the_ratio_to_idle() -> None:
    assert contention_bars()[:2] == [
        _plot.Bar("mmap", "none pending", 1.0, 2.0, 50.0, 1.0),
        _plot.Bar("mmap", "1 fault pending", 2.0, 20.0, 4000.0, 2.0),
    ]


def test_the_plot_as_text() -> None:
    _, *lines = _plot.text_plot(contention_bars()).splitlines()
    assert [line.split("  ")[0].split()[0] for line in lines] == ["mmap", "mmap", "munmap", "munmap"]
    assert lines[1].count("█") < lines[1].count("▒") + lines[1].count("█") < 48
    assert lines[1].count("·") > lines[0].count("·")
    assert "2.00 / 20.00 / 4000" in lines[1]


def test_the_plot_as_svg() -> None:
    root = ElementTree.fromstring(_plot.svg_plot(contention_bars()))
    texts = ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "munmap, bulk <placement>" in texts
    assert len(list(root.iter("{http://www.w3.org/2000/svg}rect"))) == 8


def test_svg_is_for_plot_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "fault", "--svg", "/nonexistent/x"]) == 2
    assert "not among those asked for" in capsys.readouterr().err
    assert main(["bench", "contention", "--svg", "/nonexistent/x"]) == 2
    assert "there is no directory /nonexistent" in capsys.readouterr().err
