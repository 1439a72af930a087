"""Where fetched objects arrive: first in a folder of the build, unseen; then under their name in the cache."""

from __future__ import annotations

import errno
import os
import shutil
import threading

from flowfn_runtime.data.locks import NamedLocks
from flowfn_runtime.data.model import Object
from flowfn_runtime.data.spec import redact
from flowfn_runtime.errors import DataError

# Files from this size on have no name until they are complete: those of a killed process are gone with it. Of smaller
# ones little is left, and the filesystem makes them faster the usual way.
_NAMELESS_BYTES = 1 << 20


class Depot:
    """The cache at `root` as one process of a build sees it; `arrivals` is the build's folder for what comes in."""

    def __init__(self, root: str, arrivals: str, url: str) -> None:
        self.root = root
        self.arrivals = arrivals
        self.url = redact(url)
        self.locks = NamedLocks(os.path.join(root, "locks"))
        self.deferred: list[ObjectJob] = []  # those that another process is fetching
        self._folders = threading.local()

    def close(self) -> None:
        self.locks.close()

    def stored(self, name: str) -> str:
        """Where the cache keeps the object `name`."""
        return f"{self.root}/objects/{name[:2]}/{name}"

    def folder(self) -> str:
        """A folder of this thread's own: threads that make files in one directory wait for each other."""
        folder: str | None = getattr(self._folders, "path", None)
        if folder is None:
            folder = self._folders.path = os.path.join(self.arrivals, os.urandom(6).hex())
            os.mkdir(folder)
        return folder


class ObjectJob:
    """One object to be fetched (a `transfer.Job`); left alone if another process is fetching it already."""

    __slots__ = ("arrived", "depot", "name", "nameless", "object")

    def __init__(self, depot: Depot, object: Object, name: str) -> None:
        self.depot = depot
        self.object = object
        self.name = name
        self.arrived: str | None = None  # its path among the arrivals
        self.nameless = False  # whether nothing is at that path yet

    def begin(self) -> int | None:
        depot = self.depot
        if not depot.locks.take(self.name):
            depot.deferred.append(self)
            return None
        try:
            if os.path.exists(depot.stored(self.name)):
                depot.locks.release(self.name)
                return None
            self.arrived = f"{depot.folder()}/{self.name}"
            # The mode is for those who open it later.
            if (self.object.size or 0) >= _NAMELESS_BYTES and (fd := _nameless(depot.folder())) is not None:
                self.nameless = True
                return fd
            return os.open(self.arrived, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
        except BaseException:
            depot.locks.release(self.name)
            raise

    def complete(self, fd: int) -> None:
        depot = self.depot
        assert self.arrived is not None
        try:
            if self.object.modified is not None:
                os.utime(fd, (self.object.modified, self.object.modified))
            if self.nameless:
                # The directory's descriptor is of no account, but makes Python follow the link.
                os.link(f"/proc/self/fd/{fd}", self.arrived, src_dir_fd=fd, follow_symlinks=True)
                self.nameless = False
            os.close(fd)
            try:
                os.link(self.arrived, depot.stored(self.name))
            except FileExistsError:
                pass
            except OSError as error:
                # A filesystem without hard links: the object is for this snapshot alone.
                if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                    raise
        finally:
            depot.locks.release(self.name)

    def abandon(self, fd: int) -> None:
        os.close(fd)
        if self.arrived is not None:
            if not self.nameless:
                os.unlink(self.arrived)
            self.arrived, self.nameless = None, False
        self.depot.locks.release(self.name)

    def place(self, path: str) -> bool:
        """Put the object at `path`, in the tree that is being built. False if it is not here."""
        try:
            if self.arrived is not None:
                os.rename(self.arrived, path)
                return True
            os.link(self.depot.stored(self.name), path)
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno == errno.EMLINK:  # ext4 stops at 65,000 links
                shutil.copy2(self.depot.stored(self.name), path)
                return True
            if error.errno in (errno.EEXIST, errno.EINVAL, errno.ENAMETOOLONG, errno.EILSEQ):
                raise DataError(
                    f"{self.depot.url}: {self.object.key!r} can't be a file below {self.depot.root}: {error.strerror}.",
                    url=self.depot.url,
                    hint="Does that filesystem tell upper case from lower? Put FLOW_CACHE on one that does.",
                ) from error
            raise
        return True


def _nameless(folder: str) -> int | None:
    """A new file in `folder` that has no name there; None where the system has none."""
    flags = getattr(os, "O_TMPFILE", None)
    if flags is None or not os.path.isdir("/proc/self/fd"):
        return None
    try:
        return os.open(folder, os.O_RDWR | flags | os.O_CLOEXEC, 0o444)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):
            raise
        return None
