"""Compare what is in the cache with what was listed when it came: `flow cache verify`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flowfn_runtime.data.locks import lease
from flowfn_runtime.data.snapshot import read_listing, read_meta
from flowfn_runtime.data.tally import Tally, Tell

if TYPE_CHECKING:
    from flowfn_runtime.data.cache import Cache

_MEBI = 1 << 20
# Sizes of the parts that uploaders use, tried first; any that fits the number of parts is tried after them.
_USUAL_PARTS = (
    5 * _MEBI,
    8 * _MEBI,
    10 * _MEBI,
    16 * _MEBI,
    32 * _MEBI,
    50 * _MEBI,
    64 * _MEBI,
    100 * _MEBI,
    128 * _MEBI,
)


@dataclass(frozen=True)
class Problem:
    """Something in the cache that is not as it should be."""

    url: str
    path: str
    digest: str  # of the snapshot that it is in
    what: str


def verify(cache: Cache, *, content: bool = True, progress: Tell | None = None) -> Iterator[Problem]:
    """Every problem of the snapshots in `cache`: files that are missing, have another length, or (with `content`) have
    other bytes than their ETag says. Each object is read once, in however many snapshots it is."""
    seen: dict[str, str | None] = {}
    tally = Tally(cache.root, cache.room.used_bytes() if progress else None, 0, progress)
    for digest, folder in cache.folders():
        fd = lease(os.path.join(folder, "lease"))
        if fd is None:
            continue  # dropped meanwhile
        try:
            meta = read_meta(folder)
            if meta is None:
                yield Problem("?", folder, digest, "its meta.json can't be read")
                continue
            try:
                for path, name, size, etag, modified in read_listing(folder):
                    file = os.path.join(folder, "tree", path)
                    if name not in seen:
                        seen[name] = _problem(file, size, etag, modified, content)
                        tally.add(size or 0, 1)
                    if what := seen[name]:
                        yield Problem(str(meta["url"]), file, digest, what)
            except (OSError, ValueError) as error:
                yield Problem(str(meta["url"]), folder, digest, f"its listing can't be read: {error}")
        finally:
            os.close(fd)


def _problem(path: str, size: int | None, etag: str | None, modified: float | None, content: bool) -> str | None:
    try:
        status = os.stat(path)
    except OSError as error:
        return f"can't be read: {error.strerror}"
    if size is not None and status.st_size != size:
        return f"has {status.st_size} bytes instead of {size}"
    if modified is not None and abs(status.st_mtime - modified) > 1e-3:
        return "was written to after it was staged"
    if content and etag:
        try:
            if matches(path, status.st_size, etag) is False:
                return "has other content than its ETag says"
        except OSError as error:
            return f"can't be read: {error.strerror}"
    return None


def matches(path: str, size: int, etag: str) -> bool | None:
    """Whether a file's content is that of an S3 ETag; None if the ETag doesn't tell (it is no digest)."""
    digest, dash, count = etag.partition("-")
    if len(digest) != 32 or not set(digest) <= set("0123456789abcdef"):
        return None
    if not dash:
        return _md5(path, 0, size).hexdigest() == digest
    if not count.isdigit() or not int(count):
        return None
    parts = int(count)
    for part in _part_sizes(size, parts):
        whole = hashlib.md5(usedforsecurity=False)
        for index in range(parts):
            whole.update(_md5(path, index * part, part).digest())
        if whole.hexdigest() == digest:
            return True
    return None  # the uploader may have cut it in a way that nobody can guess


def _part_sizes(size: int, parts: int) -> Iterator[int]:
    smallest, largest = -(-size // parts), (size - 1) // (parts - 1) if parts > 1 else size
    tried = set()
    even = -(-smallest // _MEBI) * _MEBI
    for part in (*_USUAL_PARTS, even, smallest, largest):
        if smallest <= part <= largest or (parts == 1 and part >= size):
            if part not in tried:
                tried.add(part)
                yield part
            if parts == 1:
                return


def _md5(path: str, start: int, length: int) -> hashlib._Hash:
    digest = hashlib.md5(usedforsecurity=False)
    buffer = memoryview(bytearray(_MEBI))
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        left = length
        while left > 0 and (count := file.readinto(buffer[: min(left, _MEBI)])):
            digest.update(buffer[:count])
            left -= count
    return digest
