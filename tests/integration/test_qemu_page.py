# SPDX-License-Identifier: Apache-2.0
"""docs/qemu.md, typed as a new user would."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from typed_page import Shell, typed


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    shell = Shell(tmp_path)
    yield shell
    shell.leave()


@pytest.mark.needs("qemu", "uffd")
def test_page_as_a_new_user_types_it(shell: Shell) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for line in typed("qemu.md"):
        line = line.replace(":7777", f":{port}")
        if line.startswith("postcopy dest"):  # a reader has looked into the log before
            shell.until("passes of the guest", lambda: len(shell.lines("first.log")) >= 2)
        shell.type(line)
        if line.startswith("postcopy dest"):
            shell.until("listening", lambda: "listening on" in shell.said())
    shell.until("passes of the guest that has moved", lambda: len(shell.lines("second.log")) >= 2)
    first, second = shell.lines("first.log"), shell.lines("second.log")
    numbers = [int(line.split("=")[1].split()[0]) for line in (*first, *second)]
    assert numbers == sorted(numbers)
    assert {line.split()[-1] for line in (*first, *second)} == {"errors=0"}
    assert "it runs on as process" in shell.said()
