"""Files that appear whole: without a name while they are written, so that of a killed process nothing is left."""

from __future__ import annotations

import errno
import os
import tempfile

from flowfn_runtime.errors import DataError


def nameless(folder: str, mode: int) -> int | None:
    """A new file in `folder` that has no name there; None where the system has none."""
    flags = getattr(os, "O_TMPFILE", None)
    if flags is None or not os.path.isdir("/proc/self/fd"):
        return None
    try:
        return os.open(folder, os.O_RDWR | flags | os.O_CLOEXEC, mode)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):
            raise
        return None


def give_name(fd: int, path: str) -> None:
    """Let a nameless file appear at `path`, where nothing may be."""
    # The directory's descriptor is of no account, but makes Python follow the link.
    os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd, follow_symlinks=True)


class NewFile:
    """A file to be written to `fd`, which `commit` puts at `path` in one step, in place of what is there."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._folder = os.path.dirname(os.path.abspath(path))
        self._temporary: str | None = None  # where the system has no nameless files
        fd = nameless(self._folder, 0o600)
        if fd is None:
            try:
                fd, self._temporary = tempfile.mkstemp(prefix=".flow-", dir=self._folder)
            except FileNotFoundError:
                raise DataError(
                    f"There is no directory {self._folder}.", url=path, hint=f"mkdir -p {self._folder}"
                ) from None
        self.fd = fd

    def commit(self) -> None:
        """All is written."""
        try:
            if self._temporary is None:
                try:
                    give_name(self.fd, self.path)
                    return
                except FileExistsError:
                    temporary = os.path.join(self._folder, f".flow-{os.urandom(6).hex()}")
                    give_name(self.fd, temporary)
                    self._temporary = temporary
            os.replace(self._temporary, self.path)
            self._temporary = None
        finally:
            self.drop()

    def drop(self) -> None:
        """Close it; if it was not committed, nothing of it is left."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
        if self._temporary is not None:
            os.unlink(self._temporary)
            self._temporary = None


def new_mode() -> int:
    """The mode that this process's new files have. Ask once: to ask for it is to change it for a moment."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
