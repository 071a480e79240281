# SPDX-License-Identifier: Apache-2.0
"""Where a machine's network device is attached to this host: a TAP, a port of a bridge or of the host itself.

The link is switched by the TAP's carrier, the state of the cable: the holder of the descriptor may do that, also
without the rights that it was opened with (`TUNSETCARRIER`, Linux 5.0). A bridge takes a port without carrier out of
forwarding, and forgets what it had learned there, though it may notice a second late. So a machine that leaves also
takes the interface down, where the rights are there to do it; a bridge notices that at once. The interface is set up
when the TAP is opened, which needs CAP_NET_ADMIN unless it is up already.

Everything here is a few system calls that take microseconds, and nothing blocks. This module is only imported when a
machine has a network device. Sources: the kernel's Documentation/networking/tuntap.rst; RFC 5227 for announcements;
RFC 3927 for the default addresses.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import ipaddress
import os
import re
import socket
import struct

import trio

from postcopy._fd import FdHolder
from postcopy._native import lib
from postcopy.errors import BusyError, ConfigurationError, ResourceError

DEVICE = "/dev/net/tun"
# _IOW: its direction bits are others on these.
_WRITE = 0x80000000 if os.uname().machine.startswith(("ppc", "mips", "sparc", "alpha")) else 0x40000000
_TUNSETIFF = _WRITE | 0x0454CA
_TUNSETCARRIER = _WRITE | 0x0454E2
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000
_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914
_IFF_UP = 1
_IFREQ = struct.Struct("16sH22x")
_MAX_FRAME_BYTES = 65536
_MAX_QUEUED = 100_000  # frames; more than any queue has, so that draining one ends
_SCHEME = "tap:"


def parse_net(text: str) -> str:
    """The TAP's name in what a user says as ``--net``. `ConfigurationError` when it is none."""
    name = text.removeprefix(_SCHEME)
    if name == text:
        raise ConfigurationError(f"{text!r} is not a network device; write tap:NAME, as tap:tap0")
    if not re.fullmatch(r"[!-~]{1,15}", name) or "/" in name or "%" in name or name in (".", ".."):
        raise ConfigurationError(f"{name!r} cannot be the name of a network interface")
    return name


def parse_mac(text: str) -> int:
    """``52:54:00:12:34:56`` as a number, its first octet the highest. `ConfigurationError`."""
    if not re.fullmatch(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}", text):
        raise ConfigurationError(f"{text!r} is not a MAC address; write it as 52:54:00:12:34:56")
    mac = int(text.replace(":", ""), 16)
    if mac == 0 or mac >> 40 & 1:
        raise ConfigurationError(
            f"{text} is not the MAC address of one station: the lowest bit of its first octet is 1"
        )
    return mac


def parse_ipv4(text: str) -> int:
    """``192.0.2.7`` as a number. `ConfigurationError` when a machine cannot have that address."""
    try:
        address = ipaddress.IPv4Address(text)
    except ValueError:
        raise ConfigurationError(f"{text!r} is not an IPv4 address") from None
    if address.is_multicast or address.is_loopback or address.is_reserved or int(address) >> 24 == 0:
        raise ConfigurationError(f"{text} is not an address that a machine can have")
    return int(address)


def format_mac(mac: int) -> str:
    return ":".join(f"{octet:02x}" for octet in mac.to_bytes(6, "big"))


def format_ipv4(address: int) -> str:
    return str(ipaddress.IPv4Address(address))


def default_mac(seed: int) -> int:
    """A locally administered one; the same seed has the same."""
    return 0x02_50_43 << 24 | (seed * 0x9E3779B97F4A7C15 & (1 << 64) - 1) >> 40


def default_ipv4(seed: int) -> int:
    """A link-local one, 169.254.1.0 to 169.254.254.255."""
    scattered = (seed * 0x9E3779B97F4A7C15 & (1 << 64) - 1) >> 32
    return 0xA9FE0100 + scattered % (254 * 256)


def _open_device() -> int:
    """A new descriptor of `DEVICE`, or the one that was opened before rights were given up; -errno."""
    return int(lib.pc_device_open(lib.PC_DEVICE_TUN))


ANNOUNCE_AFTER_S = (0.002, 0.01, 0.05, 0.2, 0.5, 1.0)
"""Pauses between the announcements that follow the first one: each may be lost, and a bridge takes a moment to begin
forwarding from a port that has come up."""


