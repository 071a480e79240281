# SPDX-License-Identifier: Apache-2.0
"""What the documents name is there: files, pages, tests, targets of make, commands and options."""

from __future__ import annotations

import ast
import re
import runpy
import textwrap
from fnmatch import fnmatchcase
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

from postcopy.cli import make_parser

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
DOCUMENTS = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")), *PAGES]
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))

ROOMS = r"postcopy|csrc|tests|docs|examples|docker|tools|wire|service|migration|machines|net|memory|cli|core|pager"
NAMED_FILE = re.compile(rf"`((?:{ROOMS})/[\w./-]+\.(?:py|pyi|c|h|md|toml|json|yaml|txt|sh|svg))`")
SHOWN_IN = ("failures.md", "security.md")
TEST_ROOTS = {"I": "tests/integration", "U": "tests/unit", "C": "csrc/tests", "H": "tests/hostile"}


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        name, _, heading = target.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), target
        assert not heading or heading in headings(path), target


@cache
def headings(path: Path) -> frozenset[str]:
    """As a forge, and MyST, make anchors of them."""
    text = re.sub(r"^ *```.*?^ *```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles)


def test_every_page_is_in_the_index() -> None:
    """Once, so it has one place at the side of the site, too."""
    index = re.findall(r"^\| \[[^]]+\]\(([\w./-]+)\) \|", (ROOT / "docs/README.md").read_text(), re.MULTILINE)
    assert sorted((ROOT / "docs" / name).resolve() for name in index) == sorted(
        set(DOCUMENTS) - {ROOT / "docs/README.md"}
    )


@each_document
def test_files_that_are_named(document: Path) -> None:
    """By their path in the repository, or in the package or the core, as `wire/states.py`."""
    for name in NAMED_FILE.findall(document.read_text()):
        assert any((ROOT / below / name).exists() for below in ("", "postcopy", "csrc", "csrc/include")), name


@cache
def names_of_tests(path: Path) -> frozenset[str]:
    return frozenset(re.findall(r"\b(?:def|static \w+|TEST\()\s*(\w+)\b", path.read_text()))


def shown_by(page: str) -> list[tuple[str, str, str]]:
    """Root, file and test (or none), of each `I/test_x `test_y`, `test_z`` in a page."""
    rows = []
    for root, file, tests in re.findall(
        r"\b([IUCH])/((?:test|fuzz)_\w+)((?:,? `[^`]+`)*)", (ROOT / "docs" / page).read_text()
    ):
        rows += [(root, file, name.partition("[")[0]) for name in re.findall(r"`([^`]+)`", tests)] or [(root, file, "")]
    return rows


@pytest.mark.parametrize("page", SHOWN_IN)
def test_the_tests_that_show_it(page: str) -> None:
    rows = shown_by(page)
    assert len(rows) > 80
    for root, file, pattern in rows:
        paths = [path for path in (ROOT / TEST_ROOTS[root]).rglob(f"{file}.*") if path.suffix in (".py", ".c")]
        assert paths, f"{root}/{file}"
        names = frozenset[str]().union(*(names_of_tests(path) for path in paths))
        assert not pattern or any(fnmatchcase(name, pattern) for name in names), f"{root}/{file} {pattern}"


@each_document
def test_targets_of_make(document: Path) -> None:
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name in re.findall(r"(?:^|`)make ([a-z][a-z0-9-]*)(?![\w/-])", document.read_text(), re.MULTILINE):
        assert name in targets, name


@each_document
def test_commands_and_their_options(document: Path) -> None:
    text = document.read_text().replace("\\\n", " ")
    listings = "".join(re.findall(r"^ *```sh\n.*?^ *```", text, re.MULTILINE | re.DOTALL))
    lines = re.findall(r"^ *(?:[\w-]+\$ )?(?:\.venv/bin/)?postcopy ([a-z].*)$", listings, re.MULTILINE)
    lines += re.findall(r"`(?:\.venv/bin/)?postcopy ([a-z][^`\n]*)`", text)
    for line in lines:
        command = re.split(r" #| && | -- |;|\|", line)[0]
        help_text = help_of(command.split()[0])
        assert help_text, line
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", command):
            assert option in help_text, f"{option} in: postcopy {line}"


@cache
def help_of(command: str) -> str:
    """Of a command and all that it is divided into; empty where there is none."""
    found = make_parser([command]).subcommands.get(command)
    return "".join(parser.format_help() for parser in found.walk()) if found else ""


def test_every_status_is_explained() -> None:
    status = (ROOT / "docs/results.md").read_text().partition("\n## Status\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.+?`) \|", status, re.MULTILINE)
    assert sorted(re.findall(r"`([^`]+)`", " ".join(rows))) == sorted(
        import_module("postcopy.records.migration").STATUSES
    )


@each_document
def test_packages_that_examples_need(document: Path) -> None:
    """`pip install postcopy` does not bring them: the page says how to get them."""
    text = document.read_text()
    installed = " ".join(re.findall(r"pip install ([^#`\n]+)", text)).split()
    for example in re.findall(r"python (examples/\w+\.py)", text):
        imported = re.findall(r"^(?:import|from) (numpy|fsspec)\b", (ROOT / example).read_text(), re.MULTILINE)
        assert set(imported) <= set(installed), example


def test_alerts_that_are_named() -> None:
    rules = (ROOT / "examples/prometheus/postcopy.rules.yml").read_text()
    named = re.findall(r"^ *\| `(Postcopy\w+)`", (ROOT / "docs/howto/prometheus.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(re.findall(r"- alert: (\w+)", rules))


@each_document
def test_python_examples(document: Path) -> None:
    """Whole programs are run by tests/integration/test_documents.py; of a part of one, what it names is there."""
    for block in re.findall(r"^ *```python\n(.*?)^ *```", document.read_text(), re.MULTILINE | re.DOTALL):
        code = textwrap.dedent(block)
        tree = compile(code, str(document), "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("postcopy"):
                assert "._" not in f"{node.module}", f"{node.module} is private"
                for name in node.names:
                    if not hasattr(import_module(str(node.module)), name.name):
                        import_module(f"{node.module}.{name.name}")
        for name in re.findall(r"(?<![\w.])postcopy((?:\.\w+)+)", re.sub(r"(?m)^ *(?:from|import) .*$", "", code)):
            found: object = import_module("postcopy")
            for part in name[1:].split("."):
                found = getattr(found, part, None) or import_module(f"postcopy.{part}")


def test_pictures() -> None:
    """They are what is drawn today, and know every state that `status` shows."""
    pictures = runpy.run_path(str(ROOT / "docs/site/pictures.py"))
    for name, draw in pictures["DRAWN"].items():
        assert (ROOT / f"docs/pictures/{name}.svg").read_text() == draw(), f"run python docs/site/pictures.py: {name}"
    assert set(pictures["BOXES"]) == set(import_module("postcopy.service.metrics").STATUSES)
