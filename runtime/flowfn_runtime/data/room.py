"""Room in the cache: how much there may be, how much there is, and what goes first."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from flowfn_runtime.data.locks import lease
from flowfn_runtime.errors import CacheFull, ConfigError

# Of the disk that the cache is on, unless FLOW_CACHE_LIMIT says otherwise.
_DEFAULT_SHARE = 0.6
_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 1 << 10,
    "mi": 1 << 20,
    "gi": 1 << 30,
    "ti": 1 << 40,
}
_ORPHAN_SWEEP = 0.9


@dataclass(frozen=True)
class Held:
    """A snapshot as the cache's inventory shows it."""

    digest: str
    url: str
    size_bytes: int
    objects: int
    last_used: float  # seconds since 1970
    in_use: bool
    path: str


class Room:
    """The accounts of the cache in `root`. `limit_bytes` None: `FLOW_CACHE_LIMIT`, else a share of the disk."""

    def __init__(self, root: str, *, limit_bytes: int | None = None) -> None:
        self.root = root
        self._limit = limit_bytes

    @property
    def limit_bytes(self) -> int:
        """How many bytes may be in the cache. Raises `ConfigError` if `FLOW_CACHE_LIMIT` can't be understood."""
        if self._limit is None:
            text = os.environ.get("FLOW_CACHE_LIMIT")
            disk = os.statvfs(self.root)
            total = disk.f_blocks * disk.f_frsize
            self._limit = int(total * _DEFAULT_SHARE) if not text else parse_limit(text, total)
        return self._limit

    def free_bytes(self) -> int:
        """What is free on the cache's disk for this user."""
        disk = os.statvfs(self.root)
        return disk.f_bavail * disk.f_frsize

    def used_bytes(self) -> int:
        """What the cache takes: every object once, and the blocks of those that were read lazily."""
        return sum(size for _, size, _, _ in self._objects()) + self.block_bytes()

    def block_bytes(self) -> int:
        """What lazily read blocks take."""
        return sum(size for _, size, _ in self._blocks())

    def require(self, url: str, need: int) -> None:
        """Make room for `need` more bytes. Raises `CacheFull`, and then has dropped nothing that is in use."""
        if need > self.limit_bytes or not self.make(need):
            raise self.full(url, need)

    def make(self, need: int, *, evict_at_least: int = 0) -> bool:
        """Drop what was used least recently until `need` bytes fit. False if they can't."""
        held = self.snapshots()
        # Snapshots share objects, so this is an upper bound; it spares a full count of a cache with room to spare.
        if evict_at_least == 0 and self.free_bytes() >= need:
            bound = sum(snapshot.size_bytes for snapshot in held) + self.block_bytes()
            if bound + need <= _ORPHAN_SWEEP * self.limit_bytes:
                return True
        used = self.used_bytes()
        idle = sum(snapshot.size_bytes for snapshot in held if not snapshot.in_use)
        orphans = sum(size for _, size, links, _ in self._objects() if links == 1)
        idle += self.block_bytes()  # as far as they are idle: an upper bound will do
        if self.free_bytes() + idle + orphans < need or used - idle - orphans + need > self.limit_bytes:
            return False  # dropping everything would not help: drop nothing

        def fits() -> bool:
            return used + need <= self.limit_bytes and self.free_bytes() >= need and evict_at_least <= dropped

        dropped = 0
        if not fits():
            dropped += self._drop_orphans()
            used -= dropped
        for _, drop in sorted(self._candidates(held), key=lambda candidate: candidate[0]):
            if fits():
                break
            freed = drop() or 0
            dropped += freed
            used -= freed
        return fits()

    def _candidates(self, held: list[Held]) -> Iterator[tuple[float, Callable[[], int | None]]]:
        """What could be dropped: when it was used last, and how to."""
        for snapshot in held:
            yield snapshot.last_used, lambda digest=snapshot.digest: self.drop(digest)  # type: ignore[misc]
        for path, _, used in self._blocks():
            yield used, lambda path=path: self.drop_blocks(path)  # type: ignore[misc]

    def full(self, url: str, need: int) -> CacheFull:
        """The error that says who takes the room."""
        busy = [snapshot for snapshot in self.snapshots() if snapshot.in_use]
        parts = [
            f"{size(need)} of {url} don't fit into the cache {self.root}: it may hold {size(self.limit_bytes)} and "
            f"holds {size(self.used_bytes())}, and its disk has {size(self.free_bytes())} free"
        ]
        disk = os.statvfs(self.root)
        if disk.f_files and need <= self.free_bytes():
            parts.append(f"of the {disk.f_files:,} files (inodes) of the disk {disk.f_favail:,} are free")
        if busy:
            shown = ", ".join(f"{snapshot.url} ({size(snapshot.size_bytes)})" for snapshot in busy[:3])
            more = f" and {len(busy) - 3} more" if len(busy) > 3 else ""
            parts.append(f"running tasks hold {shown}{more}")
        return CacheFull(
            "; ".join(parts) + ".",
            url=url,
            hint="Make room on the disk, put FLOW_CACHE on a larger one, raise FLOW_CACHE_LIMIT, or mount with "
            'mode="lazy", which needs no room for the whole.',
        )

    # -- inventory -----------------------------------------------------------------------------------------------------

    def snapshots(self) -> list[Held]:
        """Every complete snapshot."""
        found: list[Held] = []
        with os.scandir(os.path.join(self.root, "snapshots")) as entries:
            folders = [(entry.name, entry.path) for entry in entries]
        for digest, folder in folders:
            try:
                with open(os.path.join(folder, "meta.json"), encoding="utf-8") as file:
                    meta = json.load(file)
                used = os.stat(os.path.join(folder, "lease")).st_mtime
            except (OSError, ValueError):
                meta, used = {}, 0.0
            found.append(
                Held(
                    digest=digest,
                    url=str(meta.get("url", "?")),
                    size_bytes=int(meta.get("size_bytes", 0)),
                    objects=int(meta.get("objects", 0)),
                    last_used=used,
                    in_use=self._in_use(folder),
                    path=os.path.join(folder, "tree"),
                )
            )
        return found

    def _in_use(self, folder: str) -> bool:
        path = os.path.join(folder, "lease")
        fd = lease(path, exclusive=True)
        if fd is None:
            return os.path.exists(path)
        os.close(fd)
        return False

    def _objects(self) -> list[tuple[str, int, int, float]]:
        """Path, bytes, links and time of the last change of each object."""
        found: list[tuple[str, int, int, float]] = []
        for shard in os.scandir(os.path.join(self.root, "objects")):
            for entry in os.scandir(shard.path):
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                found.append((entry.path, status.st_size, status.st_nlink, status.st_ctime))
        return found

    # -- dropping ------------------------------------------------------------------------------------------------------

    def drop(self, digest: str) -> int | None:
        """Drop a snapshot, and the objects that nothing else uses; the bytes freed, None if it is in use or gone."""
        folder = os.path.join(self.root, "snapshots", digest)
        fd = lease(os.path.join(folder, "lease"), exclusive=True)
        if fd is None:
            return None
        try:
            names = _names(folder)
            trash = os.path.join(self.root, "trash", os.urandom(12).hex())
            os.rename(folder, trash)
        finally:
            os.close(fd)
        shutil.rmtree(trash, ignore_errors=True)
        return self.drop_objects(names)

    def _blocks(self) -> list[tuple[str, int, float]]:
        """Path, bytes on the disk and time of the last use of each lazily read object's blocks."""
        found: list[tuple[str, int, float]] = []
        try:
            shards = list(os.scandir(os.path.join(self.root, "blocks")))
        except FileNotFoundError:
            return found
        for shard in shards:
            for entry in os.scandir(shard.path):
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if not entry.name.endswith(".map"):
                    found.append((entry.path, status.st_blocks * 512, max(status.st_atime, status.st_mtime)))
        return found

    def drop_blocks(self, path: str) -> int | None:
        """Drop the blocks of one object; the bytes freed, None if somebody has it open."""
        fd = lease(path, exclusive=True)
        if fd is None:
            return None
        try:
            freed = os.fstat(fd).st_blocks * 512
            os.unlink(path)
            os.unlink(path + ".map")
        except FileNotFoundError:
            return None
        finally:
            os.close(fd)
        return freed

    def prune(self, keep_bytes: int) -> None:
        """Drop what is not in use, the least recently used first, until no more than `keep_bytes` are left."""
        self.sweep()
        used = self.used_bytes() - self._drop_orphans()
        for _, drop in sorted(self._candidates(self.snapshots()), key=lambda candidate: candidate[0]):
            if used <= keep_bytes:
                return
            used -= drop() or 0

    def discard(self, digest: str) -> bool:
        """Drop a damaged snapshot with its objects, so that they are fetched anew. False if it is in use or gone."""
        names = _names(os.path.join(self.root, "snapshots", digest))
        if self.drop(digest) is None:
            return False
        for name in names:
            try:
                # Other snapshots that share the object keep their link to it.
                os.unlink(f"{self.root}/objects/{name[:2]}/{name}")
            except FileNotFoundError:
                pass
        return True

    def drop_objects(self, names: list[str]) -> int:
        """Drop those of the objects that no snapshot uses; the bytes freed."""
        freed = 0
        for name in names:
            path = f"{self.root}/objects/{name[:2]}/{name}"
            try:
                status = os.stat(path)
                if status.st_nlink == 1:
                    os.unlink(path)
                    freed += status.st_size
            except FileNotFoundError:
                pass
        return freed

    def _drop_orphans(self) -> int:
        """Drop objects that no snapshot uses: they came for one that was never finished."""
        return self.drop_objects([os.path.basename(path) for path, _, links, _ in self._objects() if links == 1])

    def sweep(self) -> None:
        """Remove what killed processes left behind."""
        for entry in os.scandir(os.path.join(self.root, "building")):
            fd = lease(os.path.join(entry.path, "lease"), exclusive=True)
            if fd is not None:
                try:
                    shutil.rmtree(entry.path, ignore_errors=True)
                finally:
                    os.close(fd)
            elif not os.path.exists(os.path.join(entry.path, "lease")):
                # Killed between two system calls, or just about to make its lease: an empty folder, nothing in it.
                self._remove_empty(entry.path)
        for entry in os.scandir(os.path.join(self.root, "trash")):
            shutil.rmtree(entry.path, ignore_errors=True)

    def _remove_empty(self, path: str) -> None:
        try:
            os.rmdir(path)
        except OSError:
            pass


def _names(folder: str) -> list[str]:
    try:
        with open(os.path.join(folder, "listing"), encoding="utf-8") as file:
            return [json.loads(line)[1] for line in file if line.strip()]
    except (OSError, ValueError, IndexError):
        return []


def parse_limit(text: str, disk_bytes: int, *, name: str = "FLOW_CACHE_LIMIT") -> int:
    """Bytes of `"500GB"`, `"1.5TiB"` or `"50%"` (of `disk_bytes`). Raises `ConfigError`, which says `name`."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(%|[kmgt]?i?)b?\s*", text, re.IGNORECASE)
    unit = match.group(2).lower() if match else "?"
    if match is None or (unit != "%" and unit not in _UNITS):
        raise ConfigError(f"{name} is {text!r}.", hint='Write a size such as "500GB" or "1.5TiB", or "50%".')
    number = float(match.group(1))
    return int(disk_bytes * number / 100) if unit == "%" else int(number * _UNITS[unit])


def size(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