class Network:
    """A machine's network device as its host sees it: an open TAP, which no one else has open, and the machine's
    addresses. Closing it ends the link, and the interface as well when it was made by opening it. Used from the Trio
    thread."""

    def __init__(self, name: str, fd: int, mac: int, address: int) -> None:
        """Takes over the descriptor."""
        self.name = name
        self.mac = mac
        self.address = address
        self._fd = FdHolder(fd)
        self._claims = 0  # a number for each claim, so that an old one notices that it is over

    @classmethod
    def open(cls, net: str, mac: int, address: int) -> Network:
        """Opens the TAP that ``--net`` names in this thread's network namespace, and makes it when there is none; sets
        it up, with its link off until `claim`. `ResourceError` for what the host or the user's rights do not give,
        `BusyError` when it is in use, `ConfigurationError` when it is no TAP."""
        name = parse_net(net)
        fd = _open_device()
        if fd < 0:
            if -fd in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
                remedy = "load the module tun, and in a container pass the device in: --device /dev/net/tun"
            else:
                remedy = "as root, `chmod 0666 /dev/net/tun`; in a container, --device /dev/net/tun"
            raise ResourceError(f"{DEVICE}: {os.strerror(-fd)}", remedy)
        os.set_blocking(fd, False)
        network = cls(name, fd, mac, address)
        try:
            network._attach()
            network.connect(False)  # first: an interface that was up already is not to flicker
            network.set_up(True)
        except BaseException:
            network.close()
            raise
        return network

    def _attach(self) -> None:
        by_admin = f"have root make it for this user: ip tuntap add dev {self.name} mode tap user $USER"
        try:
            fcntl.ioctl(self.fd, _TUNSETIFF, _IFREQ.pack(self.name.encode(), _IFF_TAP | _IFF_NO_PI))
        except OSError as error:
            what = f"TAP {self.name}"
            if error.errno in (errno.EPERM, errno.EACCES):
                raise ResourceError(
                    f"{what}: no right to make or to use it", f"use CAP_NET_ADMIN, or {by_admin}"
                ) from None
            if error.errno == errno.EBUSY:
                raise BusyError(f"{what} is in use by another program") from None
            if error.errno == errno.EINVAL:
                raise ConfigurationError(
                    f"{what}: there is an interface of that name, which is no TAP, or one with other options"
                    f" (ip tuntap add dev {self.name} mode tap makes the right one)"
                ) from None
            raise ResourceError(f"{what}: {error.strerror}", by_admin) from None

    def set_up(self, up: bool) -> None:
        """Sets the interface up or down, where it is not already. `ResourceError` without CAP_NET_ADMIN."""
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
                answer = fcntl.ioctl(control, _SIOCGIFFLAGS, _IFREQ.pack(self.name.encode(), 0))
                flags = _IFREQ.unpack(answer)[1]
                if bool(flags & _IFF_UP) != up:
                    fcntl.ioctl(control, _SIOCSIFFLAGS, _IFREQ.pack(self.name.encode(), flags ^ _IFF_UP))
        except OSError as error:
            raise ResourceError(
                f"TAP {self.name} cannot be set {'up' if up else 'down'}: {error.strerror}",
                f"run with CAP_NET_ADMIN, or have root set it up once: ip link set {self.name} up",
            ) from None

    @property
    def net(self) -> str:
        """As in ``--net``."""
        return _SCHEME + self.name

    @property
    def fd(self) -> int:
        return self._fd.fileno()

    def claim(self) -> None:
        """The machine runs here: its frames come here. Returns when it has been announced once; that is repeated in the
        background. Frames from before are thrown away: they were another's to answer. `ResourceError`."""
        self._claims += 1
        self.drain()
        self.connect(True)
        self.set_up(True)
        self.announce()
        trio.lowlevel.spawn_system_task(self._announce_again, self._claims)

    def release(self) -> None:
        """The machine is another host's: no frame comes or goes here. `ResourceError`."""
        self._claims += 1
        self.connect(False)
        with contextlib.suppress(ResourceError):
            self.set_up(False)

    async def _announce_again(self, claim: int) -> None:
        for pause_s in ANNOUNCE_AFTER_S:
            await trio.sleep(pause_s)
            if claim != self._claims:
                return
            self.announce()

    def connect(self, on: bool) -> None:
        """Plugs the cable in, or pulls it out: while it is out no frame passes in either direction. Those that came
        before remain to be read."""
        try:
            fcntl.ioctl(self.fd, _TUNSETCARRIER, struct.pack("@i", on))
        except OSError as error:
            raise ResourceError(
                f"TAP {self.name}: its carrier cannot be set: {error.strerror}", "Linux 5.0 can"
            ) from None

    def drain(self) -> int:
        """Throws away the frames that have not been read; how many there were."""
        for count in range(_MAX_QUEUED):
            try:
                if not os.read(self.fd, _MAX_FRAME_BYTES):
                    return count
            except OSError:
                return count  # BlockingIOError: none is left
        return _MAX_QUEUED

    def announce(self) -> None:
        """Tells the network where the machine now is: an ARP announcement, sent as if by the machine. Bridges and
        switches learn the port from its source, neighbours the MAC from its content. Like every frame it may get
        lost."""
        with contextlib.suppress(OSError):  # no room, or no link: one more frame that is lost
            os.write(self.fd, announcement(self.mac, self.address))

    def close(self) -> None:
        self._claims += 1
        self._fd.close()


def announcement(mac: int, address: int) -> bytes:
    """The frame: an ARP request of a station for its own address."""
    own, ip = mac.to_bytes(6, "big"), address.to_bytes(4, "big")
    return b"\xff" * 6 + own + struct.pack("!HHHBBH", 0x0806, 1, 0x0800, 6, 4, 1) + own + ip + b"\0" * 6 + ip
