"""What is kept of one listing that was staged: its names, its records, and the handle of those who use it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from flowfn_runtime.data.model import Listing, Object
from flowfn_runtime.data.spec import redact
from flowfn_runtime.data.tree import Tree

FORMAT = "1"


@dataclass
class Snapshot:
    """Staged data that stays until `close()`, here and in every process that inherited `lease_fd`.

    `path` is the directory (or, for a single object, the file); `fetched_bytes` is what this use had to download.
    """

    url: str
    path: str
    digest: str
    single: bool
    size_bytes: int
    objects: int
    fetched_bytes: int
    lease_fd: int = field(repr=False)

    def close(self) -> None:
        """Let the cache drop the data when it needs room. Safe to call twice."""
        fd, self.lease_fd = self.lease_fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def object_name(identity: str, object: Object) -> str:
    """The name of one version of one object of one store; one of its own if the store tells no versions apart."""
    if not object.etag and not object.version and object.modified is None:
        return os.urandom(20).hex()
    return hashlib.sha256(f"{identity}\0{object.key}\0{object.stamp}".encode("utf-8", "surrogatepass")).hexdigest()[:40]


def snapshot_name(listing: Listing, tree: Tree, names: list[str], mount_points: list[str]) -> str:
    """The name of a snapshot: the same for the same versions at the same paths."""
    parts = [FORMAT, str(listing.single), *mount_points, "", *tree.directories, ""]
    for (path, _), name in zip(tree.files, names, strict=True):
        parts.append(path)
        parts.append(name)
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:40]


def opened(listing: Listing, folder: str, digest: str, meta: dict[str, Any], fd: int, *, fetched: int) -> Snapshot:
    """The snapshot in `folder`, held by the lease `fd`."""
    path = os.path.join(folder, "tree")
    if listing.single:
        path = os.path.join(path, listing.objects[0].key[len(listing.base) :])
    os.set_inheritable(fd, True)
    return Snapshot(
        url=redact(listing.url),
        path=path,
        digest=digest,
        single=listing.single,
        size_bytes=meta["size_bytes"],
        objects=meta["objects"],
        fetched_bytes=fetched,
        lease_fd=fd,
    )


def read_meta(folder: str) -> dict[str, Any] | None:
    """What a snapshot says of itself; None if that is not readable."""
    try:
        with open(os.path.join(folder, "meta.json"), encoding="utf-8") as file:
            meta = json.load(file)
    except (OSError, ValueError):
        return None
    return meta if isinstance(meta, dict) and meta.get("format") == FORMAT else None


def read_listing(folder: str) -> Iterator[tuple[str, str, int | None, str | None, float | None]]:
    """Path, object's name, size, ETag and time of modification of each of a snapshot's files."""
    with open(os.path.join(folder, "listing"), encoding="utf-8") as file:
        for line in file:
            if line.strip():
                path, name, size, etag, modified = json.loads(line)
                yield path, name, size, etag, modified


def survived(folder: str, meta: dict[str, Any]) -> bool:
    """Whether a snapshot from before the machine's last start is as long as it should be everywhere.

    Nothing is synced to the disk when it is staged (that would double the time), so a crash may have cut files short.
    """
    try:
        for path, _, size, _, _ in read_listing(folder):
            if size is not None and os.stat(os.path.join(folder, "tree", path)).st_size != size:
                return False
    except (OSError, ValueError):
        return False
    meta["boot"] = boot_id()
    write_file(os.path.join(folder, "meta.json"), json.dumps(meta).encode())
    return True


def boot_id() -> str:
    """What tells this start of the machine from every other."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def write_file(path: str, content: bytes) -> None:
    """Write a small private file whole or not at all."""
    temporary = f"{path}.{os.urandom(6).hex()}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        try:
            os.unlink(temporary)
        except OSError:
            pass
        raise
