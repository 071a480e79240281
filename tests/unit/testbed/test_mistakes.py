# SPDX-License-Identifier: Apache-2.0
"""What a user of the testbed's commands mistypes: one line that says what was meant, and exit status 2."""

from __future__ import annotations

import pytest

from postcopy.cli import main


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("faultpaths --mode mising", "there is no 'mising'; did you mean missing?"),
        ("faultpaths --backing memdf", "there is no 'memdf'; did you mean memfd"),
        ("faultpaths --measure lock", "there is no 'lock'; did you mean locks?"),
        ("faultpaths --only pin.odirect_raed", "did you mean pin.odirect_read?"),
        ("faultpaths --only tape", "the groups are user, copy,"),
        ("faultpaths --remote ct", "no plan begins with 'ct'; did you mean cut?"),
        ("faultpaths compere a b", "compere"),
        ("bench falt", "unknown figure 'falt'; did you mean fault?"),
        ("bench warp", "unknown figure 'warp'; there are fault, "),
        ("bench --rounds 0", "--rounds: a whole number from 1 to 1000, not '0'"),
        ("bench migrate --policies demand,hybird", "'hybird'; did you mean hybrid?"),
        ("bench migrate --workloads zip", "did you mean zipf?"),
        ("bench migrate --memory 64", "'64' has no unit"),
        ("probe --require kwm", "there is no 'kwm'; did you mean kvm?"),
        ("chaos frezee --listen :1 --to a:1", "did you mean freeze?"),
        ("chaos cut:evry=1 --listen :1 --to a:1", "did you mean every?"),
        ("chaos cut:every=x --listen :1 --to a:1", "every: seconds, as 2.5 or 200ms, not 'x'"),
        ("chaos cut", "--listen"),
        ("lab upp", "did you mean up?"),
        ("lab up --host 3", "did you mean --hosts?"),
        ("lab up --rate 100", "'100' has no unit"),
        ("lab up --name No", "'No' is no name for a laboratory"),
        ("lab exec h1", "postcopy lab exec HOST -- COMMAND..."),
        ("lab link h1 cutt", "cut, heal, rate or delay, not 'cutt'; did you mean cut?"),
        ("lab link h1 rate", "link rate takes a value"),
        ("lab link h1 delay 5", "'5' has no unit; write 5ms or 5s"),
    ],
)
def test_a_mistake_is_named(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert said in printed.err
    assert printed.err.startswith("postcopy: error: ")
    assert len(printed.err.splitlines()) == 1
