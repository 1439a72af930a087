"""Volumes: made, found, listed, deleted and used.

A volume is a directory, `FLOW_HOME/volumes/<id>/data`, and a row in `FLOW_HOME/volumes/registry.db`. Who uses a volume
is not written down anywhere: users hold a kernel lock on `FLOW_HOME/volumes/<id>/lock`, which goes when the last
process that inherited it dies, however it dies. So a killed task can't leave a volume locked.

Two kinds of lock: functions, and tasks on `file` volumes, share one; a task on a `block` volume has it to itself.

With `FLOW_VOLUMES=s3://bucket/prefix` the registry and the data are in the bucket (volume_bucket); the directory is a
working copy (volume_copy): fetched when the first user on this host attaches, written back when a call or task ends
(volume_commit), and when the last user is gone (volume_keeper).
"""

from __future__ import annotations

import itertools
import os
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING

from .. import settings
from ..errors import VolumeError, VolumeInUse, VolumeNotFound
from ..settings import DEFAULT_PROJECT
from . import volume_db, volume_files, volume_locks, volume_rows
from .volume_locks import Attachment
from .volume_model import (
    DEFAULT_SIZE_GB,
    MAX_SIZE_GB,
    Interface,
    Volume,
    check_name,
    check_properties,
    is_id,
)

if TYPE_CHECKING:
    import sqlite3

    from .volume_bucket import Bucket

__all__ = [
    "DEFAULT_PROJECT",
    "DEFAULT_SIZE_GB",
    "MAX_SIZE_GB",
    "Attachment",
    "Interface",
    "Volume",
    "attach",
    "check_name",
    "check_size",
    "commit",
    "create",
    "delete",
    "find",
    "find_or_create",
    "get",
    "in_use",
    "is_id",
    "list_volumes",
    "usage_bytes",
]

_LOG = "flowfn"
_LOOKS, _LOOK_S = 3, 0.02  # a keeper that looks whether anybody uses a volume has its lock for a moment


# -- the registry ------------------------------------------------------------------------------------------------------


def create(
    name: str | None = None,
    *,
    size_gb: int = DEFAULT_SIZE_GB,
    interface: Interface = "block",
    region: str | None = None,
    project: str = DEFAULT_PROJECT,
) -> Volume:
    """Make a new, empty volume.

    Without a name it is found by its id only. A name that the project has already is a `VolumeError`: whoever wants
    "that one, new or not" calls `find_or_create`.
    """
    if name is not None:
        check_name(name)
    check_properties(size_gb, interface, region, project)

    volume = volume_rows.new(name, size_gb, interface, region, project)

    def insert(db: sqlite3.Connection) -> Volume:
        return (volume_rows.select(db, name, project) if name else None) or volume_rows.insert(db, volume)

    if bucket := _bucket():
        taken = bucket.create(volume_rows.record_of(volume))
        there = volume_rows.from_record(taken) if taken else volume
    else:
        there = volume_db.write(insert)
    if there is not volume:
        raise VolumeError(
            f"project {project!r} has a volume named {name!r} already ({there.id})",
            hint=f"use it by its name, or delete it first: flow volume rm {name}",
        )
    return volume


def find_or_create(
    name: str,
    *,
    size_gb: int = DEFAULT_SIZE_GB,
    interface: Interface = "block",
    region: str | None = None,
    project: str = DEFAULT_PROJECT,
) -> Volume:
    """The project's volume of this name; if there is none, a new one with these properties.

    However many processes ask at once, they get one and the same volume.
    """
    check_name(name)
    check_properties(size_gb, interface, region, project)
    if there := find(name, project):
        return there
    volume = volume_rows.new(name, size_gb, interface, region, project)
    if bucket := _bucket():
        first = bucket.create(volume_rows.record_of(volume))
        return volume_rows.from_record(first) if first else volume
    return volume_db.write(lambda db: volume_rows.select(db, name, project) or volume_rows.insert(db, volume))


