"""Where fetched objects arrive: at their place in the tree that is being built; then under their name in the cache."""

from __future__ import annotations

import errno
import os

from flowfn_runtime.data.locks import NamedLocks
from flowfn_runtime.data.model import Object
from flowfn_runtime.data.newfile import give_name, nameless
from flowfn_runtime.data.spec import redact
from flowfn_runtime.errors import DataError

# Files from this size on have no name until they are complete: those of a killed process are gone with it. Of smaller
# ones little is left, and the filesystem makes them faster the usual way.
_NAMELESS_BYTES = 1 << 20
_NO_SUCH_NAME = (errno.EEXIST, errno.EINVAL, errno.ENAMETOOLONG, errno.EILSEQ)


class Depot:
    """The cache at `root` as one process of a build sees it."""

    def __init__(self, root: str, url: str) -> None:
        self.root = root
        self.url = redact(url)
        self.locks = NamedLocks(os.path.join(root, "locks"))
        self.deferred: list[ObjectJob] = []  # those that another process is fetching

    def close(self) -> None:
        self.locks.close()

    def stored(self, name: str) -> str:
        """Where the cache keeps the object `name`."""
        return f"{self.root}/objects/{name[:2]}/{name}"


class ObjectJob:
    """One object to be fetched to `path` (a `transfer.Job`); left alone if another process is fetching it already."""

    __slots__ = ("arrived", "depot", "name", "nameless", "object", "path")

    def __init__(self, depot: Depot, object: Object, name: str, path: str) -> None:
        self.depot = depot
        self.object = object
        self.name = name
        self.path = path
        self.arrived = False
        self.nameless = False  # whether its file has no path yet

    def begin(self) -> int | None:
        depot = self.depot
        if not depot.locks.take(self.name):
            depot.deferred.append(self)
            return None
        try:
            if os.access(depot.stored(self.name), os.F_OK):
                depot.locks.release(self.name)
                return None
            # The mode is for those who open it later.
            if (self.object.size or 0) >= _NAMELESS_BYTES and (
                fd := nameless(os.path.dirname(self.path), 0o444)
            ) is not None:
                self.nameless = True
                return fd
            return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
        except BaseException as error:
            depot.locks.release(self.name)
            raise self._meaning(error) from error

    def complete(self, fd: int) -> None:
        depot = self.depot
        try:
            if self.object.modified is not None:
                os.utime(fd, (self.object.modified, self.object.modified))
            if self.nameless:
                give_name(fd, self.path)
                self.nameless = False
            os.close(fd)
            self.arrived = True
            try:
                os.link(self.path, depot.stored(self.name))
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
        if not self.nameless:
            os.unlink(self.path)
        self.nameless = False
        self.depot.locks.release(self.name)

    def place(self) -> bool:
        """See that the object is at its path. False if it is not here."""
        if self.arrived:
            return True
        try:
            os.link(self.depot.stored(self.name), self.path)
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno == errno.EMLINK:  # ext4 stops at 65,000 links
                import shutil

                shutil.copy2(self.depot.stored(self.name), self.path)
                return True
            raise self._meaning(error) from error
        return True

    def _meaning(self, error: BaseException) -> BaseException:
        """What it means that there can be no file at the path."""
        if not isinstance(error, OSError) or error.errno not in _NO_SUCH_NAME:
            return error
        return DataError(
            f"{self.depot.url}: {self.object.key!r} can't be a file below {self.depot.root}: {error.strerror}.",
            url=self.depot.url,
            hint="Does that filesystem tell upper case from lower? Put FLOW_CACHE on one that does.",
        )
