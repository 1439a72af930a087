"""A reference's data as a local path: in place where it lies on this machine, else through the host's cache."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from .. import paths
from ..errors import DataChanged, DataError
from . import access
from .access import Info, Options
from .spec import redact

if TYPE_CHECKING:
    from .model import Listing

Check = Callable[[Info], None]


@dataclass
class Staged:
    """A local path, and how to let go of it."""

    path: str
    release: Callable[[], None] | None = None
    lease_fd: int | None = None  # what keeps it in the cache; None for what is not there

    def close(self) -> None:
        """Let the cache drop it when it needs the room. Safe to call twice."""
        release, self.release = self.release, None
        if release is not None:
            release()

    def __del__(self) -> None:
        # What was staged ahead for a call is held by nobody once that call has its own.
        self.close()


def file(url: str, options: Options, *, name: str | None, digest: str | None, check: Check) -> Staged:
    """One object as a local file. `check` is told the version that is there, and raises if it is the wrong one."""
    with access.explained(url):
        if (local := access.local_path(url)) is not None:
            info = access.look(url)
            if info.is_dir:
                raise _is_directory(url)
            check(info)
            staged = Staged(local)
        else:
            staged = _cached_file(url, options, check)
        if digest is not None:
            _verify(staged.path, digest, url)
            if name is not None:
                staged.path = _named(staged.path, name, digest)
        return staged


def _cached_file(url: str, options: Options, check: Check) -> Staged:
    from .cache import Cache

    source = access.source(url, options)
    listing = source.listing()
    if not listing.single:
        raise _is_directory(url)
    check(access.info_of(url, listing.objects[0]))
    snapshot = Cache().stage(source, listing=listing)
    return Staged(snapshot.path, snapshot.close, snapshot.lease_fd)


def _is_directory(url: str) -> DataError:
    return DataError(f"{redact(url)} is a directory, not a file", url=redact(url), hint="use flow.Dir")


def look_dir(url: str, options: Options) -> Info:
    """What is below a prefix now: how many objects, their size, and a digest of their versions."""
    with access.explained(url):
        if (local := access.local_path(url)) is not None:
            return _local_dir(url, local)
        return _summary(access.source(_prefix(url), options).listing())


def directory(url: str, options: Options, *, check: Check) -> Staged:
    """All objects below a prefix as a local directory."""
    with access.explained(url):
        if (local := access.local_path(url)) is not None:
            check(_local_dir(url, local))
            return Staged(local)
        from .cache import Cache

        source = access.source(_prefix(url), options)
        listing = source.listing()
        check(_summary(listing))
        snapshot = Cache().stage(source, listing=listing)
        return Staged(snapshot.path, snapshot.close, snapshot.lease_fd)


def _prefix(url: str) -> str:
    return url if url.endswith("/") else url + "/"


def _local_dir(url: str, local: str) -> Info:
    info = access.look(url)
    if not info.is_dir:
        raise DataError(f"{redact(url)} is no directory", url=redact(url), hint="use flow.File")
    return info


def _summary(listing: Listing) -> Info:
    digest = hashlib.sha256()
    for found in listing.objects:
        digest.update(f"{found.key[len(listing.base) :]}\0{found.stamp}\n".encode())
    newest = max((found.modified for found in listing.objects if found.modified is not None), default=None)
    modified = datetime.fromtimestamp(newest, tz=timezone.utc) if newest is not None else None
    return Info(listing.url, True, listing.size, digest.hexdigest(), None, modified, len(listing.objects))


# -- content that is known by its digest -------------------------------------------------------------------------------


def sha256_of(path: str) -> str:
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as opened:
        buffer = memoryview(bytearray(1 << 20))
        while size := opened.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def _verify(path: str, digest: str, url: str) -> None:
    """Compare a file with its digest, once as long as it stays as it is."""
    stat = os.stat(path)
    seen = os.path.join(
        _by_digest(digest), f"seen-{stat.st_dev:x}-{stat.st_ino:x}-{stat.st_mtime_ns:x}-{stat.st_size:x}"
    )
    if os.path.exists(seen):
        return
    found = sha256_of(path)
    if found != digest:
        raise DataChanged(
            f"{redact(url)} is damaged: its content has the SHA-256 {found}, not {digest}",
            url=redact(url),
            hint="upload it again",
        )
    os.close(os.open(seen, os.O_CREAT | os.O_CLOEXEC | os.O_WRONLY, 0o600))


def _named(path: str, name: str, digest: str) -> str:
    """A link to `path` that is called `name`: suffixes mean something to those who open files."""
    if os.path.basename(path) == name:
        return path
    link = os.path.join(paths.private_dir(os.path.join(_by_digest(digest), "named")), name)
    try:
        if os.readlink(link) == path:
            return link
    except OSError:
        pass
    temporary = f"{link}.{os.urandom(4).hex()}"
    os.symlink(path, temporary)
    os.replace(temporary, link)
    return link


def _by_digest(digest: str) -> str:
    return paths.private_dir(os.path.join(paths.cache(), "content", digest[:2], digest))
