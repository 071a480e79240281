# SPDX-License-Identifier: Apache-2.0
"""What decides which outcome is to be expected: the kernel's version and configuration, and what KVM is here."""

from __future__ import annotations

import contextlib
import gzip
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from postcopy.testbed._linux import cpu_virtualization
from postcopy.testbed.faultpaths._model import Json


def version_of(release: str) -> tuple[int, ...]:
    """The numbers that a release begins with: ``6.18.44-fc`` is (6, 18, 44). Empty when there are none."""
    match = re.match(r"\d+(?:\.\d+)*", release)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


@dataclass(frozen=True)
class System:
    """A kernel, as expectations see it."""

    release: str
    machine: str = ""
    build: str = ""
    kvm: str = "none"
    """``hardware``, ``emulated`` (a /dev/kvm on a processor that shows neither vmx nor svm) or ``none``."""
    config: Mapping[str, str] = field(default_factory=dict)
    """CONFIG_ names to y, m or a value; what is not set is not in it."""
    config_known: bool = False
    direct_dir: str = ""
    """Where files for O_DIRECT are made."""
    file_system: str = ""
    """Its type, as /proc/self/mountinfo names it; empty where that does not tell."""

    @property
    def version(self) -> tuple[int, ...]:
        return version_of(self.release)

    def option(self, name: str) -> str | None:
        """``y``, ``m``, ``n`` or a value; None where the kernel does not tell its configuration."""
        return self.config.get(name, "n") if self.config_known else None

    def as_json(self) -> Json:
        return {
            "kernel": self.release,
            "build": self.build,
            "architecture": self.machine,
            "kvm": self.kvm,
            "kernel-config": self.config_known,
            "user": os.geteuid(),
            "direct-dir": self.direct_dir,
            "direct-file-system": self.file_system,
        }


def this_system(direct_dir: str = "") -> System:
    """Reads files, tries nothing."""
    kvm = "none"
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        kvm = "emulated" if cpu_virtualization() is False else "hardware"
    text = _config_text(platform.release())
    return System(
        platform.release(),
        platform.machine(),
        platform.version(),
        kvm,
        parse_config(text or ""),
        text is not None,
        direct_dir,
        file_system_of(direct_dir),
    )


def parse_config(text: str) -> dict[str, str]:
    """The set options of a kernel's .config."""
    return {
        name: value.strip('"')
        for name, equals, value in (line.partition("=") for line in text.splitlines())
        if equals and name.startswith("CONFIG_")
    }


def _config_text(release: str) -> str | None:
    with contextlib.suppress(OSError, EOFError):
        return gzip.decompress(Path("/proc/config.gz").read_bytes()).decode(errors="replace")
    for path in (f"/boot/config-{release}", f"/lib/modules/{release}/config"):
        with contextlib.suppress(OSError):
            return Path(path).read_text(errors="replace")
    return None


def file_system_of(path: str) -> str:
    """The type of the file system that holds `path`, as /proc/self/mountinfo names it; empty when it does not tell."""
    real = os.path.realpath(path)
    best, kind = "", ""
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            fields, _, rest = line.partition(" - ")
            mount = fields.split()[4].replace("\\040", " ")
            inside = real == mount or real.startswith(mount.rstrip("/") + "/")
            if inside and len(mount) >= len(best):
                best, kind = mount, rest.split()[0]
    return kind
