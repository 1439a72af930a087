"""`Output`: a local path in a function, whose content is published at a URL if the function returns."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from typing import IO, Any

from .. import paths
from ..errors import DataError
from .publish import publish, remove_unless_locked
from .reference import Reference
from .spec import redact


class Output(Reference):
    """Where a call writes a result: a file, or a directory with files.

    In the function it is a local path: `torch.save(model, out)`, `open(out, "wb")`, `os.mkdir(out)`. When the function
    has returned, what is there is published at the URL, whole; if it raised, was killed or timed out, or is a generator
    that was closed before its end, nothing is, and nothing is left of it on the host. Outside of a call:
    `with flow.Output(url) as path: ...`.
    """

    _work: _WorkDir | None
    _in_call: bool

    def __init__(self, url: Any, *, storage_options: Any = None) -> None:
        super().__init__(url, storage_options=storage_options)
        self._blank()

    def _blank(self) -> None:
        self._work = None
        self._in_call = False

    @property
    def path(self) -> str:
        """The local path to write to. Nothing is there yet; its directory is. The name is that of the URL."""
        with self._lock:
            if self._work is None:
                if not self._in_call:
                    raise DataError(
                        f"{self!r} has a path only while a call runs that will publish it",
                        url=redact(self._url),
                        hint="here, write: with flow.Output(url) as path: ...",
                    )
                self._work = _WorkDir()
            return os.path.join(self._work.path, os.path.basename(self._url.rstrip("/")) or "output")

    def open(self, mode: str = "wb", **options: Any) -> IO[Any]:
        """Open the local path, for writing unless told otherwise; the options are those of the built-in `open`."""
        return open(self.path, mode, **options)

    def prepare(self) -> None:
        """The call begins. The path is made when it is asked for: a call staged ahead has none yet."""
        self._in_call = True

    def finish(self, ok: bool) -> None:
        """The call has ended: publish what was written if it returned, and leave nothing behind."""
        with self._lock:
            self._in_call = False
            work, self._work = self._work, None
        if work is None:
            return
        try:
            if ok:
                self._publish(work)
        finally:
            work.remove()

    def _publish(self, work: _WorkDir) -> None:
        path = os.path.join(work.path, os.path.basename(self._url.rstrip("/")) or "output")
        if not os.path.lexists(path):
            beside = ", ".join(sorted(os.listdir(work.path))[:5])
            raise DataError(
                f"nothing was written to the path of {self!r}" + (f", but beside it: {beside}" if beside else ""),
                url=redact(self._url),
                hint=f"write to exactly that path (does the writer add a suffix to {os.path.basename(path)!r}?)",
            )
        publish(path, self._url, self._options)

    def exists(self) -> bool:
        """True if there is something at the URL now."""
        from .references import File

        return File(self).exists()

    def __enter__(self) -> str:
        self.prepare()
        return self.path

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.finish(kind is None)


class _WorkDir:
    """A directory of this process's own, which does not outlive it for long: its lock goes when the process does, and
    the next one that makes a directory here removes those without."""

    def __init__(self) -> None:
        base = _base()
        for name in os.listdir(base):
            if name.endswith(".lock"):
                lock = os.path.join(base, name)
                remove_unless_locked(lock, lock.removesuffix(".lock"), lock)
        while True:
            self.path = os.path.join(base, os.urandom(8).hex())
            # The lock first, so that nobody sees the directory without it.
            lock = self.path + ".lock"
            self._fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            if os.path.exists(lock):
                break
            os.close(self._fd)  # someone cleaned up between the two
        os.mkdir(self.path, 0o700)

    def remove(self) -> None:
        """Remove it, with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        try:
            os.unlink(self.path + ".lock")
        except OSError:
            pass
        os.close(self._fd)


def _base() -> str:
    try:
        base = paths.private_dir(os.path.join(paths.cache(), "outputs"))
        if os.access(base, os.W_OK):
            return base
    except OSError:
        pass
    # A sandbox that keeps the cache from being written.
    return paths.private_dir(os.path.join(tempfile.gettempdir(), f"flowfn-outputs-{os.getuid()}"))
