# SPDX-License-Identifier: Apache-2.0
"""The reference, made of the program itself: the command line of its parsers, the C API of the public headers.
Each function returns Markdown (MyST), which takes the place of
``<!-- generated: NAME ARGUMENTS -->`` in a page."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import postcopy
from postcopy.cli._parser import Parser, make_parser

ROOT = Path(__file__).parents[2]


def version() -> str:
    return postcopy.__version__


def _rst(text: str) -> str:
    """reStructuredText within a Markdown page."""
    return f"````{{eval-rst}}\n{text.rstrip()}\n````\n"


def _escaped(text: str) -> str:
    """Plain text; what stands between backticks is code."""
    parts = re.split(r"(?<!\w)`([^`\n]+)`(?!\w)", text)
    escaped = [re.sub(r"([*`_|\\])", r"\\\1", part) for part in parts]
    escaped[1::2] = [f"\\ ``{part}``\\ " for part in parts[1::2]]
    return "".join(escaped)


def _indented(text: str) -> str:
    return textwrap.indent(text, "   ")


# ---- The command line


def command_line() -> str:
    """Every command, and every request or command that one is divided into."""
    parts = []
    for command in make_parser(None).subcommands.values():
        parts += [_command(command, "##"), *(_command(each, "###", command) for each in command.subcommands.values())]
    return "\n".join(parts)


def _command(parser: Parser, level: str, above: Parser | None = None) -> str:
    words = " ".join(parser.short_usage().split())
    usage = textwrap.fill(words, 88, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    parts = [f"{level} {parser.prog}\n", f"{parser.description}\n", f"```text\n{usage}\n```\n"]
    listed = [f".. program:: {parser.prog}\n"]
    for title, arguments in parser.sections(above):
        if title:
            listed.append(f"**{_escaped(title.capitalize())}**\n")
        for each in arguments:
            if "--help" not in each.names:
                names = ", ".join(f"{name} {each.value}".strip() for name in each.names) or each.value
                listed.append(f".. option:: {names}\n\n{_indented(_escaped(each.help))}\n")
    if len(listed) > 1:
        parts.append(_rst("\n".join(listed)))
    if parser.examples:
        shown = "\n\n".join(f"# {what}\n" * bool(what) + line for what, line in parser.examples)
        parts.append(f"**Examples**\n\n```sh\n{shown}\n```\n")
    return "\n".join(parts)


# ---- The C API

_FUNCTION = re.compile(r"^[A-Za-z_][^;{}]*?\b(pc_\w+)\s*\([^{}]*\)\s*;$", re.DOTALL)
_TYPE = re.compile(r"^(struct|enum) (\w+)")


def _comment(text: str) -> str:
    lines = text.removeprefix("/*").removesuffix("*/").strip().splitlines()
    return "\n".join(re.sub(r"^\s*\* ?", "", line).rstrip() for line in lines)


def _prose(text: str) -> str:
    """A comment as text: names of the API are links, lines that are indented stay lines."""
    if re.search("^ ", text, re.MULTILINE):
        text = "\n".join(f"| {line}" for line in text.splitlines())
    return re.sub(r"\bpc(?:\\_\w+?)+\b(?!\\_)", lambda name: f":c:expr:`{name[0]}`".replace("\\", ""), _escaped(text))


def c_header(name: str) -> str:
    """A public header: what it says of itself, then each declaration with the comment above it."""
    text = (ROOT / "csrc/include/postcopy" / f"{name}.h").read_text()
    about = _comment(text[: text.index("*/") + 2]).partition("\n")[2].strip()
    body = text[text.index("\n", text.index("begin cffi")) + 1 : text.rindex("\n", 0, text.index("end cffi"))]
    parts = [_rst(_prose(about)), "```c\n#include <postcopy/" + name + ".h>\n```\n"]
    for kind, declarations, comment in _declarations(body):
        if kind == "section":
            parts.append(f"### {comment}\n")
        elif kind == "function":
            first, *others = [re.sub(r"\s+", " ", declaration).removesuffix(";") for declaration in declarations]
            signature = "\n".join([f".. c:function:: {first}", *(f"                {other}" for other in others)])
            parts.append(_rst(f"{signature}\n\n{_indented(_prose(comment))}"))
        else:
            said = f"{_prose(comment)}\n\n" if comment else ""
            code = textwrap.dedent("\n".join(declarations))
            listing = f"{said}.. code-block:: c\n\n{_indented(code)}\n"
            # (a struct and a function may have one name, which Sphinx takes for the same thing)
            if (found := _TYPE.match(code)) and not re.search(rf"\b{found[2]}\(", body):
                listing = f".. c:{found[1]}:: {found[2]}\n\n{_indented(listing)}"
            parts.append(_rst(listing))
    return "\n".join(parts)


def _declarations(body: str) -> Iterator[tuple[str, list[str], str]]:
    """Kind, declarations and the comment that stands above them; neighbours of one kind under one comment together."""
    kind, gathered, comment = "", list[str](), ""
    for chunk in _chunks(body):
        if chunk.startswith("/*"):
            if kind:
                yield kind, gathered, comment
            kind, gathered, comment = "", [], _comment(chunk)
            if section := re.fullmatch(r"-{3,} (.+?) -{3,}", comment):
                yield "section", [], section[1].capitalize()
                comment = ""
            continue
        code = re.sub(r"/\*.*?\*/", "", chunk, flags=re.DOTALL).strip()
        found = _TYPE.match(code)
        new = "function" if _FUNCTION.match(code) else found[1] if found and "{" in code else "other"
        said = ""
        if new == "function" and (behind := re.search(r"/\*.*?\*/\s*$", chunk, re.DOTALL)):
            said = _comment(behind[0].strip())
        if kind and (new != kind or new in ("struct", "enum") or said):
            yield kind, gathered, comment
            gathered, comment = [], ""
        if said:
            yield new, [code], f"{comment}\n\n{said}".strip()
            kind, gathered, comment = "", [], ""
        else:
            kind = new
            gathered.append(code if new == "function" else chunk.strip("\n"))
    if kind:
        yield kind, gathered, comment


def _chunks(body: str) -> Iterator[str]:
    """Comments that stand by themselves, and declarations with the comments within and behind them."""
    lines = iter(body.splitlines())
    for line in lines:
        if not line.strip():
            continue
        chunk = line
        alone = line.lstrip().startswith("/*")

        def unfinished(text: str, alone: bool = alone) -> bool:
            if text.count("/*") > text.count("*/"):
                return True
            code = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
            return (
                not alone
                and not code.startswith("#")
                and (code.count("{") > code.count("}") or not code.rstrip().endswith((";", "}")))
            )

        while unfinished(chunk):
            chunk += "\n" + next(lines)
        yield chunk.strip() if alone else chunk


# ---- Python


def module(name: str, *options: str) -> str:
    """What a module says of itself, and with `members` what it exports; an option may have a value, as `NAME=A,B`."""
    flags = "".join(f"   :{name}: {value}\n" for name, _, value in (option.partition("=") for option in options))
    return _rst(f".. automodule:: {name}\n{flags}")


PARTS: dict[str, Callable[..., str]] = {
    "command-line": command_line,
    "c-header": c_header,
    "module": module,
}
