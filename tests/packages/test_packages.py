# SPDX-License-Identifier: Apache-2.0
"""What is in the source distribution and in the wheel, and that the wheel needs no more than it says."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VERSION = importlib.metadata.version("postcopy")
PAGES = {"share/man/man1/postcopy.1", "share/bash-completion/completions/postcopy"}
PAGES |= {"share/zsh/site-functions/_postcopy", "share/fish/vendor_completions.d/postcopy.fish"}
SHARED = {
    f"share/postcopy/{path.name}" for name in ("systemd", "prometheus") for path in (ROOT / "examples" / name).iterdir()
}
SHARED |= {"share/postcopy/seccomp-userfaultfd.json"}
if platform.machine() == "x86_64":
    SHARED |= {f"share/postcopy/{vmm}-guest.elf" for vmm in ("firecracker", "qemu")} | {"share/postcopy/linux-guest"}


def test_the_source_distribution_has_every_file(sdist: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this is not a git checkout: which files there should be is not known")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    wanted = {name for name in listed if not name.startswith(".ci/")}
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert wanted <= names
    assert {f"build/{page}" for page in PAGES} <= names
    assert {name for name in names - wanted if not name.startswith("build/share/")} == {"PKG-INFO"}


def test_the_wheel_has_the_package_and_what_is_shared(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    info, data = f"postcopy-{VERSION}.dist-info", f"postcopy-{VERSION}.data/data"
    assert {"postcopy/_native.abi3.so", "postcopy/_native.pyi", "postcopy/py.typed"} <= names
    libraries = {"postcopy/_native.abi3.so", "postcopy/libpostcopy-preload.so"}
    assert {file for file in names if file.endswith((".so", ".a"))} == libraries
    with zipfile.ZipFile(wheel) as archive:
        keeper = archive.getinfo("postcopy/postcopy-keeper")
        assert archive.read(keeper)[:4] == b"\x7fELF"
        assert keeper.external_attr >> 16 & 0o111 == 0o111  # pip makes it executable then
    assert {file.partition("/")[0] for file in names} == {"postcopy", info, f"postcopy-{VERSION}.data"}
    assert f"{info}/licenses/LICENSE" in names
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "postcopy").rglob("*.py")}
    assert modules == {file for file in names if file.endswith(".py")}
    shared = {file.removeprefix(f"{data}/") for file in names if file.startswith(data)}
    assert shared >= SHARED | PAGES
    assert all(re.match(r"share/(postcopy|man/man\d|bash-completion|zsh|fish)/", file) for file in shared)


def test_the_wheel_is_for_every_python_from_3_11_on_and_for_old_systems(wheel: Path, tmp_path: Path) -> None:
    name, version, python, abi, tags = wheel.stem.split("-")
    assert (name, version, python, abi) == ("postcopy", VERSION, "cp311", "abi3")
    # From auditwheel, which looks at the extension's symbols of the C library; abi3audit looks at Python's.
    glibc = re.search(rf"manylinux_2_(\d+)_{os.uname().machine}", tags)
    assert glibc is not None
    if platform.freedesktop_os_release().get("VERSION_CODENAME") == "bookworm":
        assert int(glibc[1]) <= 34  # Ubuntu 22.04, RHEL 9, Debian 12

    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    # -S keeps out the editable install's own import hook, -I everything else that is not named here.
    script = (
        "import sys; sys.path[:0] = sys.argv[1:]; import postcopy._native as n; "
        "print(n.__file__, n.ffi.string(n.lib.pc_version()).decode())"
    )
    site = Path(pytest.__file__).resolve().parent.parent
    run = [sys.executable, "-I", "-S", "-c", script, str(tmp_path / "site"), str(site)]
    out = subprocess.run(run, check=True, capture_output=True, text=True, cwd="/", timeout=60).stdout
    assert out.split() == [str(tmp_path / "site" / "postcopy" / "_native.abi3.so"), VERSION]