def find(id_or_name: str, project: str = DEFAULT_PROJECT, *, home: str | None = None) -> Volume | None:
    """The project's volume of this id or name, or None; of another flowfn home's volumes if that is named."""
    if bucket := _bucket():
        record = (bucket.by_id if is_id(id_or_name) else bucket.by_name)(id_or_name, project)
        return volume_rows.from_record(record) if record else None
    read = volume_db.at(home).read if home else volume_db.read
    return read(lambda db: volume_rows.select(db, id_or_name, project))


def get(id_or_name: str, project: str = DEFAULT_PROJECT) -> Volume:
    """The project's volume of this id or name, else `VolumeNotFound`. Other projects' volumes are out of reach."""
    if volume := find(id_or_name, project):
        return volume
    from difflib import get_close_matches

    known = [v.label for v in list_volumes(project)]
    near = get_close_matches(id_or_name, known, n=1)
    raise VolumeNotFound(
        f"project {project!r} has no volume {id_or_name!r}",
        hint=f"did you mean {near[0]!r}?" if near else "see them with: flow volume ls",
    )


def list_volumes(project: str | None = DEFAULT_PROJECT) -> list[Volume]:
    """The project's volumes, oldest first; of all projects (of this host) if `project` is None."""
    if project is not None and (bucket := _bucket()):
        return sorted(
            map(volume_rows.from_record, bucket.list(project)), key=lambda volume: (volume.created_at, volume.id)
        )

    def rows(db: sqlite3.Connection) -> list[Volume]:
        found = db.execute(
            f"SELECT {volume_rows.COLUMNS} FROM volumes WHERE deleted_at IS NULL AND (?1 IS NULL OR project = ?1)"
            " ORDER BY created_at, id",
            (project,),
        )
        return [volume_rows.volume_of(row) for row in found]

    return volume_db.read(rows) or []


def delete(id_or_name: str, project: str = DEFAULT_PROJECT) -> Volume:
    """Delete a volume and all that is in it; return what it was.

    Raises `VolumeInUse` while anything uses it. Nothing can attach to it in between: the check and the deletion are
    one step. (Of a volume in a bucket, other hosts' users are not seen; they get an error, and keep what they have.)
    """
    volume = get(id_or_name, project)
    # Its directory may have been lost, or not be here yet; the lock needs one.
    volume_rows.make_folder(volume)
    fd = volume_locks.acquire(volume, exclusive=True, wait=False)
    if bucket := _bucket():
        try:
            bucket.remove(volume_rows.record_of(volume))
            volume_files.remove_tree(os.path.dirname(volume.path))
        finally:
            volume_db.release(fd)
        return volume
    try:
        # Marked first, its name free again: killed from here on, whoever deletes next finishes the work.
        marked = volume_db.write(
            lambda db: (
                db.execute(
                    "UPDATE volumes SET deleted_at = ?, name = NULL WHERE id = ? AND deleted_at IS NULL",
                    (time.time(), volume.id),
                ).rowcount
            )
        )
    finally:
        volume_db.release(fd)
    if not marked:
        raise VolumeNotFound(f"volume {volume.label} was deleted meanwhile, by someone else")
    volume_rows.purge()
    return volume


def usage_bytes(volume: Volume) -> int:
    """The disk space that the volume's files take, in bytes, as `du` counts it (in a bucket: their sizes)."""
    if bucket := _bucket():
        from . import volume_fetch

        return volume_fetch.stored_bytes(volume, bucket)
    return volume_files.usage_bytes(volume.path)


def check_size(volume: Volume) -> int:
    """Like `usage_bytes`, and a warning in the log if the volume holds more than its size."""
    used = usage_bytes(volume)
    if used > volume.size_gb * 10**9:
        import logging

        logging.getLogger(_LOG).warning(
            "volume %s holds %.1f GB, more than its size of %d GB", volume.label, used / 1e9, volume.size_gb
        )
    return used


def _bucket() -> Bucket | None:
    url = settings.volumes()
    if not url:
        return None
    from .volume_bucket import Bucket

    return Bucket(url)


# -- use ---------------------------------------------------------------------------------------------------------------


