"""The host's cache of staged data: shared by every process of the account, with no daemon.

```
<cache>/data/
  objects/<2>/<name>      an object's bytes; the name says which version of which object of which store
  snapshots/<digest>/     what one listing stood for
    tree/...              its files: hard links to objects
    lease                 locked (shared) by whoever uses the snapshot; its mtime is the last use
    meta.json, listing    what it is, and which file is which object
  building/<random>/      a snapshot that is not complete yet, its lease locked by its maker
  trash/                  on its way out
  latest/<name>           what a URL was listed as the last time, and which snapshot that is
  locks                   one download per object, one maker per snapshot
```

An object gets its name only when it is complete and verified, and a snapshot is renamed into place, so a process may be
killed at any moment: what it leaves is whole, or is in `building` with a free lease, and the next one sweeps it out.
Eviction takes an exclusive lease, which it can't get while a task runs.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from flowfn_runtime import paths
from flowfn_runtime.data import crew
from flowfn_runtime.data.depot import Depot, ObjectJob
from flowfn_runtime.data.locks import lease
from flowfn_runtime.data.model import Listing, Object, Progress
from flowfn_runtime.data.room import Room
from flowfn_runtime.data.sources import Source, page_hints
from flowfn_runtime.data.spec import redact
from flowfn_runtime.data.tree import Tree, plan
from flowfn_runtime.errors import CacheFull, DataChanged, DataError

Tell = Callable[[Progress], None]

_FORMAT = "1"
# A bucket that is written to while it is staged: how many listings to try before saying so.
_LISTINGS = 3


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


class Cache:
    """The cache in `root` (`FLOW_CACHE`, ... see `paths.cache`), with at most `limit_bytes` in it."""

    def __init__(self, root: str | None = None, *, limit_bytes: int | None = None) -> None:
        self.root = os.path.join(root or paths.cache(), "data")
        try:
            for name in ("", "objects", "snapshots", "building", "trash", "latest"):
                paths.private_dir(os.path.join(self.root, name))
        except OSError as error:
            raise DataError(
                f"The cache can't be in {self.root}: {error.strerror}.", hint="Choose another place: FLOW_CACHE."
            ) from error
        self.room = Room(self.root, limit_bytes=limit_bytes)

    def stage(
        self,
        source: Source,
        *,
        listing: Listing | None = None,
        mount_points: Sequence[str] = (),
        progress: Tell | None = None,
    ) -> Snapshot:
        """Make sure that what `source` (or the `listing` of it) stands for is here, whole, and lease it.

        `mount_points` are relative paths at which the tree must have directories. A source that changes during the
        transfer is listed again, unless a listing was given. Raises `DataError`s, `CacheFull` among them.
        """
        tries = 1 if listing else _LISTINGS
        points = sorted(set(mount_points))
        while True:
            tries -= 1
            latest = Latest.read(self.root, source, points)
            found = listing or source.listing(hints=latest.hints)
            if found.mark is not None and found.mark == latest.mark and (same := self._lease(latest.digest, found)):
                return same
            try:
                snapshot = self._snapshot(source, found, points, progress)
                latest.update(found, snapshot.digest)
                return snapshot
            except DataChanged:
                if not tries:
                    raise

    # -- one listing ---------------------------------------------------------------------------------------------------

    def _snapshot(self, source: Source, listing: Listing, mount_points: list[str], progress: Tell | None) -> Snapshot:
        tree = plan(listing)
        names = [object_name(source.identity, object) for _, object in tree.files]
        digest = _digest(listing, tree, names, mount_points)
        if snapshot := self._lease(digest, listing):
            return snapshot
        folder = os.path.join(self.root, "building", os.urandom(12).hex())
        depot = Depot(self.root, os.path.join(folder, "arrivals"), listing.url)
        try:
            # Whoever else wants this very snapshot waits here, and then finds it.
            depot.locks.wait(digest)
            if snapshot := self._lease(digest, listing):
                return snapshot
            for again in (True, False):
                build = _Build(self, source, listing, tree, names, mount_points, depot, folder, progress)
                try:
                    built = build.run(digest)
                    break
                except OSError as error:
                    full = not isinstance(error, DataError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
                    build.undo(fetched_too=full or isinstance(error, CacheFull))
                    if not full:
                        raise
                    if not again or not self.room.make(build.missing_bytes, evict_at_least=1):
                        raise self.room.full(redact(listing.url), build.missing_bytes) from None
                except BaseException:
                    build.undo(fetched_too=False)
                    raise
        finally:
            depot.close()
        return built

    def _lease(self, digest: str, listing: Listing) -> Snapshot | None:
        """The snapshot `digest` if it is there, leased."""
        folder = os.path.join(self.root, "snapshots", digest)
        fd = lease(os.path.join(folder, "lease"))
        if fd is None:
            return None
        try:
            meta = read_meta(folder)
            if meta is None or (meta["boot"] != boot_id() and not _survived(folder, meta)):
                # The machine went down before the disk had it all: make it again.
                os.close(fd)
                self.room.drop(digest)
                return None
            os.utime(fd)
        except BaseException:
            os.close(fd)
            raise
        return _opened(listing, folder, digest, meta, fd, fetched=0)

    # -- what is there -------------------------------------------------------------------------------------------------

    def folders(self) -> Iterator[tuple[str, str]]:
        """Digest and folder of every snapshot."""
        with os.scandir(os.path.join(self.root, "snapshots")) as entries:
            for entry in entries:
                yield entry.name, entry.path


@dataclass
class Latest:
    """What a URL stood for the last time: makes the next listing faster, and decides nothing."""

    path: str
    hints: list[str] = field(default_factory=list)
    mark: str | None = None  # of the listing
    digest: str = ""  # of the snapshot

    @classmethod
    def read(cls, root: str, source: Source, mount_points: Sequence[str]) -> Latest:
        """What is known of `source`, mounted with those mount points."""
        known = "\0".join((_FORMAT, source.identity, source.url, *mount_points))
        path = os.path.join(root, "latest", hashlib.sha256(known.encode("utf-8", "surrogatepass")).hexdigest()[:40])
        try:
            with open(path, encoding="utf-8") as file:
                return cls(path, **json.load(file))
        except (OSError, ValueError, TypeError):
            return cls(path)

    def update(self, listing: Listing, digest: str) -> None:
        """Keep what the next one will want to know: of listings that take more than a page."""
        hints = page_hints(listing.objects)
        if hints:
            text = json.dumps({"hints": hints, "mark": listing.mark, "digest": digest})
            write_file(self.path, text.encode())
        elif os.path.exists(self.path):
            os.unlink(self.path)


class _Build:
    """One snapshot under construction, in a folder of its own that nobody else looks into."""

    def __init__(
        self,
        cache: Cache,
        source: Source,
        listing: Listing,
        tree: Tree,
        names: list[str],
        mount_points: list[str],
        depot: Depot,
        folder: str,
        progress: Tell | None,
    ) -> None:
        self.root = cache.root
        self.room = cache.room
        self.source = source
        self.listing = listing
        self.names = names
        self.plan = tree
        self.mount_points = mount_points
        self.depot = depot
        self.folder = folder
        self.progress = progress
        self.tree = os.path.join(folder, "tree")
        self.lease_fd = -1
        self.fetched: list[str] = []
        self.missing_bytes = 0

    def run(self, digest: str) -> Snapshot:
        self.room.sweep()
        self.lease_fd = self._own_folder()
        os.mkdir(self.tree)
        os.mkdir(self.depot.arrivals)
        for name in self.plan.directories:
            os.mkdir(os.path.join(self.tree, name))
        for name in self.mount_points:
            os.makedirs(os.path.join(self.tree, name), exist_ok=True)
        missing: dict[str, ObjectJob] = {}  # by path
        for (path, object), name in zip(self.plan.files, self.names, strict=True):
            job = ObjectJob(self.depot, object, name)
            if not job.place(f"{self.tree}/{path}"):
                missing[path] = job
        self.missing_bytes = sum(job.object.size or 0 for job in missing.values())
        count = 0
        if missing:
            for shard in {job.name[:2] for job in missing.values()}:
                os.makedirs(os.path.join(self.root, "objects", shard), mode=0o700, exist_ok=True)
            self.room.require(redact(self.listing.url), self.missing_bytes)
            count = self._fetch(missing)
        shutil.rmtree(self.depot.arrivals)
        return self._finish(digest, count)

    def _own_folder(self) -> int:
        while True:
            os.mkdir(self.folder, 0o700)
            # Another process that sweeps may come between any two of these and take the folder for abandoned.
            try:
                fd = lease(os.path.join(self.folder, "lease"), create=True)
            except FileNotFoundError:
                fd = None
            if fd is not None:
                return fd

    def _fetch(self, missing: dict[str, ObjectJob]) -> int:
        count = 0
        while missing:
            depot = self.depot
            depot.deferred = []
            self.fetched += [job.name for job in missing.values()]
            count += crew.fetch(depot, self.source, list(missing.values()), progress=self.progress)
            # Other processes are fetching these: wait for each, then take what they made (or make it, if they failed).
            for job in depot.deferred:
                depot.locks.wait(job.name)
                depot.locks.release(job.name)
            missing = {path: job for path, job in missing.items() if not job.place(f"{self.tree}/{path}")}
        return count

    def _finish(self, digest: str, fetched: int) -> Snapshot:
        listing = self.listing
        meta = {
            "format": _FORMAT,
            "url": redact(listing.url),
            "single": listing.single,
            "size_bytes": listing.size,
            "objects": len(self.plan.files),
            "boot": boot_id(),
        }
        lines = (
            json.dumps([path, name, object.size, object.etag, object.modified])
            for (path, object), name in zip(self.plan.files, self.names, strict=True)
        )
        write_file(os.path.join(self.folder, "listing"), ("\n".join(lines) + "\n").encode())
        write_file(os.path.join(self.folder, "meta.json"), json.dumps(meta).encode())
        final = os.path.join(self.root, "snapshots", digest)
        os.rename(self.folder, final)
        fd, self.lease_fd = self.lease_fd, -1
        return _opened(listing, final, digest, meta, fd, fetched=fetched)

    def undo(self, *, fetched_too: bool) -> None:
        """Remove what was built. Objects that arrived are kept for another try, unless there is no room for them."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.lease_fd >= 0:
            os.close(self.lease_fd)
            self.lease_fd = -1
        if fetched_too:
            self.room.drop_objects(self.fetched)


