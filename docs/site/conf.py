# SPDX-License-Identifier: Apache-2.0
"""The documentation as a site: `make docs` writes it into build/site, and takes a warning for an error.

The pages are the Markdown files of the repository, where they are, so that a forge shows the same pages and the same
relative links lead somewhere in both. Two things are added when the site is built, in the place of HTML comments that a
forge does not show: the contents at the side, made of the tables in docs/README.md, and the reference, made of the
program (`generate.py`).
"""

from __future__ import annotations

import re
import sys
from enum import Enum
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

import generate  # noqa: E402  (beside this file)

project = "postcopy"
copyright = "the postcopy authors, Apache-2.0"
version = release = generate.version()
language = "en"

root_doc = "docs/README"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "docs/**.md"]
exclude_patterns = ["build", ".venv"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
myst_heading_anchors = 4
myst_enable_extensions = ["attrs_inline"]
smartquotes = False  # options begin with two dashes
default_role = "py:obj"  # `name` in a docstring: a link where there is such a thing, else code
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
toc_object_entries = False
copybutton_prompt_text = r"(?:host-[ab])?\$ "
copybutton_prompt_is_regexp = True
copybutton_only_copy_prompt_lines = True

html_theme = "furo"
html_title = f"postcopy {version}"
html_static_path = ["static"]
html_css_files = ["postcopy.css"]
html_copy_source = False
html_show_sphinx = False
html_additional_pages = {"index": "start.html"}
templates_path = ["templates"]


def contents(index: str) -> str:
    """The tree of pages: a section of docs/README.md is a part, each first link of a row of its table a page of it."""
    trees = []
    for title, table in re.findall(r"^## (.+)\n((?:(?!^## ).*\n?)*)", index, re.MULTILINE):
        pages = re.findall(r"^\| \[[^]]+\]\(([\w./-]+)\.md\)", table, re.MULTILINE)
        if pages:
            entries = "\n".join(page.replace("../", "/") for page in pages)
            trees.append(f"```{{toctree}}\n:hidden:\n:maxdepth: 1\n:caption: {title}\n\n{entries}\n```\n")
    return "\n".join(trees)


def complete(_app: Sphinx, page: str, source: list[str]) -> None:
    """What the page has on the site and not in the file."""
    if page == root_doc:
        source[0] += "\n" + contents(source[0])
    here = (ROOT / page).parent
    # A directory is something on a forge only: here a link to one is its text.
    source[0] = re.sub(
        r"\[([^]]+)\]\(([^)#:]+)\)",
        lambda link: link[1] if (here / link[2]).is_dir() else link[0],
        source[0],
    )
    source[0] = re.sub(
        r"^<!-- generated: ([a-z-]+)(?: (.+?))? -->$",
        lambda found: generate.PARTS[found[1]](*(found[2] or "").split()),
        source[0],
        flags=re.MULTILINE,
    )


def made_anew(_app: Sphinx, env: BuildEnvironment, *_: object) -> list[str]:
    """Pages that change with the program, whose files may be the same."""
    return [page for page in env.found_docs if page.startswith("docs/reference/")]


def members(_app: Sphinx, _what: str, name: str, member: object, _skip: bool, _options: object) -> bool | None:
    """Of `postcopy.errors` what a caller may get; its helpers are for this package."""
    raised = isinstance(member, type) and issubclass(member, BaseException)
    helper = getattr(member, "__module__", "") == "postcopy.errors" and not raised
    inherited = name in ("with_traceback", "add_note") or name.startswith("_")
    return True if helper or inherited else None


def signature(
    _app: Sphinx, what: str, _name: str, found: object, _options: object, arguments: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    """Empty for a class that its users do not make by calling it."""
    if what == "class" and isinstance(found, type):
        made = (found.__doc__ or "").startswith("Made by") or getattr(found, "_is_protocol", False)
        if made or issubclass(found, Enum) or "'" in (arguments or ""):
            return "", ""
    return arguments, returned


def setup(app: Sphinx) -> None:
    app.connect("autodoc-skip-member", members)
    app.connect("autodoc-process-signature", signature)
    app.connect("env-get-outdated", made_anew)
    app.connect("source-read", complete)
