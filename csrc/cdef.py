# SPDX-License-Identifier: Apache-2.0
"""Derives the Python extension from postcopy.h, so that what Python sees cannot drift from what C offers.

postcopy.h is the list of the headers: their declarations are taken in the order in which it includes them.

    cdef.py cdef --header postcopy.h                                      print the declarations, as CFFI gets them
    cdef.py glue --header postcopy.h --library libX.a ... --output _native.c  write the C source of postcopy._native
    cdef.py check _native.abi3.so                                         fail when a symbol of ours is undefined
    cdef.py stub --header postcopy.h --output _native.pyi                 write the types that a type checker reads
    cdef.py stub --header postcopy.h --check _native.pyi                  fail when that file is not up to date

The build runs glue and check (csrc/CMakeLists.txt), `make stub` and `make lint` run stub; tests import the functions.
"""

from __future__ import annotations

import argparse
import keyword
import re
import subprocess
import sys
from pathlib import Path

BEGIN = "==== begin cffi ===="
END = "==== end cffi ===="
_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
_DEFINE = re.compile(r"^#define[ \t]+(\w+)[ \t]+(\S.*?)[ \t]*$", re.MULTILINE)
_INCLUDE = re.compile(r'^#include "(.+)"$', re.MULTILINE)
_NUMBER = re.compile(r"-?(?:0x[0-9a-fA-F]+|[0-9]+)")
_PROTOTYPE = re.compile(
    r"^(?P<result>[A-Za-z_][^;{}#()]*?)\b(?P<name>pc_\w+)\s*\((?P<parameters>[^{};]*)\)\s*;", re.MULTILINE
)
_COUNTERS = re.compile(r"^struct (pc_page\w+_stats) \{([^}]*)\};", re.MULTILINE)
_ENUM = re.compile(r"\benum\s+\w*\s*\{([^}]*)\}")
STUB_LINE_LENGTH = 120
_OUR_SYMBOL = re.compile(r"pc_[a-z]\w*")


class HeaderError(Exception):
    """The header cannot be turned into a cdef; the message says where."""


def extract(header: str) -> str:
    """The text between the cffi markers, without comments: plain declarations and ``#define NAME number``."""
    if header.count(BEGIN) != 1 or header.count(END) != 1:
        raise HeaderError(f"expected exactly one '{BEGIN}' and one '{END}'")
    # Cut at whole lines: the markers stand in comments of their own.
    start = header.index("\n", header.index(BEGIN)) + 1
    stop = header.rindex("\n", 0, header.index(END)) + 1
    text = _COMMENT.sub(" ", header[start:stop])
    for line in text.splitlines():
        if not line.lstrip().startswith("#"):
            continue
        define = _DEFINE.fullmatch(line)
        if define is None or _NUMBER.fullmatch(define[2]) is None:
            raise HeaderError(f"only '#define NAME number' can stand between the markers, not: {line.strip()}")
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip()) + "\n"


def declarations(header: Path) -> str:
    """What a header declares: between its own markers or, where it has none, in the headers that it includes."""
    text = header.read_text(encoding="utf-8")
    included = [] if BEGIN in text else _INCLUDE.findall(text)
    if not included:
        return extract(text)
    return "".join(extract((header.parent / name).read_text(encoding="utf-8")) for name in included)


def functions(cdef: str) -> list[str]:
    """Names of the functions that a cdef declares, in order."""
    return [match["name"] for match in _PROTOTYPE.finditer(cdef)]


def constants(cdef: str) -> dict[str, int]:
    """Names and values of the #defines and enumerators of a cdef."""
    found = {match[1]: int(match[2], 0) for match in _DEFINE.finditer(cdef)}
    for enum in _ENUM.finditer(cdef):
        following = 0
        for item in filter(None, (part.strip() for part in enum[1].split(","))):
            name, _, value = (part.strip() for part in item.partition("="))
            following = int(value, 0) if value else following
            found[name] = following
            following += 1
    return found


