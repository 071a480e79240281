# SPDX-License-Identifier: Apache-2.0
"""A laboratory that is up, and its hosts. Blocking calls, of any thread: most start a process and wait for it.

The parts: the *holder* (`_holder`) keeps the namespaces alive, the *record* (`_state`) names it, and a
*worker* (`_netlink`) talks to the kernel. This process itself never leaves its namespaces.

Error handling: an error while a laboratory is made ends its holder, and with it all that was made. A record whose
holder is gone was left by a crash: the next `up` or `down` of that name ends the processes that have its mark, and
removes it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import signal
import subprocess
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import trio

from postcopy._child import python
from postcopy.errors import ConfigurationError, PostcopyError, ResourceError
from postcopy.records import reports
from postcopy.testbed import _linux
from postcopy.testbed._processes import hang_up, read_json
from postcopy.testbed.lab import _members as members
from postcopy.testbed.lab import _state as state
from postcopy.testbed.lab._plan import DEFAULT_NAME, LabPlan, format_rate

Json = dict[str, Any]
START_S = 60.0
WORK_S = 60.0
HOLDER_END_S = members.TERM_S + members.KILL_S  # its input has ended: it ends what runs in the laboratory first
HOLDER = "postcopy-lab"  # begins the argument that says, in a list of processes, which laboratory it is


@dataclass(frozen=True)
class Host:
    """One host of a laboratory that is up."""

    lab: Lab
    name: str
    ipv4: str
    ipv6: str | None
    network: str
    """Its network namespace, as a file: ``nsenter --net=FILE``."""

    def command(self, *command: str) -> list[str]:
        """The command that runs a command here. It is the same process (execvp(3)): its status and its signals are
        the command's own."""
        return python("-m", "postcopy", "lab", "exec", "--name", self.lab.name, self.name, "--", *command)

    def enter(self) -> None:
        """Moves this process, which must have one thread, into the host's namespaces: between fork(2) and execve(2).

        There the host's name is its own, and /etc/hosts has the names of all, where this process may mount.
        """
        try:
            if self.lab.user is not None:
                _linux.enter_user(self.lab.user)
            _linux.enter_network(self.network)
            _linux.new_host_name(self.name)
        except OSError as error:
            raise self.lab.explain("entering a host", error.errno or 0, error.strerror or str(error)) from error
        with contextlib.suppress(OSError):  # AppArmor may forbid it in a container: then there are addresses
            _linux.new_hosts_file(self.lab.hosts_file(), str(state.directory()))

    def cut(self) -> None:
        """Pulls the cable out: the host's interface has no carrier, packets are lost, connections are not closed."""
        # At the switch's end: the host keeps its addresses and routes.
        self.lab.work(["set-link", self.lab.switch, self.name, False])

    def heal(self) -> None:
        """Puts the cable back, and waits until the host has a carrier."""
        self.lab.work(["set-link", self.lab.switch, self.name, True], ["wait-for-carrier", self.network])

    def limit(self, rate: int | None) -> None:
        """Limits the cable to so many bytes a second in each direction; None: no limit."""
        self.lab.change(self.name, rate=rate)

    def delay(self, delay_us: int) -> None:
        """Each packet takes so much longer one way, on this cable. `ResourceError` where the kernel has no netem."""
        if delay_us and not self.lab.has_netem():
            raise ResourceError(
                "this kernel has no netem (CONFIG_NET_SCH_NETEM), which would delay packets",
                "delay the connections to one address instead:"
                f" `postcopy lab link{_option(self.lab.name)} {self.name} delay {delay_us / 1000:g}ms --to HOST:PORT`",
            )
        self.lab.change(self.name, delay_us=delay_us)

    def delay_connections(self, delay_us: int, target: str) -> str:
        """The same for a kernel without netem: where to connect in this host, instead of to `target`.

        A proxy (`postcopy.testbed`) in this host, which lives as long as the laboratory. What goes through it takes so
        much longer one way; nothing else does.
        """
        plan = f"none:delay={delay_us / 1000:g}ms"
        arguments = ("chaos", plan, "--json", "--seed", "0", "--listen", "127.0.0.1:0", "--to", target)
        with subprocess.Popen(
            self.command(*python("-m", "postcopy", *arguments)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # it stays when this process's terminal goes
        ) as proxy:
            assert proxy.stdout is not None
            assert proxy.stderr is not None
            line = proxy.stdout.readline()
            if line:
                proxy.returncode = 0  # it is the laboratory's from here on: it is not waited for
                return str(json.loads(line)["address"])
            reason = proxy.stderr.read().decode("utf-8", "replace").strip().removeprefix("postcopy: error: ")
        raise ResourceError(f"the proxy in {self.name} did not start: {reason}")

    def attach_tap(self, name: str) -> None:
        """Makes the TAP `name` in this host, where it is not there yet, and joins it with the laboratory's network.

        A persistent one: it stays, up, when a program has opened it (``/dev/net/tun``, in this host: `enter`) and has
        closed it again; while no program has it open, its carrier is down. `remove_tap`, or the laboratory's end, ends
        it. A TAP that was made before, and is held open, is joined and taken up by this call too.
        """
        if not 0 < len(name.encode()) < 16 or "/" in name or name.split() != [name] or name in (".", "..", "all"):
            raise ConfigurationError(f"{name!r} is no name for an interface")
        self.lab.work(["attach-tap", self.network, name])

    def set_tap(self, name: str, up: bool) -> None:
        self.lab.work(["set-link", self.network, name, up])

    def remove_tap(self, name: str) -> None:
        self.lab.work(["remove-tap", self.network, name])


class Worker:
    """A process of `_netlink`. Threads take turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            python("-m", "postcopy.testbed.lab._netlink"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",
            start_new_session=True,  # Ctrl-C goes to the caller, which may still have something to put right
        )

    def ask(self, request: Json) -> Json:
        """`ResourceError` when no answer comes within `WORK_S`."""
        with self._lock:
            stdin = self._process.stdin
            assert stdin is not None
            with contextlib.suppress(BrokenPipeError):
                stdin.write(json.dumps(request).encode() + b"\n")
                stdin.flush()
            return read_json(self._process, "the process that sets up interfaces", WORK_S)

    def close(self) -> None:
        """Ends it. Harmless when it has ended."""
        hang_up(self._process, members.TERM_S)


class Lab(contextlib.AbstractContextManager["Lab"]):
    """A laboratory that is up. Made by `up` or found by `find`; as a context manager, `down` at its end."""

    def __init__(self, record: state.Record, holder: subprocess.Popen[bytes] | None = None) -> None:
        self._record = record
        self._holder = holder  # while it ends with this process
        self._worker = Worker() if holder is not None else None  # at hand, when a cable is to be cut now
        self.name, self.mark, self.pid, self.mtu = record.name, record.mark, record.pid, record.mtu
        self.user: str | None = f"/proc/{self.pid}/ns/user" if record.user else None
        """The user namespace in which the network ones are, as a file; None: the one that we are in."""
        self.switch = f"/proc/{self.pid}/fd/{record.switch}"
        self.hosts = {
            name: Host(self, name, host.ipv4, host.ipv6, f"/proc/{self.pid}/fd/{host.fd}")
            for name, host in record.hosts.items()
        }

    def hosts_file(self) -> str:
        """hosts(5) in each host."""
        lines = ["127.0.0.1 localhost", "::1 localhost"]
        for host in self.hosts.values():
            lines += [f"{address} {host.name}" for address in (host.ipv4, host.ipv6) if address]
        return "\n".join([*lines, ""])

    def host(self, name: str) -> Host:
        if name not in self.hosts:
            raise ConfigurationError(f"laboratory {self.name} has no host {name!r}; it has {', '.join(self.hosts)}")
        return self.hosts[name]

    # ---- beginning and end

    @classmethod
    def up(cls, plan: LabPlan, *, keep: bool = True) -> Lab:
        """Makes a laboratory. Without `keep` it ends with this process, however that ends; else with `down`.

        `ConfigurationError` when there is one of this name already, `ResourceError` when this host or user cannot.
        """
        with state.locked() as where:
            record = state.read(where, plan.name)
            if record is not None:
                if record.is_alive():
                    raise ConfigurationError(
                        f"laboratory {plan.name} is up already: end it with `postcopy lab down{_option(plan.name)}`, or"
                        " choose another --name"
                    )
                _clean(where, record)
            return cls._make(plan, where, keep)

    @classmethod
    def _make(cls, plan: LabPlan, where: Path, keep: bool) -> Lab:
        mark = f"{plan.name}:{secrets.token_hex(8)}"
        hosts = plan.host_plans
        # Without the right to make the others: a user namespace first, in which this user has it.
        user = not _linux.has_capabilities(_linux.CAP_NET_ADMIN, _linux.CAP_SYS_ADMIN)
        holder = subprocess.Popen(
            python(
                "-m",
                "postcopy.testbed.lab._holder",
                f"{HOLDER}:{mark}",
                str(len(hosts) + 1),
                "user" if user else "-",
                str(state.path_of(where, plan.name)),
            ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, members.MARK: mark},
            cwd="/",
            start_new_session=True,  # Ctrl-C goes to the maker, which then ends the laboratory in order
        )
        made: Lab | None = None
        try:
            assert holder.stdin is not None
            assert holder.stdout is not None
            answer = read_json(holder, "the process that holds the laboratory", START_S)
            if "error" in answer:
                raise _no_namespaces(answer["errno"], answer["error"], root=os.geteuid() == 0)
            switch, *fds = answer["fds"]
            ipv6 = _has_ipv6()
            record = state.Record(
                version=1,
                name=plan.name,
                mark=mark,
                pid=answer["pid"],
                started=_linux.start_time(answer["pid"]),
                pid_namespace=_linux.inode("/proc/self/ns/pid"),
                user=user,
                kept=keep,
                switch=switch,
                inodes=tuple(answer["inodes"]),
                mtu=plan.mtu,
                hosts={
                    host.name: state.HostRecord(fd, host.ipv4, host.ipv6 if ipv6 else None, plan.rate)
                    for host, fd in zip(hosts, fds, strict=True)
                },
            )
            lab = made = cls(record, None if keep else holder)
            actions: list[list[Any]] = [["make-switch", lab.switch, plan.mtu]]
            for host in hosts:
                there = lab.hosts[host.name]
                actions.append(
                    ["make-host", lab.switch, there.network, host.name, host.ipv4, there.ipv6, host.mac, plan.mtu]
                )
                if plan.rate is not None:
                    actions += lab._shaping(there, plan.rate, 0)
            actions += [["wait-for-carrier", host.network] for host in lab.hosts.values()]
            lab.work(*actions)
            state.write(where, record)
            if keep:
                holder.stdin.write(b"stay\n")
                holder.stdin.flush()
                read_json(holder, "the process that holds the laboratory", START_S)
                holder.stdin.close()
                holder.stdout.close()
                # It is not ours any more: it is not to be waited for here.
                holder.returncode = 0
        except BaseException:
            if made is not None and made._worker is not None:
                made._worker.close()
            hang_up(holder, HOLDER_END_S)
            state.remove(where, plan.name)
            raise
        return lab

    @classmethod
    def find(cls, name: str = DEFAULT_NAME) -> Lab:
        """The laboratory of this name; `ConfigurationError` when it is not up."""
        LabPlan(name)  # the name may become a path
        record = state.read(state.directory(), name)
        if record is None or not record.is_alive():
            left = " (a crash has left its record)" if record is not None else ""
            raise ConfigurationError(
                f"laboratory {name} is not up{left}: make it with `postcopy lab up{_option(name)}`"
            )
        return cls(record)

    def down(self) -> None:
        """Ends what runs in it, and it. Harmless when it has ended."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None
        if self._holder is not None:
            hang_up(self._holder, HOLDER_END_S)
            self._holder = None
        down(self.name, self.mark)

    def __exit__(self, *_: object) -> None:
        self.down()

    # ---- changes

    def work(self, *actions: list[Any]) -> list[Any]:
        """Lets a worker do these (`_netlink.VERBS`), in order; what each returned. The first that fails is raised."""
        request: Json = {"user": self.user, "actions": actions}
        if self._worker is not None:
            answer = self._worker.ask(request)
        else:
            with contextlib.closing(Worker()) as worker:
                answer = worker.ask(request)
        if "error" in answer:
            raise self.explain(answer["doing"], answer["errno"], answer["error"])
        results: list[Any] = answer["results"]
        return results

    def change(self, name: str, **what: int | None) -> None:
        """Shapes a host's cable anew (`rate`, `delay_us`), and records it."""
        with state.locked() as where:
            record = state.read(where, self.name)
            if record is None or record.mark != self.mark:
                raise ConfigurationError(f"laboratory {self.name} is not up any more")
            host = record.hosts[name] = msgspec.structs.replace(record.hosts[name], **what)
            self.work(*self._shaping(self.hosts[name], host.rate, host.delay_us))
            state.write(where, record)
            self._record = record

    def _shaping(self, host: Host, rate: int | None, delay_us: int) -> list[list[Any]]:
        # Both ends of the cable: what leaves the switch by this port, and what leaves the host.
        return [
            ["shape", self.switch, host.name, rate, delay_us, self.mtu],
            ["shape", host.network, "eth0", rate, delay_us, self.mtu],
        ]

    def rate_of(self, name: str) -> int | None:
        """Bytes a second, in each direction of a host's cable, as it was set last; None: no limit."""
        return self._record.hosts[name].rate

    def has_netem(self) -> bool:
        return bool(self.work(["has-qdisc", self.switch, "netem"])[0])

    def status(self) -> reports.Lab:
        """What there is, for people and `--json`."""
        whole, netem = self.work(["cables", self.switch], ["has-qdisc", self.switch, "netem"])
        record = state.read(state.directory(), self.name) or self._record
        return reports.Lab(
            name=self.name,
            state="up",
            holder=self.pid,
            kept=record.kept,
            user_namespace="own" if record.user else "the caller's",
            mtu=self.mtu,
            netem=netem,
            hosts={
                name: reports.LabHostStatus(
                    ipv4=host.ipv4,
                    ipv6=host.ipv6,
                    network_namespace=self.hosts[name].network,
                    cable="whole" if whole[name] else "cut",
                    rate=format_rate(host.rate),
                    rate_bytes_per_s=host.rate,
                    delay_us=host.delay_us,
                )
                for name, host in record.hosts.items()
            },
        )

    def explain(self, doing: str, number: int, text: str) -> PostcopyError:
        """An error of the kernel as one for people."""
        if not self._record.is_alive():
            return ConfigurationError(f"laboratory {self.name} is not up any more")
        what = f"laboratory {self.name}: {doing}: {text}"
        if number == errno.EOPNOTSUPP and doing in ("make-switch", "make-host"):
            return ResourceError(what, "a kernel with bridges and veth: as root, `modprobe -a bridge veth`")
        if number == errno.ENOENT and doing == "shape":
            return ResourceError(what, "a kernel with tbf or htb: as root, `modprobe sch_tbf`")
        if doing == "attach-tap" and number in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            return ResourceError(
                what, "there is no /dev/net/tun: as root, `modprobe tun`; in a container, --device /dev/net/tun"
            )
        if doing == "attach-tap" and number in (errno.EACCES, errno.EPERM):
            return ResourceError(what, "as root, `chmod 0666 /dev/net/tun`")
        if number in (errno.EPERM, errno.EACCES):
            return ResourceError(
                what, "it belongs to another user or user namespace: call `postcopy lab` from where it was made"
            )
        return ResourceError(what)


@contextlib.asynccontextmanager
async def open_lab(plan: LabPlan) -> AsyncIterator[Lab]:
    """A laboratory that lasts as long as the block, and ends with this process, however that ends.

    Its methods block: call them with `trio.to_thread.run_sync`. Making and ending it are shielded from cancellation;
    both take a second or less, and are bounded (`WORK_S`, `members.KILL_S`).
    """
    with trio.CancelScope(shield=True):
        lab = await trio.to_thread.run_sync(lambda: Lab.up(plan, keep=False))
    try:
        await trio.lowlevel.checkpoint()
        yield lab
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(lab.down)


def down(name: str = DEFAULT_NAME, mark: str | None = None) -> bool:
    """Ends a laboratory, or what a crash has left of it; whether there was one. With `mark`, only that very one."""
    LabPlan(name)
    with state.locked() as where:
        record = state.read(where, name)
        if record is None or (mark is not None and record.mark != mark):
            return False
        _clean(where, record)
    return True


def names() -> list[str]:
    """Of the laboratories that there are records of."""
    return state.names(state.directory())


def _clean(where: Path, record: state.Record) -> None:
    """Ends everything that is this record's, and removes it."""
    with contextlib.ExitStack() as stack:
        holder: int | None = None
        with contextlib.suppress(ProcessLookupError):
            holder = os.pidfd_open(record.pid)
            stack.callback(os.close, holder)
        alive = record.is_alive() and holder is not None  # asked after the descriptor was there: it is of this process
        # The inode numbers mean something only as long as the holder keeps the namespaces.
        members.end_processes(record.mark, record.inodes if alive else (), spare=[record.pid])
        if alive:
            assert holder is not None
            try:
                signal.pidfd_send_signal(holder, signal.SIGTERM)
                if not _linux.wait_for([holder], members.TERM_S):
                    signal.pidfd_send_signal(holder, signal.SIGKILL)
                    _linux.wait_for([holder], members.KILL_S)
            except PermissionError as error:
                raise ResourceError(
                    f"laboratory {record.name} belongs to another user: {error.strerror}", "end it as that user"
                ) from error
    state.remove(where, record.name)


def _has_ipv6() -> bool:
    try:  # a kernel without IPv6 has no such file
        with open("/proc/sys/net/ipv6/conf/default/disable_ipv6", encoding="ascii") as file:
            return file.read().strip() == "0"
    except OSError:
        return False


def _no_namespaces(number: int, text: str, *, root: bool) -> ResourceError:
    what = f"cannot make the namespaces of a laboratory: {text}"
    if number == errno.ENOSPC:
        return ResourceError(what, "as root, `sysctl -w user.max_net_namespaces=10000 user.max_user_namespaces=10000`")
    if number == errno.EINVAL:
        return ResourceError(what, "a kernel with CONFIG_NET_NS=y and CONFIG_USER_NS=y")
    if not root:
        return ResourceError(
            what,
            "run it as root, or let users make user namespaces: `sysctl -w user.max_user_namespaces=10000`, on Debian"
            " and Ubuntu also kernel.unprivileged_userns_clone=1 and kernel.apparmor_restrict_unprivileged_userns=0",
        )
    return ResourceError(
        what,
        "root needs CAP_SYS_ADMIN and CAP_NET_ADMIN (`docker run --cap-add SYS_ADMIN --cap-add NET_ADMIN`), or the"
        " right to make user namespaces",
    )


def _option(name: str) -> str:
    return "" if name == DEFAULT_NAME else f" --name {name}"
