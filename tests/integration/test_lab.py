# SPDX-License-Identifier: Apache-2.0
"""The laboratory for real: hosts that reach each other, cables that are cut, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from lines import parse_line, parse_report

from postcopy.errors import ConfigurationError, ResourceError
from postcopy.testbed import _linux
from postcopy.testbed.lab._lab import Lab, down, open_lab
from postcopy.testbed.lab._plan import LabPlan

pytestmark = pytest.mark.needs("netns")
POSTCOPY = (sys.executable, "-m", "postcopy")
DEADLINE_S = 100.0  # of what takes seconds, on a host that others use

# One program for both families: it answers everything, by UDP and by TCP.
ANSWER = """
import socket, sys, threading
udp, tcp = (socket.socket(socket.AF_INET6, kind) for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM))
for each in (udp, tcp):
    each.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    each.bind(("::", 7))
tcp.listen()
def sink():
    while True:
        stream = tcp.accept()[0]
        count = 0
        while data := stream.recv(1 << 16):
            count += len(data)
        stream.sendall(str(count).encode())
        stream.close()
threading.Thread(target=sink, daemon=True).start()
print("ready", flush=True)
while True:
    data, peer = udp.recvfrom(65536)
    udp.sendto(data, peer)
"""
# Exit status 0 with the first answer; 1 when so many questions had none.
ASK = """
import socket, sys
host, port, tries, size = sys.argv[1], 7, int(sys.argv[2]), int(sys.argv[3])
family = socket.AF_INET6 if ":" in host else socket.AF_INET
with socket.socket(family, socket.SOCK_DGRAM) as udp:
    udp.settimeout(0.1)
    for number in range(tries):
        try:
            udp.sendto(bytes(size), (host, port))
            udp.recv(65536)
            sys.exit(0)
        except OSError:
            pass
    sys.exit(1)
"""
# Seconds that so many bytes take, with the answer of who has counted them.
SEND = """
import socket, sys, time
host, size = sys.argv[1], int(sys.argv[2])
began = time.monotonic()
with socket.create_connection((host, sys.argv[3]), timeout=50) as stream:
    stream.sendall(bytes(size))
    stream.shutdown(socket.SHUT_WR)
    assert int(stream.recv(100)) == size
print(time.monotonic() - began)
"""
MANY, FEW = 100, 5


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Records in a place of this test's own; afterwards nothing is left of it anywhere."""
    monkeypatch.setenv("POSTCOPY_LAB_DIR", str(tmp_path))
    monkeypatch.setenv("PYTHONWARNINGS", "error")  # also in the processes that use pyroute2
    before = socket.if_nameindex()
    yield tmp_path
    deadline = time.monotonic() + DEADLINE_S
    while (left := processes(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.01)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert left == []
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix in (".json", ".new")) == []
    assert socket.if_nameindex() == before  # the machine's own network has not been touched


def processes(directory: Path) -> list[int]:
    """All that this test has started, directly or not: they have its directory in their environment."""
    found = []
    wanted = f"POSTCOPY_LAB_DIR={directory}".encode()
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and wanted in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                found.append(int(name))
    return [pid for pid in found if pid != os.getpid() and _linux.start_time(pid) is not None]


