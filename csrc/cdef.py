# SPDX-License-Identifier: Apache-2.0
"""Derives the Python extension from postcopy.h, so that what Python sees cannot drift from what C offers.

    cdef.py cdef --header postcopy.h                                      print the declarations, as CFFI gets them
    cdef.py glue --header postcopy.h --library libX.a --output _native.c  write the C source of postcopy._native
    cdef.py check _native.abi3.so                                         fail when a symbol of ours is undefined

The build runs the last two (csrc/CMakeLists.txt); the tests import the functions.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

BEGIN = "==== begin cffi ===="
END = "==== end cffi ===="
_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
_DEFINE = re.compile(r"^#define[ \t]+(\w+)[ \t]+(\S.*?)[ \t]*$", re.MULTILINE)
_NUMBER = re.compile(r"-?(?:0x[0-9a-fA-F]+|[0-9]+)")
_PROTOTYPE = re.compile(r"\b(pc_\w+)\s*\([^{};]*\)\s*;")
_ENUM = re.compile(r"\benum\s+\w*\s*\{([^}]*)\}")
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


def functions(cdef: str) -> list[str]:
    """Names of the functions that a cdef declares, in order."""
    return [match[1] for match in _PROTOTYPE.finditer(cdef)]


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


def without(cdef: str, missing: set[str]) -> str:
    """The cdef less the prototypes of some functions."""
    for name in missing:
        cdef = re.sub(rf"^[A-Za-z_][^;{{}}#()]*\b{name}\s*\([^;{{}}]*\)\s*;", "", cdef, flags=re.MULTILINE)
    return cdef


def symbols(nm: str, path: Path, *options: str) -> set[str]:
    """Names of our symbols (pc_*) that `nm` prints for a library under the given options."""
    out = subprocess.run([nm, "--format=posix", *options, str(path)], check=True, capture_output=True, text=True).stdout
    names = (line.split(" ", 1)[0] for line in out.splitlines())
    return {name for name in names if _OUR_SYMBOL.fullmatch(name)}


def write_glue(header: Path, library: Path, nm: str, output: Path, *, allow_missing: bool) -> list[str]:
    """Writes the extension's C source; returns the functions that no C file defines (and fails, unless allowed)."""
    import cffi

    cdef = extract(header.read_text(encoding="utf-8"))
    defined = symbols(nm, library, "--defined-only")
    missing = [name for name in functions(cdef) if name not in defined]
    if missing and not allow_missing:
        raise HeaderError("declared in postcopy.h, defined in no C file: " + ", ".join(missing))
    ffi = cffi.FFI()
    ffi.cdef(without(cdef, set(missing)))
    ffi.set_source("postcopy._native", '#include "postcopy.h"\n', py_limited_api=True)
    ffi.emit_c_code(str(output))
    return missing


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("cdef", help="print the declarations")
    command.add_argument("--header", type=Path, required=True)
    command = commands.add_parser("glue", help="write the extension's C source")
    command.add_argument("--header", type=Path, required=True)
    command.add_argument("--library", type=Path, required=True, help="the static library that must define everything")
    command.add_argument("--output", type=Path, required=True)
    command.add_argument("--nm", default="nm")
    command.add_argument("--allow-missing", action="store_true", help="leave undefined functions out instead of failing")
    command = commands.add_parser("check", help="fail when a symbol of ours is undefined in the built extension")
    command.add_argument("module", type=Path)
    command.add_argument("--nm", default="nm")
    args = parser.parse_args(argv)
    try:
        if args.command == "cdef":
            sys.stdout.write(extract(args.header.read_text(encoding="utf-8")))
        elif args.command == "glue":
            missing = write_glue(args.header, args.library, args.nm, args.output, allow_missing=args.allow_missing)
            if missing:
                print(f"left out of postcopy._native, no C file defines them: {', '.join(missing)}", file=sys.stderr)
        elif undefined := symbols(args.nm, args.module, "--undefined-only", "--dynamic"):
            raise HeaderError(f"{args.module.name}: undefined: {', '.join(sorted(undefined))}")
    except (HeaderError, OSError, subprocess.CalledProcessError) as error:
        print(f"cdef.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
