# SPDX-License-Identifier: Apache-2.0
"""Whom ``--user`` means; what becoming that user does is in tests/integration/test_privileges.py."""

from __future__ import annotations

import grp
import os
import pwd
import threading

import pytest

from postcopy.errors import ConfigurationError
from postcopy.service.privileges import User, become, find_user

ACCOUNT = next(account for account in pwd.getpwall() if account.pw_uid != 0)
GROUP = next(group for group in grp.getgrall() if group.gr_gid not in (0, ACCOUNT.pw_gid))


def free_number() -> int:
    taken = {account.pw_uid for account in pwd.getpwall()}
    return next(number for number in range(60000, 2**31) if number not in taken)


@pytest.mark.parametrize("name", [ACCOUNT.pw_name, str(ACCOUNT.pw_uid)])
def test_account_with_its_groups(name: str) -> None:
    groups = os.getgrouplist(ACCOUNT.pw_name, ACCOUNT.pw_gid)
    assert find_user(name) == User(name, ACCOUNT.pw_uid, ACCOUNT.pw_gid, tuple(sorted(set(groups))))


@pytest.mark.parametrize("group", [GROUP.gr_name, str(GROUP.gr_gid)])
def test_named_group_is_the_only_one(group: str) -> None:
    user = find_user(f"{ACCOUNT.pw_name}:{group}")
    assert (user.uid, user.gid, user.groups) == (ACCOUNT.pw_uid, GROUP.gr_gid, (GROUP.gr_gid,))


def test_numbers_without_accounts() -> None:
    number = free_number()
    assert find_user(f"{number}:{number}") == User(f"{number}:{number}", number, number, (number,))
    with pytest.raises(ConfigurationError, match=f"write {number}:GROUP"):
        find_user(str(number))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "write NAME"),
        (":", "write NAME"),
        ("nobody:", "write NAME"),
        ("no such", "no user 'no such'"),
        (f"{ACCOUNT.pw_name}:no such", "no group 'no such'"),
        ("-1:1", "no user '-1'"),
        (f"{2**32 - 1}:1", "no user"),  # which setresuid(2) takes for "leave it"
        (f"1:{2**32 - 1}", "no group"),
        ("²:1", "no user"),
        ("0", "that is root"),
        ("root:1", "that is root"),
    ],
)
def test_refused(text: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        find_user(text)


@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user is refused before")
def test_not_with_other_threads() -> None:
    """Their capabilities would stay."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        with pytest.raises(RuntimeError, match="threads"):
            become(find_user(f"{ACCOUNT.pw_name}:{GROUP.gr_name}"))
    finally:
        done.set()
        thread.join()
    assert os.geteuid() == 0