# -- names and records -------------------------------------------------------------------------------------------------


def object_name(identity: str, object: Object) -> str:
    """The name of one version of one object of one store."""
    return hashlib.sha256(f"{identity}\0{object.key}\0{object.stamp}".encode("utf-8", "surrogatepass")).hexdigest()[:40]


def _digest(listing: Listing, tree: Tree, names: list[str], mount_points: list[str]) -> str:
    """The name of a snapshot: the same for the same versions at the same paths."""
    parts = [_FORMAT, str(listing.single), *mount_points, "", *tree.directories, ""]
    for (path, _), name in zip(tree.files, names, strict=True):
        parts.append(path)
        parts.append(name)
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:40]


def _opened(listing: Listing, folder: str, digest: str, meta: dict[str, Any], fd: int, *, fetched: int) -> Snapshot:
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
    return meta if isinstance(meta, dict) and meta.get("format") == _FORMAT else None


def read_listing(folder: str) -> Iterator[tuple[str, str, int | None, str | None, float | None]]:
    """Path, object's name, size, ETag and time of modification of each of a snapshot's files."""
    with open(os.path.join(folder, "listing"), encoding="utf-8") as file:
        for line in file:
            if line.strip():
                path, name, size, etag, modified = json.loads(line)
                yield path, name, size, etag, modified


def _survived(folder: str, meta: dict[str, Any]) -> bool:
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
