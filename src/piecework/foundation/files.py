"""Files that are there whole or not at all: scratch directories and atomic writes.

A scratch directory is guarded by a lock file that its owner holds. The kernel lets go of the lock when the owner
dies, however it dies, so a directory whose lock can be taken is a dead process's and may be removed. Process ids
can't tell that, because containers that share a directory count theirs apart. Locks may not reach other hosts: their
directories are removed after a week.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import grp
import os
import pwd
import shutil
import stat
import time
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Final

from piecework.errors import StoreError
from piecework.foundation.process import kernel_id

_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT)
_NO_PERMISSION: Final = (errno.EACCES, errno.EPERM)
_OCCUPIED: Final = (errno.ENOTEMPTY, errno.EEXIST)
_MARK: Final = ".piecework-"
_GUARD: Final = ".lock"
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH
_NO_LOCKS: Final = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF)
_BEGINNING_S: Final = 5.0
_FORGOTTEN_S: Final = 7 * 86400.0


class Existing(Enum):
    """What happens to a directory that is already where a new one is to be published."""

    KEEP = "keep"
    REPLACE = "replace"


@contextlib.contextmanager
def store_errors(asked: str) -> Iterator[None]:
    """Turn an OSError inside the block into a StoreError that says what was asked and what would help."""
    try:
        yield
    except OSError as error:
        raise as_store_error(error, asked=asked) from error


def as_store_error(error: OSError, *, asked: str) -> StoreError:
    """Return the StoreError that explains `error`."""
    where = f" ({error.filename})" if error.filename is not None else ""
    elsewhere = "or name another directory with PIECEWORK_HOME or --out"
    if error.errno in _NO_SPACE:
        return StoreError(asked=asked, found=f"no space left on the disk{where}", try_=f"free some space, {elsewhere}")
    if error.errno == errno.EROFS:
        return StoreError(asked=asked, found=f"a read-only file system{where}", try_=f"mount it writable, {elsewhere}")
    if error.errno in _NO_PERMISSION:
        found = f"permission denied{where}"
        return StoreError(asked=asked, found=found, try_=f"allow this user to read and write there, {elsewhere}")
    found = f"{error.strerror or error}{where}"
    return StoreError(asked=asked, found=found, try_=f"check that the directory is a writable one, {elsewhere}")


def make_directory(path: Path) -> None:
    """Make a directory, and those above it, that nobody else may enter whatever the umask; one that is there stays.

    Raises OSError.
    """
    if path.is_dir():
        return
    make_directory(path.parent)
    with contextlib.suppress(FileExistsError):
        path.mkdir(0o700)


def require_own(root: Path) -> None:
    """Raise StoreError where others than this user and root can write to a directory, or to what lies directly in it.

    Whoever can write there can have this process run what they like. A directory that isn't there is nobody's.
    """
    with store_errors(f"use the store {root}"):
        try:
            places = [root, *(Path(entry.path) for entry in os.scandir(root))]
        except (FileNotFoundError, NotADirectoryError):
            return
        for place in places:
            try:
                found = place.lstat()
            except FileNotFoundError:
                continue
            if stat.S_ISLNK(found.st_mode):
                found = place.stat()
            if found.st_uid not in (0, os.geteuid()):
                who, fix = f"belongs to the user {found.st_uid}", f"chown -R {os.geteuid()} {root}"
            elif found.st_mode & stat.S_IWOTH or (found.st_mode & stat.S_IWGRP and not _is_of_one(found.st_gid)):
                who, fix = f"can be written to by others (mode {found.st_mode & 0o7777:o})", f"chmod -R go-w {root}"
            else:
                continue
            raise StoreError(
                asked=f"use the store {root}",
                found=f"{place} {who}, who could have any code run here",
                try_=f"{fix}, if you trust what is in it; or name another directory with PIECEWORK_HOME",
            )


def _is_of_one(group: int) -> bool:
    """Whether a group is this user's own and has no other members: many systems give every user one, and umask 002."""
    try:
        entry, user = grp.getgrgid(group), pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return entry.gr_gid == user.pw_gid and entry.gr_name == user.pw_name and set(entry.gr_mem) <= {user.pw_name}


def keep_from_others(root: Path) -> None:
    """Take everyone else's right to write from a file, or from a directory and all in it. Raises OSError."""
    for place in (root, *(root.rglob("*") if root.is_dir() else ())):
        mode = place.lstat().st_mode
        if mode & _OTHERS_WRITE and not stat.S_ISLNK(mode):
            place.chmod(stat.S_IMODE(mode) & ~_OTHERS_WRITE)


@contextlib.contextmanager
def scratch(parent: Path, *, name: str = "") -> Iterator[Path]:
    """Make an empty directory under `parent`, and remove it with all it holds when the block is left.

    Its name starts with a dot, so that it is never taken for content. Raises OSError where it can't be made.
    """
    make_directory(parent)
    directory, owner = parent / f"{_MARK}{name}{os.urandom(8).hex()}", os.getpid()
    with _guarding(_guard_of(directory)):
        directory.mkdir(0o700)
        try:
            yield directory
        finally:
            if os.getpid() == owner:  # and not a fork of it, whose interpreter unwinds as well when it ends
                shutil.rmtree(directory, ignore_errors=True)


def lasting_scratch(parent: Path) -> Path:
    """Make a directory as `scratch` does that is removed when this process ends. Raises OSError."""
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(scratch(parent))


