# SPDX-License-Identifier: Apache-2.0
"""The manual pages: complete, and rendered without a warning."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from postcopy.cli import main, make_parser
from postcopy.cli._commands import COMMANDS


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("man")
    assert main(["man", str(directory)]) == 0
    return directory


def rendered(page: Path) -> str:
    environment = {**os.environ, "MANWIDTH": "80", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        ["man", "--warnings", "-l", str(page)], capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_page_for_each_command(pages: Path) -> None:
    assert {page.name for page in pages.iterdir()} == {"postcopy.1", *(f"postcopy-{name}.1" for name in COMMANDS)}


@pytest.mark.needs("man")
@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_a_page_has_what_help_has(pages: Path, name: str) -> None:
    whole = make_parser(None)
    text = rendered(pages / f"postcopy-{name}.1" if name else pages / "postcopy.1")
    words = {word.rstrip(",") for word in text.split()}
    command = whole.subcommands[name] if name else whole
    for parser in command.walk() if name else (whole,):
        assert set(parser.options) <= words
    for _, example in command.examples:
        assert example.splitlines()[0] in text
    for other in whole.subcommands if not name else ():
        assert f"postcopy-{other}(1)" in text
    assert max(map(len, text.splitlines())) <= 80


def test_where_it_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["man", "/nonexistent"]) == 2
    assert "directory /nonexistent does not exist" in capsys.readouterr().err