# What CFFI gives, as far as this package uses it. The stubs that exist for CFFI know neither the fields of a struct nor
# that string() of a char pointer is bytes, so every use of them would need a cast.
_STUB_HEAD = """\
# SPDX-License-Identifier: Apache-2.0
# Written by `make stub` from csrc/include/postcopy/*.h, which say what everything means; not to be edited.
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from typing_extensions import Buffer

class CData:
    def __getattr__(self, name: str, /) -> Any: ...
    def __setattr__(self, name: str, value: Any, /) -> None: ...
    def __getitem__(self, index: int | slice, /) -> Any: ...
    def __setitem__(self, index: int | slice, value: Any, /) -> None: ...
    def __add__(self, items: int, /) -> CData: ...
    def __sub__(self, items: int, /) -> CData: ...
    def __iter__(self) -> Iterator[Any]: ...
    def __len__(self) -> int: ...
    def __bool__(self) -> bool: ...
    def __int__(self) -> int: ...

class _Buffer(Buffer):
    def __getitem__(self, index: int | slice, /) -> bytes: ...
    def __setitem__(self, index: int | slice, value: bytes, /) -> None: ...
    def __len__(self) -> int: ...

class _CType:
    cname: str
    kind: str
    fields: Any

class _FFI:
    NULL: CData
    def new(self, cdecl: str, init: Any = ...) -> CData: ...
    def cast(self, cdecl: str, value: CData | int) -> CData: ...
    def addressof(self, cdata: CData, /, *fields_or_indexes: str | int) -> CData: ...
    def string(self, cdata: CData, maxlen: int = ...) -> bytes: ...
    def unpack(self, cdata: CData, length: int) -> Any: ...
    def buffer(self, cdata: CData, size: int = ...) -> _Buffer: ...
    def from_buffer(self, cdecl: str, python_buffer: Buffer, require_writable: bool = ...) -> CData: ...
    def memmove(self, dest: CData | Buffer, src: CData | Buffer, n: int) -> None: ...
    def gc(self, cdata: CData, destructor: Callable[[CData], Any], size: int = ...) -> CData: ...
    def sizeof(self, cdecl: str | CData) -> int: ...
    def typeof(self, cdecl: str | CData) -> _CType: ...

class _Lib:"""


def _python_type(c_type: str, *, parameter: bool) -> str:
    """The Python type of a parameter or result. Structs go by pointer only, as everywhere in the headers."""
    words = c_type.replace("*", " * ").split()
    if "*" in words:
        readable = words[0] == "const" and words[1] in {"char", "void", "uint8_t"} and words.count("*") == 1
        return "CData | bytes" if parameter and readable else "CData"
    return {"void": "None", "double": "float"}.get(words[-1], "int")


def _parameters(text: str) -> list[str]:
    if text.strip() == "void":
        return []
    found = []
    for parameter in text.split(","):
        match = re.fullmatch(r"\s*(.*?)(\w+)\s*", parameter, re.DOTALL)
        if match is None:
            raise HeaderError(f"not a parameter: {parameter.strip()}")
        name = match[2] + "_" if keyword.iskeyword(match[2]) else match[2]
        found.append(f"{name}: {_python_type(match[1], parameter=True)}")
    return [*found, "/"]


def stub(cdef: str) -> str:
    """The type stub of the extension module."""
    lines = [_STUB_HEAD]
    lines += [f"    {name}: int" for name in constants(cdef)]
    for match in _PROTOTYPE.finditer(cdef):
        parameters = ["self", *_parameters(match["parameters"])]
        result = _python_type(match["result"], parameter=False)
        line = f"    def {match['name']}({', '.join(parameters)}) -> {result}: ..."
        if len(line) > STUB_LINE_LENGTH:  # as `ruff format` would break it
            inner = f"        {', '.join(parameters)}"
            if len(inner) > STUB_LINE_LENGTH:
                inner = "\n".join(f"        {parameter}," for parameter in parameters)
            line = f"    def {match['name']}(\n{inner}\n    ) -> {result}: ..."
        lines.append(line)
    for name, members in _COUNTERS.findall(cdef):  # which postcopy/dataplane/counters.py makes
        lines += ["", "@dataclass(frozen=True)", f"class {name}:"]
        lines += [f"    {field}: int" for field in re.findall(r"(\w+)[,;]", members)]
    return "\n".join([*lines, "", "ffi: _FFI", "lib: _Lib", ""])