def run(*command: str | os.PathLike[str], check: int | None = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert "Traceback" not in done.stderr, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    if check is not None:
        assert done.returncode == check, done.stderr
    return done


def postcopy(*arguments: str, check: int | None = 0) -> subprocess.CompletedProcess[str]:
    return run(*POSTCOPY, *arguments, check=check)


def ask(lab: Lab, source: str, address: str, tries: int = MANY, size: int = 64) -> bool:
    return (
        run(*lab.host(source).command(sys.executable, "-c", ASK, address, str(tries), str(size)), check=None).returncode
        == 0
    )


def send(lab: Lab, source: str, address: str, size: int, port: str = "7") -> float:
    return float(run(*lab.host(source).command(sys.executable, "-c", SEND, address, str(size), port)).stdout)


@contextlib.contextmanager
def answering(lab: Lab, name: str) -> Iterator[None]:
    command = lab.host(name).command(sys.executable, "-c", ANSWER)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield
        finally:
            process.kill()


def await_sleep(process: subprocess.Popen[bytes]) -> None:
    """Until `lab exec` has become the command."""
    while Path(f"/proc/{process.pid}/comm").read_text() != "sleep\n":
        assert process.poll() is None
        time.sleep(0.005)


# --- up, exec, link, down


def test_by_hand() -> None:
    """As the documentation has it."""
    postcopy("lab", "up", "--hosts", "3", "--mtu", "9000", "--rate", "1gbit")
    seen = parse_report(postcopy("lab", "status", "--json").stdout)["labs"]
    assert [(one["name"], one["state"], one["mtu"], list(one["hosts"])) for one in seen] == [
        ("lab", "up", 9000, ["h1", "h2", "h3"])
    ]
    assert {host["rate"] for host in seen[0]["hosts"].values()} == {"1gbit"}
    done = postcopy("lab", "exec", "h2", "--", "ip", "-json", "address", "show", "br0")
    addresses = [entry["local"] for entry in json.loads(done.stdout)[0]["addr_info"] if entry["scope"] == "global"]
    assert addresses == [
        address for address in (seen[0]["hosts"]["h2"]["ipv4"], seen[0]["hosts"]["h2"]["ipv6"]) if address
    ]
    done = postcopy("lab", "exec", "h1", "--", "sh", "-c", "echo out; echo err >&2; exit 7", check=7)
    assert (done.stdout, done.stderr) == ("out\n", "err\n")
    assert "not found" in postcopy("lab", "exec", "h1", "--", "sh", "-c", "no-such-command", check=127).stderr
    assert "cannot run no-such-command" in postcopy("lab", "exec", "h1", "--", "no-such-command", check=127).stderr
    assert "has no host 'h9'; it has h1, h2, h3" in postcopy("lab", "exec", "h9", "--", "true", check=2).stderr
    assert "is up already" in postcopy("lab", "up", check=2).stderr
    postcopy("lab", "link", "h3", "cut")
    assert "h3  10.77.0.3" in postcopy("lab", "status").stdout
    assert postcopy("lab", "status").stdout.count("cable cut") == 1
    postcopy("lab", "down")
    assert postcopy("lab", "status").stdout == "no laboratory is up\n"
    assert "was not up" in postcopy("lab", "down").stderr


@pytest.mark.needs("user-netns")
def test_in_a_user_namespace() -> None:
    """All commands of one laboratory from one `unshare`; then one is left up by it, and ended from outside."""
    lab = f"{sys.executable} -m postcopy lab"
    script = f"""set -e
        {lab} up --rate 100mbit >/dev/null
        {lab} exec h2 -- ip link add more type bridge
        {lab} link h1 cut
        {lab} link h2 rate 10mbit
        {lab} status --json
        """
    seen = parse_report(run("unshare", "-Urnm", "sh", "-c", script + f"{lab} down").stdout)["labs"][0]
    assert seen["user-namespace"] == "the caller's"
    assert [host["cable"] for host in seen["hosts"].values()] == ["cut", "whole"]
    assert [host["rate"] for host in seen["hosts"].values()] == ["100mbit", "10mbit"]
    run("unshare", "-Urnm", "sh", "-c", script)
    postcopy("lab", "down", "--all")


@pytest.mark.needs("tls")
@pytest.mark.parametrize("prefix", [(), ("unshare", "-Urnm")], ids=["root", "unshare"])
def test_hosts_know_each_other_by_name(prefix: tuple[str, ...], require: Callable[..., None]) -> None:
    """As a user types it: `ping h2` and `--connect h2:7777` in h1, and a prompt that says h1."""
    if prefix:
        require("user-netns")
    before = Path("/etc/hosts").read_bytes(), socket.gethostname()
    postcopy_ = f"{sys.executable} -m postcopy"
    script = f"""set -e
        trap '{postcopy_} lab down' EXIT
        {postcopy_} lab up >/dev/null
        {postcopy_} lab exec h1 -- sh -c 'hostname; getent ahosts h2; cat /etc/hosts'
        {postcopy_} lab exec h2 -- hostname
        {postcopy_} lab exec h1 -- {sys.executable} -c "$ANSWER" >/dev/null &
        {postcopy_} lab exec h2 -- {sys.executable} -c "$ASK" h1 {MANY} 64
        {postcopy_} tls new-ca ca && for host in h1 h2; do {postcopy_} tls issue ca --host $host --out $host.tls; done
        {postcopy_} lab exec h2 -- {postcopy_} dest --listen :7777 --tls h2.tls --run-for 0 --json >dest.out &
        until grep -q listening dest.out; do sleep 0.05; done
        {postcopy_} lab exec h1 -- {postcopy_} source --machine rv64 --memory 16MiB --connect h2:7777 --tls h1.tls
        wait $!
        cat dest.out
        """
    done = run(
        "env", "-C", os.environ["POSTCOPY_LAB_DIR"], f"ANSWER={ANSWER}", f"ASK={ASK}", *prefix, "sh", "-c", script
    )
    lines = done.stdout.splitlines()
    assert lines[0] == "h1"
    assert any(line.startswith("10.77.0.2 ") for line in lines)
    assert "10.77.0.1 h1" in lines
    assert "h2" in lines
    assert "127.0.0.1 localhost" in lines
    assert '"status":"completed"' in lines[-1].replace(" ", "")
    assert (Path("/etc/hosts").read_bytes(), socket.gethostname()) == before
    assert os.environ["POSTCOPY_LAB_DIR"] not in Path("/proc/self/mountinfo").read_text()


def test_a_command_has_its_signals() -> None:
    with (
        Lab.up(LabPlan("signals"), keep=False) as lab,
        subprocess.Popen(lab.host("h1").command("sleep", "1000")) as process,
    ):
        await_sleep(process)
        process.terminate()
        assert process.wait(DEADLINE_S) == -signal.SIGTERM


def test_cut_and_heal() -> None:
    with Lab.up(LabPlan("cable", hosts=3), keep=False) as lab:
        h1, h2, _ = lab.hosts.values()
        with answering(lab, "h2"):
            for address in filter(None, (h2.ipv4, h2.ipv6)):
                assert ask(lab, "h1", address)
            h2.cut()
            assert {name: host.cable for name, host in lab.status().hosts.items()} == {
                "h1": "whole",
                "h2": "cut",
                "h3": "whole",
            }
            for address in filter(None, (h2.ipv4, h2.ipv6)):
                assert not ask(lab, "h1", address, FEW)
            h2.heal()
            for address in filter(None, (h2.ipv4, h2.ipv6)):  # the addresses have outlived it
                assert ask(lab, "h1", address)
            h1.cut()
            assert not ask(lab, "h1", h2.ipv4, FEW)
            assert ask(lab, "h3", h2.ipv4)  # one cable is one cable


def test_rate() -> None:
    """No faster than it may be: 1 MB/s, but for a burst. How fast it is without a limit, the machine decides."""
    with Lab.up(LabPlan("rate", rate=1_000_000), keep=False) as lab:
        h1, h2 = lab.hosts.values()
        with answering(lab, "h2"):
            assert send(lab, "h1", h2.ipv4, 1_500_000) > 1.4
            h1.limit(500_000)
            assert send(lab, "h1", h2.ipv4, 750_000) > 1.4
            for host in (h1, h2):
                host.limit(None)
            assert [host.rate for host in lab.status().hosts.values()] == ["off", "off"]
            assert "tbf" not in run(*h1.command("ip", "link", "show")).stdout
            assert send(lab, "h1", h2.ipv4, 750_000) > 0


def test_rate_by_htb() -> None:
    """What takes the place of tbf where the kernel has none."""
    with Lab.up(LabPlan("htb"), keep=False) as lab, answering(lab, "h2"):
        h1, h2 = lab.hosts.values()
        if not lab.work(["has-qdisc", h1.network, "htb"])[0]:
            pytest.skip("this kernel has no htb")
        assert lab.work(["shape", h1.network, "eth0", 1_000_000, 0, lab.mtu, ["htb"]]) == ["htb"]
        assert send(lab, "h1", h2.ipv4, 1_500_000) > 1.4


def test_mtu() -> None:
    with Lab.up(LabPlan("mtu", mtu=9000), keep=False) as lab:
        h2 = lab.host("h2")
        with answering(lab, "h2"):
            assert ask(lab, "h1", h2.ipv4, size=8900)
        for name in ("br0", "eth0"):
            seen = json.loads(run(*h2.command("ip", "-json", "link", "show", name)).stdout)
            assert seen[0]["mtu"] == 9000


def test_delay_or_why_not() -> None:
    with Lab.up(LabPlan("delay"), keep=False) as lab:
        h1, h2 = lab.hosts.values()
        if lab.has_netem():
            h1.delay(20_000)
            with answering(lab, "h2"):
                assert send(lab, "h1", h2.ipv4, 1) >= 0.08  # there and back twice, each with one cable's delay
            h1.delay(0)
        else:
            with pytest.raises(ResourceError, match=r"no netem .*`postcopy lab link --name delay h1 delay 20ms --to "):
                h1.delay(20_000)
        assert lab.status().hosts["h1"].delay_us == 0


def test_a_delayed_connection() -> None:
    """By a proxy that outlives the command which has started it, and goes with the laboratory."""
    with Lab.up(LabPlan("proxy"), keep=False) as lab, answering(lab, "h2"):
        arguments = ("lab", "link", "--name", "proxy", "h1", "delay", "40ms", "--to", f"{lab.host('h2').ipv4}:7")
        host, _, port = postcopy(*arguments).stdout.strip().partition(":")
        assert send(lab, "h1", host, 100_000, port) >= 0.08  # what was sent, and the answer to it
        assert send(lab, "h1", lab.host("h2").ipv4, 100_000) > 0
        assert "is not an address" in postcopy(*arguments[:-1], "nowhere", check=1).stderr


@pytest.mark.skipif(not os.path.exists("/dev/net/tun"), reason="no /dev/net/tun: modprobe tun")
def test_a_tap_is_a_port_of_its_host() -> None:
    with Lab.up(LabPlan("tap", mtu=1400), keep=False) as lab:
        h1 = lab.host("h1")

        def link_of(name: str) -> dict[str, Any]:
            return dict(json.loads(run(*h1.command("ip", "-json", "-details", "link", "show", name)).stdout)[0])

        address = link_of("br0")["address"]
        for _ in range(2):  # as often as one likes
            h1.attach_tap("guest0")
        tap = link_of("guest0")
        assert (tap["master"], tap["mtu"], tap["linkinfo"]["info_kind"]) == ("br0", 1400, "tun")
        assert "UP" in tap["flags"]
        assert link_of("br0")["address"] == address  # whatever is on it
        h1.set_tap("guest0", up=False)
        assert "UP" not in link_of("guest0")["flags"]
        h1.remove_tap("guest0")
        with pytest.raises(ResourceError, match="there is no guest0"):
            h1.set_tap("guest0", up=True)
        for name in ("", "a b", "a/b", "x" * 16):
            with pytest.raises(ConfigurationError, match="is no name for an interface"):
                h1.attach_tap(name)


async def test_trio_keeps_running() -> None:
    async with open_lab(LabPlan("trio")) as lab:
        with trio.CancelScope() as scope:
            scope.cancel()
            with pytest.raises(trio.Cancelled):
                await trio.lowlevel.checkpoint()
        assert await trio.to_thread.run_sync(lab.has_netem) in (True, False)
    with pytest.raises(ConfigurationError, match="is not up"):
        Lab.find("trio")


# --- what is left behind: nothing


def test_down_ends_what_runs_in_it() -> None:
    lab = Lab.up(LabPlan("busy"))
    with subprocess.Popen(lab.host("h1").command("sleep", "1000")) as process:
        await_sleep(process)
        lab.down()
        assert process.wait(DEADLINE_S) == -signal.SIGTERM


def test_a_killed_holder(directory: Path) -> None:
    """The kernel takes the namespaces; what still runs in one, and the record, go with the next up or down."""
    for clean in ("up", "down"):
        lab = Lab.up(LabPlan("killed"))
        with subprocess.Popen(lab.host("h1").command("sleep", "1000")) as process:
            await_sleep(process)
            os.kill(lab.pid, signal.SIGKILL)
            while _linux.start_time(lab.pid) is not None:
                time.sleep(0.005)
            assert "a crash has left its record" in postcopy("lab", "status").stdout
            assert "is not up" in postcopy("lab", "exec", "--name", "killed", "h1", "--", "true", check=2).stderr
            with pytest.raises(ConfigurationError, match="is not up any more"):
                lab.host("h2").cut()
            postcopy("lab", clean, "--name", "killed")
            assert process.wait(DEADLINE_S) < 0
        down("killed")


def _hold(name: str) -> None:
    lab = Lab.up(LabPlan(name), keep=False)
    with subprocess.Popen(lab.host("h1").command("sleep", "1000")) as process:
        await_sleep(process)
        print("up", flush=True)
        process.wait()


def test_a_killed_owner(spawn_child: Callable[..., Any], directory: Path) -> None:
    """A laboratory that belongs to a process ends with it, and so does what runs there; see `directory` above."""
    owner = spawn_child(_hold, "owned")
    while "up" not in owner.output():
        assert owner.process.poll() is None, owner.errors()
        time.sleep(0.005)
    assert len(processes(directory)) >= 4  # it, its holder, its worker, the sleeper
    owner.send_signal(signal.SIGKILL)
    owner.process.wait(DEADLINE_S)


@pytest.mark.parametrize("moment", ["holder", "worker", "record"])
def test_up_that_is_killed_half_way(directory: Path, moment: str) -> None:
    def reached() -> bool:
        if moment == "record":
            return (directory / "half.json").exists()
        commands = [Path(f"/proc/{pid}/cmdline") for pid in processes(directory)]
        wanted = {"holder": b"postcopy.testbed.lab._holder", "worker": b"postcopy.testbed.lab._netlink"}[moment]
        with contextlib.suppress(OSError):
            return any(wanted in path.read_bytes() for path in commands)
        return False

    with subprocess.Popen([*POSTCOPY, "lab", "up", "--name", "half"], stdout=subprocess.DEVNULL) as process:
        while not reached():
            assert process.poll() is None
        process.kill()
    if (directory / "half.json").exists():
        # It had all been there; the holder may be about to end all the same, which it then does alone.
        assert postcopy("lab", "exec", "--name", "half", "h1", "--", "true", check=None).returncode in (0, 2)
        postcopy("lab", "down", "--name", "half")
    # Else it goes by itself: see `directory` above.


# --- the demo


def shown(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    result = parse_line(done.stdout.splitlines()[-1])
    assert result["event"] == "result"
    assert result["status"] == "completed"
    assert result["verified"] is True
    assert result["recoveries"]["count"] > 0
    assert all(item["ok"] for item in result["verification"])
    assert [one["let-in"] for one in result["demo-tls"]["strangers"]] == [False, False]
    assert 0 < result["lab"]["cut"]["noticed-ms"] <= result["lab"]["cut"]["healed-ms"]
    return result


@pytest.mark.needs("tls")
@pytest.mark.needs("uffd-user")
@pytest.mark.parametrize("prefix", [(), ("unshare", "-Urnm")], ids=["root", "unshare"])
def test_demo(prefix: tuple[str, ...], require: Callable[..., None]) -> None:
    if not prefix:
        require("uffd", "kvm")
    machine = () if not prefix else ("--machine", "rv64")
    arguments = ("demo", "--lab", "--json", "--memory", "32MiB", "--migrate-after", "0.1", "--run-for", "0.1")
    result = shown(run(*prefix, *POSTCOPY, *arguments, "--max-bandwidth", "8MiB/s", *machine, check=None))
    assert [host["name"] for host in result["lab"]["hosts"].values()] == ["h1", "h2"]


@pytest.mark.needs("tls")
@pytest.mark.needs("uffd-user")
def test_demo_of_an_image_over_a_slow_network() -> None:
    """The proxy is in the source's host, for a kernel without netem."""
    arguments = ("--machine", "image", "--memory", "32MiB", "--chaos", "slow", "--seed", "1")
    result = shown(run(*POSTCOPY, "demo", "--lab", "--json", *arguments, check=None))
    assert result["chaos"]["connections"] > 0


@pytest.mark.needs("uffd-user")
def test_a_demo_that_is_killed(side: Callable[..., Any]) -> None:
    demo = side("demo", "--lab", "--json", "--machine", "rv64", "--memory", "32MiB")
    demo.wait_status("postcopy-paused")  # the cable is out
    demo.signal(signal.SIGKILL)
    assert demo.end()[0] == -signal.SIGKILL


@pytest.mark.needs("uffd-user")
def test_a_demo_that_cannot_be_cut() -> None:
    done = run(*POSTCOPY, "demo", "--lab", "--chaos", "cut", "--machine", "rv64", check=2)
    assert "--lab cuts the cable itself" in done.stderr
