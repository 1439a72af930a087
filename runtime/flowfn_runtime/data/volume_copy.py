"""The working copy of a volume that lives in a bucket, and what is known of it on this host.

A host's copy has a base: the manifest that it was made from. What differs from it are changes of this host. It is
fetched when it is attached (volume_fetch), and written back when it is free again (volume_sync).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import DataNotFound, VolumeError, VolumeNotFound
from .staging import sha256_of
from .volume_bucket import Bucket

if TYPE_CHECKING:
    from .volumes import Volume

Entry = list[Any]  # kind ("f", "d", "l"), mode, mtime in ns, size, SHA-256 or the link's target
Entries = dict[str, Entry]

_THREADS = 16
_TICK_NS = 50_000_000


@dataclass
class Base:
    """What a working copy was made from."""

    generation: int = 0  # 0: nothing was ever written
    etag: str | None = None  # of the head; None: there is none
    manifest: str | None = None  # its name in the bucket
    entries: Entries = field(default_factory=dict)
    contents: dict[str, str] = field(default_factory=dict)  # SHA-256 -> its name in the bucket
    seen: dict[str, list[int]] = field(default_factory=dict)  # path -> (size, mtime, inode, ctime) when it was hashed
    applying: bool = False  # the copy is being changed to another base, and may be half of either


def folder(volume: Volume) -> str:
    return os.path.dirname(volume.path)


def load(volume: Volume) -> Base:
    try:
        with open(os.path.join(folder(volume), "base.json"), encoding="utf-8") as file:
            return Base(**json.load(file))
    except FileNotFoundError:
        return Base()


def save(volume: Volume, base: Base) -> None:
    path = os.path.join(folder(volume), "base.json")
    with open(path + ".part", "w", encoding="utf-8") as file:
        json.dump(base.__dict__, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".part", path)


@contextmanager
def alone(volume: Volume) -> Iterator[None]:
    """One process of this host at a time moves a volume's data."""
    fd = os.open(os.path.join(folder(volume), "sync.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


# -- what is there -----------------------------------------------------------------------------------------------------


def scan(volume: Volume, base: Base) -> tuple[Entries, dict[str, list[int]]]:
    """The working copy's entries. Files that look as they did when they were last hashed are not hashed again."""
    entries: Entries = {}
    seen: dict[str, list[int]] = {}
    # A file that changed only just now may change again within the same tick of the clock.
    settled = time.time_ns() - _TICK_NS
    pending = [""]
    while pending:
        prefix = pending.pop()
        for item in _listed(os.path.join(volume.path, prefix)):
            with suppress(FileNotFoundError):  # removed meanwhile
                relative = prefix + item.name
                status = item.stat(follow_symlinks=False)
                mode = stat.S_IMODE(status.st_mode)
                if stat.S_ISDIR(status.st_mode):
                    entries[relative] = ["d", mode, status.st_mtime_ns, 0, ""]
                    pending.append(relative + "/")
                elif stat.S_ISLNK(status.st_mode):
                    entries[relative] = ["l", 0, status.st_mtime_ns, 0, os.readlink(item.path)]
                elif stat.S_ISREG(status.st_mode):
                    mark = [status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns]
                    known = base.entries.get(relative)
                    if known is not None and base.seen.get(relative) == mark and not base.applying:
                        digest = known[4]
                    else:
                        digest = sha256_of(item.path)
                    entries[relative] = ["f", mode, status.st_mtime_ns, status.st_size, digest]
                    if mark[3] < settled:
                        seen[relative] = mark
                # Sockets, pipes and devices mean nothing on another host.
    return entries, seen


def _listed(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as listed:
            return list(listed)
    except FileNotFoundError:
        return []


def marks(volume: Volume, entries: Entries) -> dict[str, list[int]]:
    """How files look whose content is known to be that of `entries`."""
    settled = time.time_ns() - _TICK_NS
    marks: dict[str, list[int]] = {}
    for relative, entry in entries.items():
        if entry[0] == "f":
            status = os.lstat(os.path.join(volume.path, relative))
            if status.st_ctime_ns < settled:
                marks[relative] = [status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns]
    return marks


# -- what is in the bucket ---------------------------------------------------------------------------------------------


def key(volume: Volume, bucket: Bucket, *parts: str) -> str:
    return bucket.key(volume.project, "volumes", volume.id, *parts)


def manifest(volume: Volume, bucket: Bucket, name: str, sha256: str | None) -> tuple[Entries, dict[str, str]]:
    at = key(volume, bucket, "manifests", name)
    found = bucket.get(at)
    if found is None:
        raise DataNotFound(f"there is no {bucket.url_of(at)}", url=bucket.url_of(at))
    if sha256 is not None and hashlib.sha256(found[0]).hexdigest() != sha256:
        raise VolumeError(f"{bucket.url_of(at)} is damaged: its SHA-256 is not that of the head")
    content = json.loads(found[0])
    entries: Entries = content["entries"]
    contents: dict[str, str] = content["contents"]
    for relative in entries:
        parts = relative.split("/")
        parents = ("/".join(parts[:count]) for count in range(1, len(parts)))
        if any(part in ("", ".", "..") for part in parts) or any(entries.get(up, "?")[0] != "d" for up in parents):
            raise VolumeError(f"{bucket.url_of(at)} has an impossible path: {relative!r}")
    return entries, contents


def gone(volume: Volume, bucket: Bucket) -> VolumeNotFound:
    return VolumeNotFound(
        f"volume {volume.label} is gone from {bucket.url}", hint=f"this host's copy of it is still at {volume.path}"
    )


def in_threads(work: Callable[[str], None], items: list[str]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="flowfn-volume") as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
