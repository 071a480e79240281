# SPDX-License-Identifier: Apache-2.0
"""Fresh Debian systems without a compiler: what a user types to install the wheel there, and what works then.

No system reaches an index: pip on this host fetches, for the Python of each, what the wheel depends on.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import debian

pytestmark = [pytest.mark.slow, pytest.mark.timeout(550)]

PLATFORMS = ("manylinux_2_34", "manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014",
             "manylinux_2_12", "manylinux2010", "manylinux_2_5", "manylinux1")  # fmt: skip


def fetch_wheels(wheel: Path, release: str, into: Path) -> None:
    """The wheel, all that it depends on, and what pipx wants to begin with."""
    major, minor = debian.PYTHONS[release]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--only-binary",
        ":all:",
    ]
    command += ["--dest", str(into), "--implementation", "cp", "--python-version", f"{major}.{minor}"]
    command += [word for abi in (f"cp{major}{minor}", "abi3", "none") for word in ("--abi", abi)]
    command += [word for name in PLATFORMS for word in ("--platform", f"{name}_{os.uname().machine}")]
    subprocess.run([*command, str(wheel), "pip", "setuptools", "wheel"], check=True, timeout=120)


# PIP_COMPILE=0: byte code of what is used only, half of what an installation takes.
INDEX = "export PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheels PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_COMPILE=0; "
DEMO = "postcopy demo --machine rv64 --memory 16MiB"


LIBRARY = """
import threading
from postcopy import Memory, Userfaultfd
from postcopy.uffd import RegisterMode
with Memory.create("anon", 1 << 16) as memory, Userfaultfd.open("user-only") as uffd:
    uffd.register(memory.address, memory.size_bytes, RegisterMode.MISSING)
    reader = threading.Thread(target=lambda: print("read:", memory.read(0, 5)))
    reader.start()
    uffd.wait()
    for fault in uffd.read():
        uffd.place(fault.address & -memory.page_bytes, b"hello".ljust(memory.page_bytes))
    reader.join()
    uffd.unregister(memory.address, memory.size_bytes)
"""


@pytest.fixture(scope="class")
def system(
    request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[debian.Root]:
    """The release of Debian that the class names, with the wheels in /wheels."""
    release = request.cls.RELEASE
    try:
        with debian.system(release) as root:
            wheels = tmp_path_factory.mktemp("wheels")
            fetch_wheels(wheel, release, wheels)
            shutil.copytree(wheels, root.path / "wheels")
            (root.path / "wheels").chmod(0o755)
            assert not shutil.which("gcc", path=str(root.path / "usr/bin"))
            yield root
    except debian.Failed as error:
        if os.environ.get("POSTCOPY_INSTALL") == "1" and not isinstance(error, debian.NotFetched):
            raise
        pytest.skip(f"no Debian {release}: {error}")


class OnDebian:
    """A class for each release: `--dist loadscope` gives all of it to one worker, and the system is made once."""

    RELEASE: str

    def test_with_venv_as_a_user(self, system: debian.Root) -> None:
        system(f"{INDEX} python3 -m venv ~/postcopy && ~/postcopy/bin/pip install postcopy", user=True, timeout_s=120)
        said = system(f"PATH=~/postcopy/bin:$PATH; {DEMO} --tls", user=True)
        assert "nonce" in said
        assert "0 bytes in clear" in said
        assert "rv64" in system("~/postcopy/bin/python -m postcopy probe", user=True)
        assert "60-postcopy.rules" in system("ls ~/postcopy/share/postcopy ~/postcopy/share/man/man1", user=True)
        program = "from postcopy._files import share_file; print(share_file('60-postcopy.rules'))"
        rule = system(f'~/postcopy/bin/python -c "{program}"', user=True).strip()
        assert rule == "/home/user/postcopy/share/postcopy/60-postcopy.rules"
        program = "from postcopy._files import installed_program; print(installed_program('keeper'))"
        keeper = system(f'~/postcopy/bin/python -c "{program}"', user=True).strip()
        assert "started by `postcopy pager`" in system(f"{keeper} 2>&1 || true", user=True)

    def test_with_pipx_as_a_user(self, system: debian.Root) -> None:
        said = system(f"{INDEX} pipx install postcopy && ~/.local/bin/{DEMO}", user=True, timeout_s=180)
        assert "installed package postcopy" in said

    @pytest.mark.needs("kvm", "uffd", "root")
    def test_with_venv_as_root_and_kvm(self, system: debian.Root) -> None:
        system(f"{INDEX} python3 -m venv /opt/postcopy && /opt/postcopy/bin/pip install postcopy", timeout_s=120)
        said = system(
            "/opt/postcopy/bin/postcopy demo --machine kvm --memory 64MiB && /opt/postcopy/bin/postcopy probe"
        )
        assert "kvm" in said

    def test_the_library_alone_with_cffi_alone(self, system: debian.Root) -> None:
        (system.path / "home/user/library.py").write_text(LIBRARY)
        install = (
            "python3 -m venv ~/light && ~/light/bin/pip install --no-deps postcopy && ~/light/bin/pip install cffi"
        )
        system(f"{INDEX} {install}", user=True, timeout_s=120)
        assert system("~/light/bin/python library.py", user=True) == "read: b'hello'\n"
        packages = system("~/light/bin/pip list --format freeze", user=True)
        assert {line.partition("==")[0] for line in packages.split()} <= {
            "cffi",
            "pip",
            "postcopy",
            "pycparser",
            "setuptools",
        }
        with pytest.raises(debian.Failed, match="needs the Python package trio, which is not installed") as caught:
            system(f"~/light/bin/{DEMO}", user=True)
        assert "python -m pip install postcopy" in str(caught.value)
        assert "Traceback" not in str(caught.value)


class TestBookworm(OnDebian):
    RELEASE = "bookworm"


class TestTrixie(OnDebian):
    RELEASE = "trixie"


def test_every_release_has_its_class() -> None:
    assert {one.RELEASE for one in OnDebian.__subclasses__()} == set(debian.PYTHONS)