def symbols(nm: str, path: Path, *options: str) -> set[str]:
    """Names of our symbols (pc_*) that `nm` prints for a library under the given options."""
    out = subprocess.run([nm, "--format=posix", *options, str(path)], check=True, capture_output=True, text=True).stdout
    names = (line.split(" ", 1)[0] for line in out.splitlines())
    return {name for name in names if _OUR_SYMBOL.fullmatch(name)}


def unresolved(nm: str, module: Path) -> list[str]:
    """What a built extension lacks: undefined symbols, but for weak ones, those of the interpreter, and those of a
    shared library, which have a version. (``-Wl,--no-undefined`` would refuse the interpreter's too.) Where no symbol
    has one (musl, an `nm` before binutils 2.35) only ours can be told from those of the C library."""
    command = [nm, "--format=posix", "--dynamic", "--undefined-only", str(module)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    undefined = {line.split()[0] for line in lines if line.split()[1] not in "wv"}
    without = {name for name in undefined if "@" not in name}
    if without == undefined:
        return sorted(name for name in without if _OUR_SYMBOL.fullmatch(name))
    return sorted(name for name in without if not name.startswith(("Py", "_Py")))


def write_glue(header: Path, libraries: list[Path], nm: str, output: Path) -> None:
    """Writes the extension's C source, for which every function must be defined in one of the libraries."""
    import cffi

    cdef = declarations(header)
    defined = {name for library in libraries for name in symbols(nm, library, "--defined-only")}
    missing = [name for name in functions(cdef) if name not in defined]
    if missing:
        raise HeaderError("declared in postcopy.h, defined in no C file: " + ", ".join(missing))
    ffi = cffi.FFI()
    ffi.cdef(cdef)
    ffi.set_source("postcopy._native", '#include "postcopy.h"\n', py_limited_api=True)
    ffi.emit_c_code(str(output))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("cdef", help="print the declarations")
    command.add_argument("--header", type=Path, required=True)
    command = commands.add_parser("glue", help="write the extension's C source")
    command.add_argument("--header", type=Path, required=True)
    command.add_argument(
        "--library", type=Path, nargs="+", required=True, help="static libraries that must define everything"
    )
    command.add_argument("--output", type=Path, required=True)
    command.add_argument("--nm", default="nm")
    command = commands.add_parser("check", help="fail when the built extension needs a symbol that nothing has")
    command.add_argument("module", type=Path)
    command.add_argument("--nm", default="nm")
    command = commands.add_parser("stub", help="write or check the module's type stub")
    command.add_argument("--header", type=Path, required=True)
    where = command.add_mutually_exclusive_group(required=True)
    where.add_argument("--output", type=Path)
    where.add_argument("--check", type=Path)
    args = parser.parse_args(argv)
    try:
        if args.command == "cdef":
            sys.stdout.write(declarations(args.header))
        elif args.command == "glue":
            write_glue(args.header, args.library, args.nm, args.output)
        elif args.command == "stub":
            text = stub(declarations(args.header))
            if args.output:
                args.output.write_text(text, encoding="utf-8")
            elif args.check.read_text(encoding="utf-8") != text:
                raise HeaderError(f"{args.check} does not agree with {args.header}: run `make stub`")
        elif undefined := unresolved(args.nm, args.module):
            raise HeaderError(f"{args.module.name}: undefined: {', '.join(undefined)}")
    except (HeaderError, OSError, subprocess.CalledProcessError) as error:
        print(f"cdef.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
