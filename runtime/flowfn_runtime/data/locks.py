"""Locks that the kernel frees when their holder dies, however it dies. Nothing is left to clean up."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import sys

# Locks of the open file, not of the process: threads exclude each other too. Where the system has none (macOS), those
# of the process do: two threads may then do the same work twice, never wrong.
_SET = getattr(fcntl, "F_OFD_SETLK", fcntl.F_SETLK)
_SET_WAIT = getattr(fcntl, "F_OFD_SETLKW", fcntl.F_SETLKW)


class NamedLocks:
    """Any number of exclusive locks by name (a digest in hex) in one file: each is a byte of it that need not exist.

    Only locks that are held cost anything, so a store of millions of objects needs no lock files. Two names fall on
    one byte once in 2**62 pairs, and then wait for each other needlessly.
    """

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def take(self, name: str) -> bool:
        """Take the lock of `name` if nobody holds it. True if it was taken."""
        try:
            self._set(_SET, fcntl.F_WRLCK, name)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True

    def wait(self, name: str) -> None:
        """Take the lock of `name` as soon as it is free."""
        self._set(_SET_WAIT, fcntl.F_WRLCK, name)

    def release(self, name: str) -> None:
        self._set(_SET, fcntl.F_UNLCK, name)

    def close(self) -> None:
        """Release everything that was taken through this object."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _set(self, command: int, kind: int, name: str) -> None:
        byte = int(name[:16], 16) >> 2
        if sys.platform == "darwin":
            request = struct.pack("@qqihh", byte, 1, 0, kind, os.SEEK_SET)
        else:
            request = struct.pack("@hhqqi4x", kind, os.SEEK_SET, byte, 1, 0)
        fcntl.fcntl(self._fd, command, request)


def lease(path: str, *, exclusive: bool = False, create: bool = False) -> int | None:
    """Open and lock the file `path`, shared unless `exclusive`; the descriptor, or None if it is gone.

    A shared lease waits for an exclusive one (which is held for moments only); an exclusive one does not wait and gives
    None while anybody has a lease. The descriptor can be inherited: children hold the lease too.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if create else 0)
    try:
        fd = os.open(path, flags, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH)
        held, there = os.fstat(fd), os.stat(path)
        if (held.st_dev, held.st_ino) == (there.st_dev, there.st_ino):
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None
