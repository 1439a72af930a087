"""Bring the working copy of a volume to the state that its bucket has."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from typing import TYPE_CHECKING

from ..errors import DataNotFound, VolumeConflict
from . import access
from .endpoint import WireError
from .model import Object
from .retry import Patience
from .volume_bucket import Bucket
from .volume_copy import Base, Entries, alone, folder, gone, in_threads, key, load, manifest, marks, save, scan

if TYPE_CHECKING:
    from .sources import S3Source
    from .volumes import Volume

_FETCHES = 5


def fetch(volume: Volume, bucket: Bucket) -> None:
    """Bring the working copy to the present state. The caller holds the volume for itself on this host.

    Changes that were not written back stay if nobody else wrote meanwhile. Otherwise they are put aside, and
    `VolumeConflict` says where.
    """
    with alone(volume):
        for left in reversed(range(_FETCHES)):
            try:
                _fetch(volume, bucket)
                return
            except DataNotFound:
                # Others wrote twice while we fetched, and cleared away what we were after.
                if not left:
                    raise


def _fetch(volume: Volume, bucket: Bucket) -> None:
    base = load(volume)
    found = bucket.get(key(volume, bucket, "head"))
    if found is None and base.etag is not None:
        raise gone(volume, bucket)
    if found is None or (found[1] == base.etag and not base.applying):
        return
    entries, _ = scan(volume, base)
    if not base.applying and entries != base.entries:
        aside = _put_aside(volume, base)
        raise VolumeConflict(
            f"volume {volume.label} was changed on another host, and on this one, where it was not written back",
            hint=f"what this host had is in {aside}; attach the volume again to go on with the other state",
        )
    head = json.loads(found[0])
    target, contents = manifest(volume, bucket, head["manifest"], head["sha256"])
    base.applying = True
    save(volume, base)
    _apply(volume, bucket, entries, target, contents)
    save(volume, Base(head["generation"], found[1], head["manifest"], target, contents, marks(volume, target)))


def _put_aside(volume: Volume, base: Base) -> str:
    aside = os.path.join(folder(volume), f"conflict-{base.generation}-{int(time.time())}-{os.urandom(2).hex()}")
    os.rename(volume.path, aside)
    os.mkdir(volume.path)
    save(volume, Base())
    return aside


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
    incoming = os.path.join(folder(volume), "incoming")
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
                _download(bucket.source(key(volume, bucket, "data", contents[reference])), reference, size, part)
                os.replace(part, path)
            os.chmod(path, mode)
            os.utime(path, ns=(mtime, mtime))

    in_threads(place, list(want))
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


def stored_bytes(volume: Volume, bucket: Bucket) -> int:
    """The bytes of the volume's files as the bucket has them."""
    found = bucket.get(key(volume, bucket, "head"))
    if found is None:
        return 0
    head = json.loads(found[0])
    return sum(entry[3] for entry in manifest(volume, bucket, head["manifest"], head["sha256"])[0].values())
