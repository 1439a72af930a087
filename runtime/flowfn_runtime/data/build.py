"""Makes one snapshot of the cache: what is missing is fetched, and all of it put at its place in a new tree."""

from __future__ import annotations

import json
import os
import shutil

from flowfn_runtime.data import crew
from flowfn_runtime.data.depot import Depot, ObjectJob
from flowfn_runtime.data.locks import lease
from flowfn_runtime.data.model import Listing
from flowfn_runtime.data.room import Room
from flowfn_runtime.data.snapshot import FORMAT, Snapshot, boot_id, opened, write_file
from flowfn_runtime.data.sources import Source
from flowfn_runtime.data.spec import redact
from flowfn_runtime.data.tally import Tell
from flowfn_runtime.data.tree import Tree


class Build:
    """One snapshot under construction, in a folder of its own that nobody else looks into."""

    def __init__(
        self,
        root: str,
        room: Room,
        source: Source,
        listing: Listing,
        tree: Tree,
        names: list[str],
        mount_points: list[str],
        depot: Depot,
        folder: str,
        progress: Tell | None,
    ) -> None:
        self.root = root
        self.room = room
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
        """Make it, leased."""
        self.room.sweep()
        self.lease_fd = self._own_folder()
        os.mkdir(self.tree)
        for name in self.plan.directories:
            os.mkdir(os.path.join(self.tree, name))
        for name in self.mount_points:
            os.makedirs(os.path.join(self.tree, name), exist_ok=True)
        shards = set(os.listdir(os.path.join(self.root, "objects")))
        missing: list[ObjectJob] = []
        for (path, object), name in zip(self.plan.files, self.names, strict=True):
            job = ObjectJob(self.depot, object, name, f"{self.tree}/{path}")
            if name[:2] not in shards or not job.place():
                missing.append(job)
        self.missing_bytes = sum(job.object.size or 0 for job in missing)
        count = 0
        if missing:
            for shard in {job.name[:2] for job in missing} - shards:
                os.makedirs(os.path.join(self.root, "objects", shard), mode=0o700, exist_ok=True)
            self.room.require(redact(self.listing.url), self.missing_bytes)
            count = self._fetch(missing)
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

    def _fetch(self, missing: list[ObjectJob]) -> int:
        count = 0
        while missing:
            depot = self.depot
            depot.deferred = []
            self.fetched += [job.name for job in missing]
            count += crew.fetch(depot, self.source, missing, progress=self.progress)
            # Other processes are fetching these: wait for each, then take what they made (or make it, if they failed).
            for job in depot.deferred:
                depot.locks.wait(job.name)
                depot.locks.release(job.name)
            missing = [job for job in missing if not job.place()]
        return count

    def _finish(self, digest: str, fetched: int) -> Snapshot:
        listing = self.listing
        meta = {
            "format": FORMAT,
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
        return opened(listing, final, digest, meta, fd, fetched=fetched)

    def undo(self, *, fetched_too: bool) -> None:
        """Remove what was built. Objects that arrived are kept for another try, unless there is no room for them."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.lease_fd >= 0:
            os.close(self.lease_fd)
            self.lease_fd = -1
        if fetched_too:
            self.room.drop_objects(self.fetched)
