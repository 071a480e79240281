# SPDX-License-Identifier: Apache-2.0
"""The health checks of docker/, as Docker runs them: a shell's command, in the container's environment."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

DOCKER = Path(__file__).parents[2] / "docker"
DEADLINE_S = 60.0
TMPFS = "/dev/shm/"  # in the container


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """As in the image; `tmp_path` stands for /dev/shm."""
    program = tmp_path / "bin" / "postcopy"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -P -m postcopy "$@"\n')
    program.chmod(0o755)
    return {"PATH": f"{program.parent}:/usr/bin:/bin", "XDG_RUNTIME_DIR": str(tmp_path)}


def healthy(command: str, environment: dict[str, str]) -> bool:
    return subprocess.run(["sh", "-c", command], env=environment, timeout=DEADLINE_S, check=False).returncode == 0


def await_health(command: str, environment: dict[str, str], child: Any) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not healthy(command, environment):
        assert child.process.poll() is None, child.errors()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def services(file: str, tmp_path: Path) -> dict[str, Any]:
    text = (DOCKER / file).read_text().replace(TMPFS, f"{tmp_path}/")
    return dict(yaml.safe_load(text)["services"])


@pytest.mark.needs("uffd-user")
@pytest.mark.parametrize("file", ["compose.yaml", "compose.nodevice.yaml"])
def test_a_destination_is_healthy_from_the_moment_that_it_listens(
    spawn_child: Callable[..., Any], environment: dict[str, str], tmp_path: Path, file: str
) -> None:
    service = services(file, tmp_path)["dest"]
    (kind, command) = service["healthcheck"]["test"]
    assert kind == "CMD-SHELL"
    assert not healthy(command, environment)
    options = dict(zip(service["command"][1:], service["command"][2:], strict=False))
    arguments = ["--control", options["--control"], "--listen", "127.0.0.1:0"]
    child = spawn_child([sys.executable, "-m", "postcopy", "dest", "--json", *arguments])
    await_health(command, environment, child)
    assert '"listening"' in child.output()
    child.kill()
    assert not healthy(command, environment)


@pytest.mark.parametrize("file", ["compose.yaml", "compose.nodevice.yaml"])
def test_a_source_waits_for_a_destination_that_is_healthy(tmp_path: Path, file: str) -> None:
    everything = services(file, tmp_path)
    for name in ("source", "observer"):
        assert everything[name]["depends_on"] == {"dest": {"condition": "service_healthy"}}
    (_, command) = everything["source"]["healthcheck"]["test"]
    assert everything["source"]["command"][-1] in command


def test_the_image_asks_a_daemon_and_nobody_else(
    spawn_child: Callable[..., Any], environment: dict[str, str], tmp_path: Path
) -> None:
    text = re.sub(r"\\\n\s*", "", (DOCKER / "Dockerfile").read_text())
    found = re.search(r"^HEALTHCHECK .*CMD (.*)$", text, re.MULTILINE)
    assert found is not None
    assert f"XDG_RUNTIME_DIR={TMPFS.rstrip('/')}" in text
    assert healthy(found[1], environment)  # there is no control socket
    variables = [f"{name}={value}" for name, value in environment.items()]
    socket = tmp_path / "postcopy" / "control.sock"
    socket.parent.mkdir(mode=0o700)
    command = ["postcopy", "daemon", "--listen", "127.0.0.1:0", "--control", str(socket)]  # root's default is another
    child = spawn_child(["env", *variables, *command])
    deadline = time.monotonic() + DEADLINE_S
    while not socket.is_socket():
        assert child.process.poll() is None, child.errors()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    await_health(found[1], environment, child)
    child.kill()
    assert not healthy(found[1], environment)  # its socket is there, and nobody answers
