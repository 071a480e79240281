# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import subprocess
from typing import Any

import pytest

from postcopy._child import python
from postcopy.errors import CoreError, ResourceError
from postcopy.uffd import How, UffdApi, UffdFeature, _probe, explain_unavailable, parse_how, probe


def answer(monkeypatch: pytest.MonkeyPatch, results: dict[int, int], how: int = 0, features: int = 0) -> None:
    """Replaces the core: result by way, and what it says on success."""

    class Lib:
        @staticmethod
        def pc_uffd_probe(wanted: int, api: Any) -> int:
            api.how, api.features, api.ioctls = how, features, 7
            return results[wanted]

    monkeypatch.setattr(_probe, "lib", Lib)
    # Not that of this host, whose owner and mode a remedy would follow.
    monkeypatch.setattr(_probe, "_DEVICE", "/nonexistent/userfaultfd")


def test_the_real_thing_answers_or_explains() -> None:
    problem = explain_unavailable(kernel_faults=False)
    if problem is None:
        api = probe()
        assert api.how is not How.ANY
        assert api.ioctls
    else:
        assert problem.remedy


def test_unknown_bits_of_a_newer_kernel_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, {0: 0}, how=1, features=1 << 40 | 1 << 14)
    api = probe("any")
    assert api == UffdApi(How.DEVICE, UffdFeature(1 << 40 | 1 << 14), 7)
    assert UffdFeature.POISON in api.features
    assert UffdFeature.MOVE not in api.features


def test_user_mode_only_is_not_enough_for_kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, {0: 0}, how=3)
    assert explain_unavailable(kernel_faults=False) is None
    problem = explain_unavailable()
    assert problem is not None
    assert "KVM" in str(problem)
    assert "--device /nonexistent/userfaultfd" in problem.remedy
    assert "vm.unprivileged_userfaultfd" in problem.remedy


def test_a_device_that_this_user_may_not_open_is_named_with_its_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, {0: -errno.EPERM})
    monkeypatch.setattr(_probe, "_DEVICE", "/dev/null")
    problem = explain_unavailable()
    assert problem is not None
    assert "as KVM raises them: /dev/null" in str(problem)
    assert problem.remedy


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSYS, "CONFIG_USERFAULTFD"),
        (errno.ENOENT, "CONFIG_USERFAULTFD"),
        (errno.EPERM, "CAP_SYS_PTRACE"),
        (errno.EACCES, "--device /nonexistent/userfaultfd"),
        (errno.EMFILE, "ulimit -n "),
        (errno.ENFILE, "fs.file-max"),
    ],
)
def test_each_refusal_has_a_remedy(monkeypatch: pytest.MonkeyPatch, number: int, words: str) -> None:
    answer(monkeypatch, {0: -number})
    problem = explain_unavailable()
    assert isinstance(problem, ResourceError)
    assert words in problem.remedy
    assert "\n" not in str(problem)


def test_a_missing_device_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, {1: -errno.ENOENT})
    with pytest.raises(ResourceError, match=r"does not exist.*--device"):
        probe(How.DEVICE)


def test_a_refused_system_call_does_not_blame_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, {2: -errno.EPERM, 3: -errno.EPERM})
    monkeypatch.setattr(_probe, "_DEVICE", "/dev/null")  # it is there, and this user may open it
    with pytest.raises(ResourceError, match="CAP_SYS_PTRACE") as caught:
        probe(How.SYSCALL)
    assert "/dev/null is" not in str(caught.value)
    # Needs no right, so that only a filter of system calls can have refused it.
    with pytest.raises(ResourceError, match=r"seccomp filter.*seccomp=\S*seccomp-userfaultfd.json"):
        probe(How.USER_ONLY)


def test_what_nobody_expects_stays_an_error_of_the_core(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, {0: -errno.EIO})
    with pytest.raises(CoreError):
        probe()


def test_parse_how() -> None:
    assert [parse_how(word) for word in ("any", "device", "syscall", "user-only", How.DEVICE)] == [0, 1, 2, 3, 1]
    with pytest.raises(ValueError, match="unknown way"):
        parse_how("magic")


def test_it_is_usable_without_the_engine() -> None:
    program = "import sys, postcopy.uffd; print(*(name for name in sys.modules if name.startswith('postcopy.')))"
    result = subprocess.run(python("-c", program), capture_output=True, text=True, check=True)
    above = {name.split(".")[1] for name in result.stdout.split()} - {"_native", "_trio", "errors", "uffd"}
    assert not above