def remove_stale_scratch(parent: Path) -> int:
    """Remove the scratch directories that dead processes left under `parent`; return how many there were.

    Does nothing where `parent` can't be read or written: being tidy is never a reason to fail.
    """
    removed = 0
    with contextlib.suppress(OSError):
        for guard in sorted(parent.glob(f"{_MARK}*{_GUARD}")):
            with contextlib.suppress(OSError), _taken_from_dead(guard) as is_dead:
                if is_dead:
                    shutil.rmtree(guard.with_name(guard.name.removesuffix(_GUARD)), ignore_errors=True)
                    guard.unlink()
                    removed += 1
    return removed


def oldest_scratch_s(parent: Path, *, but: Path | None = None) -> float | None:
    """Return when the oldest scratch directory under `parent` other than `but` was made, in seconds since 1970."""
    made = []
    for guard in parent.glob(f"{_MARK}*{_GUARD}"):
        if but is None or guard != _guard_of(but):
            with contextlib.suppress(FileNotFoundError):
                made.append(guard.stat().st_mtime)
    return min(made, default=None)


@contextlib.contextmanager
def _guarding(guard: Path) -> Iterator[None]:
    """Hold a new guard's lock, and say in it which kernel knows of that."""
    owner = os.getpid()
    descriptor = os.open(guard, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with contextlib.suppress(OSError):  # a file system may have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.write(descriptor, kernel_id().encode())
        yield
    finally:
        with contextlib.suppress(OSError):
            if os.getpid() == owner:
                guard.unlink()
        os.close(descriptor)


@contextlib.contextmanager
def _taken_from_dead(guard: Path) -> Iterator[bool]:
    """Hold the lock of a guard whose owner is dead; False where it lives, or may live on another host."""
    descriptor = os.open(guard, os.O_RDWR | os.O_CLOEXEC)
    try:
        locked = try_lock(descriptor)
        owner = os.read(descriptor, 256).decode(errors="replace")
        age_s = time.time() - os.fstat(descriptor).st_mtime
        known = locked is True and (owner == kernel_id() or (not owner and age_s > _BEGINNING_S))
        yield locked is not False and (known or age_s > _FORGOTTEN_S) and is_at(descriptor, path=guard)
    finally:
        os.close(descriptor)


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file and return True; False where another has it locked, None where its file system has no locks.

    Raises OSError for anything else.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


@contextlib.contextmanager
def directory_lock(path: Path, *, shared: bool) -> Iterator[None]:
    """Hold the lock of a directory, alone or with others, for the length of the block.

    Holds nothing where there is no directory, or no locks: what it keeps apart must be unlikely without it.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield


def _guard_of(directory: Path) -> Path:
    return directory.with_name(directory.name + _GUARD)


def is_scratch_name(name: str) -> bool:
    """Whether a file of this name belongs to a write that is going on (or was cut off) beside it."""
    return name.startswith(_MARK)


def write_file(path: Path, data: bytes, *, scratch_parent: Path | None = None) -> None:
    """Write `data` to `path` so that a reader sees the old content or all of the new.

    Args:
        path: the file; its directory is made where missing.
        data: the whole content.
        scratch_parent: a directory on the same file system for the unfinished file; default: beside `path`.

    Raises OSError; see `store_errors`.
    """
    make_directory(path.parent)
    with scratch(scratch_parent or path.parent) as directory:
        unfinished = directory / path.name
        write_and_sync(unfinished, data)
        keep_from_others(unfinished)
        os.replace(unfinished, path)
        sync_directory(path.parent)


def copy_file(source: Path, *, to: Path, scratch_parent: Path | None = None) -> None:
    """Copy a file's content to `to`, as atomically as `write_file`. Raises OSError."""
    make_directory(to.parent)
    with scratch(scratch_parent or to.parent) as directory:
        unfinished = directory / to.name
        shutil.copyfile(source, unfinished)
        sync_file(unfinished)
        keep_from_others(unfinished)
        os.replace(unfinished, to)
        sync_directory(to.parent)


def publish_directory(unfinished: Path, *, to: Path, existing: Existing) -> bool:
    """Rename a finished directory to its place, after its files have reached the disk.

    Args:
        unfinished: the directory, on the file system of `to`.
        to: where it shall be.
        existing: whether a directory that is there already stays or gives way.

    Returns False where the existing directory stayed. Raises OSError.
    """
    make_directory(to.parent)
    keep_from_others(unfinished)
    sync_tree(unfinished)
    if existing is Existing.KEEP:
        try:
            os.rename(unfinished, to)
        except OSError as error:
            if error.errno in _OCCUPIED:
                return False
            raise
    else:
        _rename_over(unfinished, to=to)
    sync_directory(to.parent)
    return True


def _rename_over(unfinished: Path, *, to: Path) -> None:
    """Rename a directory to `to`, moving whatever is there (also by a writer who is faster) out of the way."""
    while True:
        try:
            os.rename(unfinished, to)
            return
        except OSError as error:
            if error.errno not in _OCCUPIED:
                raise
        with scratch(to.parent) as directory, contextlib.suppress(FileNotFoundError):
            os.rename(to, directory / "old")


def is_at(descriptor: int, *, path: Path) -> bool:
    """Whether an open file is still the one at `path`, and not one that its last owner has removed."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    ours = os.fstat(descriptor)
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


def write_and_sync(path: Path, data: bytes) -> None:
    """Write a new file and wait until the disk has it. Raises OSError."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Wait until the disk has a file's content."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Wait until the disk has a directory's entries; some file systems can't, which is no error."""
    with contextlib.suppress(OSError):
        sync_file(path)


def sync_tree(root: Path) -> None:
    """Wait until the disk has every file and directory under `root`."""
    for directory, _, files in os.walk(root):
        for name in files:
            sync_file(Path(directory) / name)
        sync_directory(Path(directory))
