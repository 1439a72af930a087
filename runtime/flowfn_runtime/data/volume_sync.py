"""Write what this host changed in a volume back to its bucket.

It is written as a new manifest, in place of the base and of nothing else: if another host was first, that is a
`VolumeConflict`, and both states stay, the other one in the bucket, ours in a directory that the error names.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from typing import TYPE_CHECKING

from ..errors import DataError, VolumeConflict, VolumeError
from . import access, volume_copy
from .staging import sha256_of
from .upload import upload
from .volume_bucket import Bucket, Stale
from .volume_copy import Base, Entries, alone, gone, in_threads, load, save, scan

if TYPE_CHECKING:
    from .volumes import Volume

_WHOLE_BYTES = 16 << 20


def commit(volume: Volume, bucket: Bucket, *, in_use: bool = False) -> bool:
    """Write this host's changes back; False if there are none. Files must be at rest while this runs, unless the
    volume is `in_use`: then those that are being written to are left for the next time.

    Raises `VolumeConflict` if another host wrote since this one fetched; the working copy then stays as it is.
    """
    with alone(volume):
        base = load(volume)
        if base.applying:
            return False  # a fetch that was cut short: what is there is none of ours
        entries, seen = scan(volume, base)
        if entries == base.entries:
            return False
        if bucket.by_id(volume.id, volume.project) is None:
            raise gone(volume, bucket)
        nonce = os.urandom(8).hex()
        digests = {entry[4]: relative for relative, entry in entries.items() if entry[0] == "f"}
        fresh = {digest: relative for digest, relative in digests.items() if digest not in base.contents}
        contents = {digest: base.contents.get(digest, f"{digest}.{nonce}") for digest in digests}
        manifest = f"{base.generation + 1:010}-{nonce}"
        keys = [volume_copy.key(volume, bucket, "data", contents[digest]) for digest in fresh]
        keys.append(volume_copy.key(volume, bucket, "manifests", manifest))
        moving: set[str] = set()

        def put(digest: str) -> None:
            try:
                _upload(volume, bucket, fresh[digest], digest, contents[digest])
            except _Moving:
                if not in_use:
                    raise
                moving.add(digest)

        try:
            in_threads(put, list(fresh))
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
            etag = bucket.put_if(volume_copy.key(volume, bucket, "head"), json.dumps(head).encode(), base.etag)
        except Stale:
            in_threads(bucket.delete, keys)  # nobody will ever refer to these
            raise VolumeConflict(
                f"volume {volume.label} was changed on another host since this one fetched it",
                hint=f"nothing is lost: the other state is in {bucket.url}, this host's at {volume.path}; "
                "attaching the volume again puts it aside and fetches the other",
            ) from None
        save(volume, Base(base.generation + 1, etag, manifest, entries, contents, seen))
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
    key = volume_copy.key(volume, bucket, "data", name)
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
    prefix = volume_copy.key(volume, bucket, "manifests", "")
    names = [found.key[len(prefix) :] for found in bucket.keys(prefix)]
    # Later ones may be another host's that it has not made the present one yet.
    old = [name for name in names if name < present and name.partition("-")[0] < (previous or "").partition("-")[0]]
    if not old:
        return
    used: set[str] = set()
    for name in (present, previous):
        if name is not None:
            used |= set(volume_copy.manifest(volume, bucket, name, None)[1].values())
    for name in old:
        for content in volume_copy.manifest(volume, bucket, name, None)[1].values():
            if content not in used:
                bucket.delete(volume_copy.key(volume, bucket, "data", content))
        bucket.delete(prefix + name)