def attach(
    id_or_name: str,
    project: str = DEFAULT_PROJECT,
    *,
    exclusive: bool = False,
    create: bool = True,
    wait: bool = False,
    size_gb: int = DEFAULT_SIZE_GB,
    interface: Interface = "block",
    region: str | None = None,
) -> Attachment:
    """Use a volume: until the result is closed, and every process that inherited its `fd` is gone, it can't be deleted.

    `exclusive` keeps every other user out. `create` makes a volume of that *name* with these properties if there is
    none; an unknown id is always `VolumeNotFound`. If the volume is taken: with `wait`, sleep in the kernel until it is
    free, else `VolumeInUse`.
    """
    while True:
        if create and not is_id(id_or_name):
            volume = find_or_create(id_or_name, size_gb=size_gb, interface=interface, region=region, project=project)
        else:
            volume = get(id_or_name, project)
        bucket = _bucket()
        if bucket:
            volume_rows.make_folder(volume)
            fd = _acquire_copy(volume, bucket, exclusive=exclusive, wait=wait)
        else:
            fd = volume_locks.acquire(volume, exclusive=exclusive, wait=wait)
        try:
            # Only now can it not be deleted any more: was it, between the look-up and the lock?
            if find(volume.id, project) is None:
                volume_db.release(fd)
                continue
            if not os.path.isdir(volume.path):
                raise VolumeError(
                    f"the data of volume {volume.label} is gone: there is no {volume.path}",
                    hint=f"restore that directory, or forget the volume: flow volume rm {volume.label}",
                )
            keeper = None
            if bucket:
                from . import volume_commit, volume_keeper

                volume_keeper.start(volume)
                keeper = os.path.join(os.path.dirname(volume.path), volume_commit.SOCKET)
            os.set_inheritable(fd, True)
        except BaseException:
            volume_db.release(fd)
            raise
        return Attachment(volume, fd, exclusive=exclusive, keeper=keeper)


def _acquire_copy(volume: Volume, bucket: Bucket, *, exclusive: bool, wait: bool) -> int:
    """The lock on a working copy that is up to date. Where it is in use on this host, it stays as it is."""
    from . import volume_fetch

    for look in itertools.count():
        # Whoever waits to have it alone does so in the kernel, in order; all others begin one after another.
        with nullcontext() if exclusive and wait else volume_locks.turn(volume):
            try:
                fd = volume_locks.acquire(volume, exclusive=exclusive, wait=exclusive and wait)
            except VolumeInUse:
                if not wait and look == _LOOKS:
                    raise
            else:
                try:
                    if exclusive or volume_locks.alone(fd):  # else somebody may be reading it
                        volume_fetch.fetch(volume, bucket)
                    if not exclusive:
                        volume_locks.share(fd)
                except BaseException:
                    volume_db.release(fd)
                    raise
                return fd
        if wait:
            volume_db.release(volume_locks.acquire(volume, exclusive=False, wait=True))
        else:
            time.sleep(_LOOK_S)
    raise AssertionError("unreachable")


def commit(id_or_name: str, project: str = DEFAULT_PROJECT) -> bool:
    """Write what changed in a volume of a bucket back now; False if there is nothing to write, or no bucket.

    Files must be at rest meanwhile. It is done anyhow when the last user on this host is gone. Raises `VolumeConflict`
    if another host has written to the volume since this one fetched it; nothing is lost then, and the error says where
    either state is.
    """
    bucket = _bucket()
    if bucket is None:
        return False
    from . import volume_commit, volume_sync

    volume = get(id_or_name, project)
    if keeper := volume_commit.keeper_of(volume.id):
        return volume_commit.ask(keeper)  # mounted here: its folder is out of sight
    return os.path.isdir(volume.path) and volume_sync.commit(volume, bucket)


def in_use(volume: Volume) -> bool:
    """True if a process uses the volume at this moment. Only a hint: it may change before you act on it."""
    try:
        volume_db.release(volume_locks.acquire(volume, exclusive=True, wait=False))
    except VolumeInUse:
        return True
    except VolumeNotFound:
        return False
    return False
