"""An embedded SQLite database in a directory of FLOW_HOME: who reads, who writes, and what its failures mean.

The one place that sees sqlite3's errors. Any number of processes use a registry at once.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from . import paths
from .errors import FlowError

if TYPE_CHECKING:
    import sqlite3

T = TypeVar("T")

BUSY_TIMEOUT_S = 60.0


class Registry(NamedTuple):
    """`registry.db` in a directory."""

    root: Callable[[], str]  # the directory; FLOW_HOME may change
    what: str  # is in it, in the plural, for messages
    error: type[FlowError]
    schemas: Sequence[Sequence[str]]  # the statements that each version adds
    salvage: str  # what to do if it is damaged

    @property
    def path(self) -> str:
        """The database's file."""
        return os.path.join(self.root(), "registry.db")

    def write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work` in a transaction of its own, one at a time among all processes of this home."""
        try:
            paths.private_dir(paths.home())
            paths.private_dir(self.root())
            # Writers queue at a kernel lock, which neither polls nor starves anyone as SQLite's busy handler may.
            gate = os.open(os.path.join(self.root(), "registry.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise self.explain(error) from error
        try:
            fcntl.flock(gate, fcntl.LOCK_EX)
            with self.connection("rwc") as db:
                db.execute("BEGIN IMMEDIATE")
                try:
                    self._migrate(db)
                    result = work(db)
                    db.execute("COMMIT")
                except BaseException:
                    if db.in_transaction:
                        db.execute("ROLLBACK")
                    raise
                return result
        finally:
            release(gate)

    def read(self, work: Callable[[sqlite3.Connection], T]) -> T | None:
        """Run `work` on what is there; None if there is nothing yet. Also works in a read-only home."""
        if not os.path.exists(self.path):
            return None
        # A reader that may write rolls back what a killed writer has left; one that may not still reads.
        with self.connection("rw" if os.access(self.path, os.W_OK) else "ro") as db:
            version = self._version(db)
            if version == len(self.schemas):
                return work(db)
        if not version:
            return None  # another process has made the file, and is about to make the tables
        self.write(lambda db: None)  # an older flowfn's: it gets what was added since
        return self.read(work)

    @contextmanager
    def connection(self, mode: str) -> Iterator[sqlite3.Connection]:
        """SQLite itself, in one of its modes: "ro", "rw", "rwc"."""
        # A connection an operation: they are few, and a connection must not cross a fork. A rollback journal, not WAL:
        # it can be read in a read-only home, and works on network filesystems, where homes often live.
        import sqlite3

        try:
            if mode == "rwc":
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            quoted = self.path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
            uri = f"file:{quoted}?mode={mode}"
            db = sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None)
            try:
                yield db
            finally:
                db.close()
        except (sqlite3.Error, OSError) as error:
            raise self.explain(error) from error

    def _version(self, db: sqlite3.Connection) -> int:
        version: int = db.execute("PRAGMA user_version").fetchone()[0]
        if version > (newest := len(self.schemas)):
            raise self.error(
                f"{self.path} was written by a newer flowfn (schema {version}; this one knows {newest})",
                hint="upgrade flowfn here: pip install -U flowfn",
            )
        return version

    def _migrate(self, db: sqlite3.Connection) -> None:
        if (version := self._version(db)) < len(self.schemas):
            for statement in (statement for added in self.schemas[version:] for statement in added):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {len(self.schemas)}")

    def explain(self, error: Exception) -> FlowError:
        """What a failure of the database or of the disk under it means to the user."""
        text, number, root = str(error), getattr(error, "errno", None), self.root()
        if number in (errno.EROFS, errno.EACCES, errno.EPERM) or "readonly" in text or "unable to open" in text:
            return self.error(
                f"{self.what} can't be changed: {root} is not writable ({text})",
                hint="set FLOW_HOME to a directory that you may write to",
            )
        if number in (errno.ENOSPC, errno.EDQUOT) or "disk is full" in text:
            return self.error(
                f"{self.what} can't be changed: the disk of {root} is full",
                hint="free some space there (flow cache prune), or set FLOW_HOME to another disk",
            )
        if "malformed" in text or "not a database" in text:
            return self.error(f"the registry of {self.what} is damaged: {self.path} ({text})", hint=self.salvage)
        if "locked" in text:
            return self.error(
                f"the registry of {self.what} stayed locked for {BUSY_TIMEOUT_S:.0f} s: {self.path}",
                hint="another program has it open in a transaction; end it",
            )
        return self.error(f"the registry of {self.what} failed: {text} ({root})")


def release(fd: int) -> None:
    """Give a lock back. Unlocked by name, not just closed: a process forked meanwhile has the same open file."""
    fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)
