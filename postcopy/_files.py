# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole or not at all, and what can be said about them before there is anything to write.

A file is written under another name in the same directory and renamed when all of it is on the disk (fsync(2) of the
file before, of the directory after: a rename that outlives a power failure must not name a file that did not). That
name cannot be guessed and is made with O_EXCL and O_NOFOLLOW: in a directory that others may write to, no link of
theirs is ever followed. What is replaced is a regular file or nothing: a rename over a device node or a FIFO would
remove it, and over a link would not do what its owner meant.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from postcopy.errors import ConfigurationError, ResourceError

_MAX_PATH_BYTES, _MAX_NAME_BYTES = 4095, 255  # PATH_MAX with its null, NAME_MAX
_WHAT = {
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def share_file(name: str) -> str:
    """The path of a file that is installed with this package: a udev rule, a unit (``examples/systemd/``), a seccomp
    profile. Its name alone where there is none, as after ``pip install --target``."""
    from postcopy import _native

    # lib/python3.X/site-packages/postcopy/_native.abi3.so of a prefix: /usr/local, a virtual environment, ~/.local.
    # (Of the extension: where this is an editable installation the modules are elsewhere.)
    above = Path(str(_native.__file__)).parents
    path = above[min(4, len(above) - 1)] / "share" / "postcopy" / name
    return str(path) if path.is_file() else name


def installed_program(name: str) -> str:
    """The path of a program of this package that is not for users: ``postcopy-`` and its name, beside the extension.
    `ResourceError` where it is not installed, as beside a checkout that was never built."""
    from postcopy import _native

    path = os.path.join(os.path.dirname(str(_native.__file__)), f"postcopy-{name}")
    if not os.access(path, os.X_OK):
        raise ResourceError(f"{path} is not there, or cannot be run", "install postcopy again")
    return path


UDEV_RULE = "60-postcopy.rules"


def explain_no_access(device: str, *, contained: bool = False) -> tuple[str, str]:
    """Why this process may not open a device that is there (EACCES, EPERM), and what to do about it. `contained`: in a
    container, whose groups and files are not its host's."""
    try:
        found = os.stat(device)
    except OSError as error:
        return f"{device}: {error.strerror}", "let this user see the directory of that device"
    if os.access(device, os.R_OK | os.W_OK):
        # The mode allows it: a container's list of devices, or a unit's, does not.
        return (
            f"{device} is not among the devices of this container or unit",
            f"docker run --device {device} ..., or DeviceAllow={device} rw in the unit",
        )
    owner, group = _name_of("passwd", found.st_uid), _name_of("group", found.st_gid)
    why = f"{device} is {owner}:{group} {stat.S_IMODE(found.st_mode):04o}"
    if found.st_gid and found.st_mode & 0o060 == 0o060:
        if contained or group.isdigit():
            return why, f"docker run --group-add {found.st_gid} ... (that group owns the device)"
        return why, f"usermod -a -G {group} {_name_of('passwd', os.geteuid())}, as root; then log in again"
    if contained:
        rule = f"on the host: install the udev rule {UDEV_RULE}, then docker run --group-add GID ..."
        return why, f"{rule} (docs/containers.md)"
    return why, f"install the udev rule {share_file(UDEV_RULE)} and join its group, kvm: see docs/privileges.md"


def _name_of(table: str, number: int) -> str:
    """Of a user or a group; the number where it has none."""
    import grp  # only where something was refused
    import pwd

    try:
        return pwd.getpwuid(number).pw_name if table == "passwd" else grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def absolute(path: str) -> str:
    """`ConfigurationError` where that cannot be said: what runs here may outlive the directory it was started in."""
    try:
        return os.path.abspath(path)
    except OSError as error:
        why = f"{path or '.'}: the current directory is gone ({error.strerror})"
        raise ConfigurationError(f"{why}; go to another one, or name an absolute path") from error


def explain_bad_name(path: str) -> str:
    """Why a path could be no file's, whatever there is; empty when it could."""
    if not path:
        return "an empty name is no file's; leave the option out, or name one"
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:
        encoded = b"\0"
    if b"\0" in encoded:
        return "a name with characters that no file's has"
    if len(encoded) > _MAX_PATH_BYTES or max(len(part) for part in encoded.split(b"/")) > _MAX_NAME_BYTES:
        return f"{path[:40]}... is too long: a path has at most {_MAX_PATH_BYTES} bytes, a name in it {_MAX_NAME_BYTES}"
    return ""


def check_new_file(what: str, path: str) -> None:
    """Whether `replacing` could write there, tried with an empty file. `ConfigurationError` says why not."""
    _check_name(what, path)
    _refuse_irregular(what, path)
    directory, name = _split(path)
    try:
        at = _open_directory(directory)
        try:
            part, fd = _create(at, name, 0o600)
            os.close(fd)
            os.unlink(part, dir_fd=at)
        finally:
            os.close(at)
    except OSError as error:
        raise ConfigurationError(f"{what} {path}: {explain_unwritable(error, directory)}") from error


def check_new_directory(what: str, path: str) -> None:
    """Whether `new_directory` could make this one, tried with an empty one. `ConfigurationError` says why not."""
    _check_name(what, path)
    if os.path.lexists(path):
        raise ConfigurationError(f"{what} {path}: exists already; name a directory that does not")
    directory, name = _split(path)
    try:
        part = os.path.join(directory, _other_name(name))
        os.mkdir(part, 0o700)
        os.rmdir(part)
    except OSError as error:
        raise ConfigurationError(f"{what} {path}: {explain_unwritable(error, directory)}") from error


@contextlib.contextmanager
def replacing(path: str, mode: int = 0o600, *, durable: bool = True) -> Iterator[int]:
    """A descriptor to write to; what is written there is `path` when the block has ended, and nothing is when it is
    left by an exception. Blocks on I/O, but for what is not `durable` not on the disk. OSError; `ConfigurationError`
    for a `path` that is no regular file."""
    directory, name = _split(path)
    at = _open_directory(directory)
    try:
        part, fd = _create(at, name, mode)
        try:
            try:
                yield fd
                os.fchmod(fd, mode)  # whatever the umask
                if durable:
                    _sync(fd)
            finally:
                os.close(fd)
            _refuse_irregular("cannot replace", path)
            os.rename(part, name, src_dir_fd=at, dst_dir_fd=at)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(part, dir_fd=at)
            raise
        if durable:
            _sync(at)
    finally:
        os.close(at)


def write_output(option: str, path: str, text: str, *, durable: bool = True) -> None:
    """A file that a command was asked for by `option`, for others to read too, whole or not at all. Blocks on I/O.
    `ResourceError` when it cannot be written."""
    try:
        with replacing(path, 0o644, durable=durable) as fd:
            write_all(fd, text.encode("utf-8", "replace"))
    except OSError as error:
        why = explain_unwritable(error, os.path.dirname(path) or ".")
        raise ResourceError(f"{option} {path}: {why}", "name another file") from error


@contextlib.contextmanager
def new_directory(path: str) -> Iterator[Path]:
    """A directory to fill, which is `path` when the block has ended; removed when it is left by an exception. Files in
    it are made by `write_new`. Blocks on I/O. OSError: FileExistsError when there is something of that name."""
    directory, name = _split(path)
    part = Path(directory, _other_name(name))
    part.mkdir(mode=0o700)
    try:
        yield part
        _sync_directory(part)
        if os.path.lexists(path):  # an empty directory would be replaced in silence
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        os.rename(part, path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    _sync_directory(Path(directory))


@contextlib.contextmanager
def locked_directory(path: Path) -> Iterator[None]:
    """A lock that one process at a time has. OSError: BlockingIOError when another one has it."""
    fd = _open_directory(str(path))
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def write_new(path: Path) -> Iterator[int]:
    """A descriptor of a file that was not there, on the disk when the block has ended."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        yield fd
        _sync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def open_regular(path: str | Path, *, follow: bool = True) -> int:
    """A descriptor to read a file that is a regular one. Does not wait, as opening a FIFO would. OSError, with a reason
    that says what else it is."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | (0 if follow else os.O_NOFOLLOW)
    fd = os.open(path, flags)
    kind = stat.S_IFMT(os.fstat(fd).st_mode)
    if kind != stat.S_IFREG:
        os.close(fd)
        raise OSError(errno.EINVAL, f"{_WHAT.get(kind, 'something')}, not a regular file")
    return fd


def read_regular(path: str | Path, limit_bytes: int, *, follow: bool = True) -> bytes:
    """All of a regular file of at most so many bytes. OSError as `open_regular`, and EFBIG."""
    fd = open_regular(path, follow=follow)
    with os.fdopen(fd, "rb") as file:
        data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise OSError(errno.EFBIG, f"more than {limit_bytes} bytes")
    return data


# ---- private


def _check_name(what: str, path: str) -> None:
    if reason := explain_bad_name(path):
        raise ConfigurationError(f"{what}: {reason}")
    if path == "-":
        raise ConfigurationError(f"{what} -: that is no file; write ./- for one of that name")


def _split(path: str) -> tuple[str, str]:
    return os.path.split(absolute(path))


def _other_name(name: str) -> str:
    """Beside `name`, says what it is, and cannot be guessed."""
    suffix = f".{secrets.token_hex(8)}.part"
    return os.fsdecode(os.fsencode(name)[: _MAX_NAME_BYTES - len(suffix)]) + suffix


def _open_directory(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _sync_directory(path: Path) -> None:
    fd = _open_directory(str(path))
    try:
        _sync(fd)
    finally:
        os.close(fd)


def _sync(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):  # a file system that has no such thing
            raise


def _create(at: int, name: str, mode: int) -> tuple[str, int]:
    part = _other_name(name)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return part, os.open(part, flags, mode & 0o700, dir_fd=at)


def _refuse_irregular(what: str, path: str) -> None:
    try:
        kind = stat.S_IFMT(os.lstat(path).st_mode)
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigurationError(f"{what} {path}: {explain_unwritable(error, _split(path)[0])}") from error
    if kind != stat.S_IFREG:
        raise ConfigurationError(
            f"{what} {path}: that is {_WHAT.get(kind, 'no file')}, which would be replaced; name a file"
        )


def explain_unwritable(error: OSError, directory: str) -> str:
    """Why nothing can be made there."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR) and not os.path.isdir(directory):
        return f"directory {directory} does not exist"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"this user may not write into directory {directory}"
    return f"cannot write into {directory}: {error.strerror}"
