"""The working copy of a volume that lives in a bucket: fetched when it is attached, written back when it is free again.

A host's copy has a base: the manifest that it was made from. What differs from it are changes of this host. They are
written back as a new manifest, in place of the base and of nothing else: if another host was first, that is a
`VolumeConflict`, and both states stay, the other one in the bucket, ours in a directory that the error names.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import DataError, DataNotFound, VolumeConflict, VolumeError, VolumeNotFound
from . import access
from .http1 import WireError
from .model import Object
from .retry import Patience
from .staging import sha256_of
from .upload import upload
from .volume_bucket import Bucket, Stale

if TYPE_CHECKING:
    from .sources import S3Source
    from .volumes import Volume

Entry = list[Any]  # kind ("f", "d", "l"), mode, mtime in ns, size, SHA-256 or the link's target
Entries = dict[str, Entry]

_THREADS = 16
_WHOLE_BYTES = 16 << 20
_TICK_NS = 50_000_000
_FETCHES = 5


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


def _folder(volume: Volume) -> str:
    return os.path.dirname(volume.path)


def _load(volume: Volume) -> Base:
    try:
        with open(os.path.join(_folder(volume), "base.json"), encoding="utf-8") as file:
            return Base(**json.load(file))
    except FileNotFoundError:
        return Base()


def _save(volume: Volume, base: Base) -> None:
    path = os.path.join(_folder(volume), "base.json")
    with open(path + ".part", "w", encoding="utf-8") as file:
        json.dump(base.__dict__, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".part", path)


@contextmanager
def _alone(volume: Volume) -> Iterator[None]:
    """One process of this host at a time moves a volume's data."""
    fd = os.open(os.path.join(_folder(volume), "sync.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


# -- what is there -----------------------------------------------------------------------------------------------------


def _scan(volume: Volume, base: Base) -> tuple[Entries, dict[str, list[int]]]:
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


def _marks(volume: Volume, entries: Entries) -> dict[str, list[int]]:
    """How files look whose content is known to be that of `entries`."""
    settled = time.time_ns() - _TICK_NS
    marks: dict[str, list[int]] = {}
    for relative, entry in entries.items():
        if entry[0] == "f":
            status = os.lstat(os.path.join(volume.path, relative))
            if status.st_ctime_ns < settled:
                marks[relative] = [status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns]
    return marks


# -- fetching ----------------------------------------------------------------------------------------------------------


def fetch(volume: Volume, bucket: Bucket) -> None:
    """Bring the working copy to the present state. The caller holds the volume for itself on this host.

    Changes that were not written back stay if nobody else wrote meanwhile. Otherwise they are put aside, and
    `VolumeConflict` says where.
    """
    with _alone(volume):
        for left in reversed(range(_FETCHES)):
            try:
                _fetch(volume, bucket)
                return
            except DataNotFound:
                # Others wrote twice while we fetched, and cleared away what we were after.
                if not left:
                    raise


def _fetch(volume: Volume, bucket: Bucket) -> None:
    base = _load(volume)
    found = bucket.get(_key(volume, bucket, "head"))
    if found is None and base.etag is not None:
        raise _gone(volume, bucket)
    if found is None or (found[1] == base.etag and not base.applying):
        return
    entries, _ = _scan(volume, base)
    if not base.applying and entries != base.entries:
        aside = _put_aside(volume, base)
        raise VolumeConflict(
            f"volume {volume.label} was changed on another host, and on this one, where it was not written back",
            hint=f"what this host had is in {aside}; attach the volume again to go on with the other state",
        )
    head = json.loads(found[0])
    target, contents = _manifest(volume, bucket, head["manifest"], head["sha256"])
    base.applying = True
    _save(volume, base)
    _apply(volume, bucket, entries, target, contents)
    _save(volume, Base(head["generation"], found[1], head["manifest"], target, contents, _marks(volume, target)))


def _gone(volume: Volume, bucket: Bucket) -> VolumeNotFound:
    return VolumeNotFound(
        f"volume {volume.label} is gone from {bucket.url}", hint=f"this host's copy of it is still at {volume.path}"
    )


def _put_aside(volume: Volume, base: Base) -> str:
    aside = os.path.join(_folder(volume), f"conflict-{base.generation}-{int(time.time())}-{os.urandom(2).hex()}")
    os.rename(volume.path, aside)
    os.mkdir(volume.path)
    _save(volume, Base())
    return aside


def _key(volume: Volume, bucket: Bucket, *parts: str) -> str:
    return bucket.key(volume.project, "volumes", volume.id, *parts)


def _manifest(volume: Volume, bucket: Bucket, name: str, sha256: str | None) -> tuple[Entries, dict[str, str]]:
    key = _key(volume, bucket, "manifests", name)
    found = bucket.get(key)
    if found is None:
        raise DataNotFound(f"there is no {bucket.url_of(key)}", url=bucket.url_of(key))
    if sha256 is not None and hashlib.sha256(found[0]).hexdigest() != sha256:
        raise VolumeError(f"{bucket.url_of(key)} is damaged: its SHA-256 is not that of the head")
    content = json.loads(found[0])
    entries: Entries = content["entries"]
    contents: dict[str, str] = content["contents"]
    for relative in entries:
        parts = relative.split("/")
        parents = ("/".join(parts[:count]) for count in range(1, len(parts)))
        if any(part in ("", ".", "..") for part in parts) or any(entries.get(up, "?")[0] != "d" for up in parents):
            raise VolumeError(f"{bucket.url_of(key)} has an impossible path: {relative!r}")
    return entries, contents


def _apply(volume: Volume, bucket: Bucket, have: Entries, want: Entries, contents: dict[str, str]) -> None:
    root = volume.path
    _open_up(root, have)
    removed: set[str] = set()
    # Deepest first, so that directories are empty when their turn comes.
    for relative in sorted(have, reverse=True):
        if relative not in want or want[relative][0] != have[relative][0]:
            path = os.path.join(root, relative)
            os.rmdir(path) if have[relative][0] == "d" else os.unlink(path)
            removed.add(relative)
    have = {relative: entry for relative, entry in have.items() if relative not in removed}
    for relative in sorted(want):
        if want[relative][0] == "d" and relative not in have:
            os.mkdir(os.path.join(root, relative), 0o700)
    incoming = os.path.join(_folder(volume), "incoming")
    shutil.rmtree(incoming, ignore_errors=True)
    os.mkdir(incoming, 0o700)

    def place(relative: str) -> None:
        kind, mode, mtime, size, reference = want[relative]
        path = os.path.join(root, relative)
        if kind == "l":
            if have.get(relative, [None] * 5)[4] != reference:
                part = os.path.join(incoming, os.urandom(8).hex())
                os.symlink(reference, part)
                os.replace(part, path)
            os.utime(path, ns=(mtime, mtime), follow_symlinks=False)
        elif kind == "f":
            if have.get(relative, [None] * 5)[4] != reference:
                part = os.path.join(incoming, os.urandom(8).hex())
                _download(bucket.source(_key(volume, bucket, "data", contents[reference])), reference, size, part)
                os.replace(part, path)
            os.chmod(path, mode)
            os.utime(path, ns=(mtime, mtime))

    _in_threads(place, list(want))
    shutil.rmtree(incoming)
    # Directories last, from the deepest: what is put into one changes its time.
    for relative in sorted(want, reverse=True):
        kind, mode, mtime, _, _ = want[relative]
        if kind == "d":
            os.chmod(os.path.join(root, relative), mode)
            os.utime(os.path.join(root, relative), ns=(mtime, mtime))


def _open_up(root: str, entries: Entries) -> None:
    for relative in sorted(entries):
        if entries[relative][0] == "d" and entries[relative][1] & 0o700 != 0o700:
            os.chmod(os.path.join(root, relative), 0o700)


def _download(source: S3Source, digest: str, size: int, path: str) -> None:
    found = Object(source.key, size)

    def attempt() -> None:
        hashed = hashlib.sha256()
        with open(path, "wb", buffering=0) as file:

            def sink(piece: memoryview) -> None:
                hashed.update(piece)
                file.write(piece)

            if size:
                source.fetch(found, 0, None, sink)
        if hashed.hexdigest() != digest:
            raise WireError(f"{source.url} arrived with the SHA-256 {hashed.hexdigest()}")

    with access.explained(source.url):
        Patience(source.url).attempt(attempt)


def _in_threads(work: Callable[[str], None], items: list[str]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="flowfn-volume") as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def stored_bytes(volume: Volume, bucket: Bucket) -> int:
    """The bytes of the volume's files as the bucket has them."""
    found = bucket.get(_key(volume, bucket, "head"))
    if found is None:
        return 0
    head = json.loads(found[0])
    return sum(entry[3] for entry in _manifest(volume, bucket, head["manifest"], head["sha256"])[0].values())


# -- writing back ------------------------------------------------------------------------------------------------------


def commit(volume: Volume, bucket: Bucket, *, in_use: bool = False) -> bool:
    """Write this host's changes back; False if there are none. Files must be at rest while this runs, unless the
    volume is `in_use`: then those that are being written to are left for the next time.

    Raises `VolumeConflict` if another host wrote since this one fetched; the working copy then stays as it is.
    """
    with _alone(volume):
        base = _load(volume)
        if base.applying:
            return False  # a fetch that was cut short: what is there is none of ours
        entries, seen = _scan(volume, base)
        if entries == base.entries:
            return False
        if bucket.by_id(volume.id, volume.project) is None:
            raise _gone(volume, bucket)
        nonce = os.urandom(8).hex()
        digests = {entry[4]: relative for relative, entry in entries.items() if entry[0] == "f"}
        fresh = {digest: relative for digest, relative in digests.items() if digest not in base.contents}
        contents = {digest: base.contents.get(digest, f"{digest}.{nonce}") for digest in digests}
        manifest = f"{base.generation + 1:010}-{nonce}"
        keys = [_key(volume, bucket, "data", contents[digest]) for digest in fresh]
        keys.append(_key(volume, bucket, "manifests", manifest))
        moving: set[str] = set()

        def put(digest: str) -> None:
            try:
                _upload(volume, bucket, fresh[digest], digest, contents[digest])
            except _Moving:
                if not in_use:
                    raise
                moving.add(digest)

        try:
            _in_threads(put, list(fresh))
            if moving:
                _leave_out(moving, base, entries, contents, seen)
                if entries == base.entries:
                    return False
            text = json.dumps({"entries": entries, "contents": contents}, sort_keys=True).encode()
            bucket.put(keys[-1], text)
            head = {
                "generation": base.generation + 1,
                "manifest": manifest,
                "sha256": hashlib.sha256(text).hexdigest(),
                "previous": base.manifest,
                "host": os.uname().nodename,
                "time": time.time(),
            }
            etag = bucket.put_if(_key(volume, bucket, "head"), json.dumps(head).encode(), base.etag)
        except Stale:
            _in_threads(bucket.delete, keys)  # nobody will ever refer to these
            raise VolumeConflict(
                f"volume {volume.label} was changed on another host since this one fetched it",
                hint=f"nothing is lost: the other state is in {bucket.url}, this host's at {volume.path}; "
                "attaching the volume again puts it aside and fetches the other",
            ) from None
        _save(volume, Base(base.generation + 1, etag, manifest, entries, contents, seen))
        try:
            _clear(volume, bucket, base.manifest, manifest)
        except DataError as error:  # another host clears, too, or the next commit will
            logging.getLogger("flowfn").info("volume %s: old states were not cleared: %s", volume.label, error)
        return True


class _Moving(VolumeError):
    """A file is being written to."""


def _leave_out(
    moving: set[str], base: Base, entries: Entries, contents: dict[str, str], seen: dict[str, list[int]]
) -> None:
    """Leave files whose content is one of `moving` as they were in the base."""
    for relative in [relative for relative, entry in entries.items() if entry[4] in moving]:
        seen.pop(relative, None)
        before = base.entries.get(relative)
        if before is None or before[0] != "f":
            del entries[relative]
        else:
            entries[relative] = before
            contents[before[4]] = base.contents[before[4]]
    for digest in moving:
        contents.pop(digest, None)


def _upload(volume: Volume, bucket: Bucket, relative: str, digest: str, name: str) -> None:
    path = os.path.join(volume.path, relative)
    key = _key(volume, bucket, "data", name)
    found = None
    try:
        if os.path.getsize(path) > _WHOLE_BYTES:
            upload(path, bucket.url_of(key), options=access.effective(bucket.url, None))
            found = sha256_of(path)
        else:
            with open(path, "rb") as file:
                content = file.read()
            found = hashlib.sha256(content).hexdigest()
            if found == digest:
                bucket.put(key, content)
    except FileNotFoundError:
        if os.path.lexists(path):
            raise
    if found != digest:
        bucket.delete(key)
        raise _Moving(
            f"{relative} of volume {volume.label} was written to while it was being written back",
            hint="close it first, then write back again",
        )


def _clear(volume: Volume, bucket: Bucket, previous: str | None, present: str) -> None:
    """Delete what only states before the previous one had. The previous one stays: another host may be fetching it."""
    prefix = _key(volume, bucket, "manifests", "")
    names = [found.key[len(prefix) :] for found in bucket.keys(prefix)]
    # Later ones may be another host's that it has not made the present one yet.
    old = [name for name in names if name < present and name.partition("-")[0] < (previous or "").partition("-")[0]]
    if not old:
        return
    used: set[str] = set()
    for name in (present, previous):
        if name is not None:
            used |= set(_manifest(volume, bucket, name, None)[1].values())
    for name in old:
        for content in _manifest(volume, bucket, name, None)[1].values():
            if content not in used:
                bucket.delete(_key(volume, bucket, "data", content))
        bucket.delete(prefix + name)
