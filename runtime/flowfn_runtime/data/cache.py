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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from flowfn_runtime import paths
from flowfn_runtime.data.build import Build
from flowfn_runtime.data.depot import Depot
from flowfn_runtime.data.locks import lease
from flowfn_runtime.data.model import Listing
from flowfn_runtime.data.room import Room
from flowfn_runtime.data.snapshot import (
    FORMAT,
    Snapshot,
    boot_id,
    object_name,
    opened,
    read_meta,
    snapshot_name,
    survived,
    write_file,
)
from flowfn_runtime.data.sources import Source, page_hints
from flowfn_runtime.data.spec import redact
from flowfn_runtime.data.tally import Tell
from flowfn_runtime.data.tree import plan
from flowfn_runtime.errors import CacheFull, DataChanged, DataError

# A bucket that is written to while it is staged: how many listings to try before saying so.
_LISTINGS = 3


class Cache:
    """The cache in `root` (`FLOW_CACHE`, ... see `paths.cache`), with at most `limit_bytes` in it."""

    def __init__(self, root: str | None = None, *, limit_bytes: int | None = None) -> None:
        self.root = os.path.join(os.path.abspath(root) if root else paths.cache(), "data")
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
        digest = snapshot_name(listing, tree, names, mount_points)
        if snapshot := self._lease(digest, listing):
            return snapshot
        folder = os.path.join(self.root, "building", os.urandom(12).hex())
        depot = Depot(self.root, listing.url)
        try:
            # Whoever else wants this very snapshot waits here, and then finds it.
            depot.locks.wait(digest)
            if snapshot := self._lease(digest, listing):
                return snapshot
            for again in (True, False):
                build = Build(self.root, self.room, source, listing, tree, names, mount_points, depot, folder, progress)
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
            if meta is None or (meta["boot"] != boot_id() and not survived(folder, meta)):
                # The machine went down before the disk had it all: make it again.
                os.close(fd)
                self.room.drop(digest)
                return None
            os.utime(fd)
        except BaseException:
            os.close(fd)
            raise
        return opened(listing, folder, digest, meta, fd, fetched=0)

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
        known = "\0".join((FORMAT, source.identity, source.url, *mount_points))
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
