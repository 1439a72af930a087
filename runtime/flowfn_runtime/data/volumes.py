"""The registry of volumes on this host, and the locks that say who uses one.

A volume is a directory, `FLOW_HOME/volumes/<id>/data`, and a row in `FLOW_HOME/volumes/registry.db`. Who uses a volume
is not written down anywhere: users hold a kernel lock on `FLOW_HOME/volumes/<id>/lock`, which goes when the last
process that inherited it dies, however it dies. So a killed task can't leave a volume locked.

Two kinds of lock: functions, and tasks on `file` volumes, share one; a task on a `block` volume has it to itself.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ValidationError, VolumeError, VolumeInUse, VolumeNotFound
from . import volume_db

if TYPE_CHECKING:
    import sqlite3

Interface = Literal["block", "file"]

DEFAULT_SIZE_GB = 100
MAX_SIZE_GB = 16384
DEFAULT_PROJECT = "default"

_NAME = re.compile(r"[a-z0-9][a-z0-9-]*[a-z0-9]")
_ID_PREFIX = "vol_"  # no name can begin so: names hold no underscore
_COLUMNS = "id, project, name, size_gb, interface, region, created_at"
_LOG = "flowfn"


@dataclass(frozen=True)
class Volume:
    """Named, persistent, read-write storage of a project."""

    id: str  # "vol_" and 16 hex digits
    project: str
    name: str | None  # None: unnamed, found by its id only
    size_gb: int  # what was asked for; a breach is reported, not enforced
    interface: Interface  # "block": one task at a time; "file": shared
    region: str | None  # None: anywhere
    created_at: float  # seconds since the epoch
    path: str  # the directory of its data on this host

    @property
    def label(self) -> str:
        """Its name, or its id where it has none: for messages."""
        return self.name or self.id

    @property
    def url(self) -> str:
        """`volume://<name or id>`."""
        return f"volume://{self.label}"

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-able."""
        return asdict(self)


class Attachment:
    """A volume in use: the lock that keeps it from deletion (and, if exclusive, from every other user).

    `fd` is inheritable: a process that inherits it holds the volume too, and the kernel frees the volume when the last
    holder is gone. `close()` lets go in this process.
    """

    def __init__(self, volume: Volume, fd: int, *, exclusive: bool) -> None:
        self.volume = volume
        self.path = volume.path
        self.fd = fd
        self.exclusive = exclusive

    def close(self) -> None:
        """Let go of the volume in this process. Safe to call twice."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Attachment {self.volume.label} at {self.path}{' exclusive' if self.exclusive else ''}>"


# -- what may be asked for ---------------------------------------------------------------------------------------------


def check_name(name: str) -> str:
    """Return `name` if a volume can be called so, else raise `ValidationError`."""
    if not 3 <= len(name) <= 64 or not _NAME.fullmatch(name):
        raise ValidationError(
            f"a volume can't be named {name!r}",
            hint="use 3 to 64 of a-z, 0-9 and '-', beginning and ending with a letter or digit",
        )
    return name


def is_id(id_or_name: str) -> bool:
    """True if this is a volume's id, False if it is a name."""
    return id_or_name.startswith(_ID_PREFIX)


def _check(size_gb: int, interface: str, region: str | None, project: str) -> None:
    if isinstance(size_gb, bool) or not isinstance(size_gb, int) or not 1 <= size_gb <= MAX_SIZE_GB:
        raise ValidationError(f"size_gb={size_gb!r}: a volume has 1 to {MAX_SIZE_GB} GB, as a whole number")
    if interface not in ("block", "file"):
        raise ValidationError(f"interface={interface!r}: it is 'block' (one task at a time) or 'file' (shared)")
    if region is not None and not region.strip():
        raise ValidationError("region='': name a region, or leave it out")
    if not project:
        raise ValidationError("project='': a volume belongs to a project", hint="leave it out for 'default'")


def current_project() -> str:
    """The project whose volumes are meant where none is named: `FLOW_PROJECT`, else "default".

    The client, which reads configuration files too, puts its own answer in place of `project_from`.
    """
    return project_from()


def _project_from_environment() -> str:
    return os.environ.get("FLOW_PROJECT") or DEFAULT_PROJECT


project_from: Callable[[], str] = _project_from_environment


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
    _check(size_gb, interface, region, project)

    def insert(db: sqlite3.Connection) -> Volume:
        if name is not None and (there := _select(db, name, project)):
            raise VolumeError(
                f"project {project!r} has a volume named {name!r} already ({there.id})",
                hint=f"use it by its name, or delete it first: flow volume rm {name}",
            )
        return _insert(db, name, size_gb, interface, region, project)

    return volume_db.write(insert)


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
    _check(size_gb, interface, region, project)
    if there := volume_db.read(lambda db: _select(db, name, project)):
        return there
    return volume_db.write(
        lambda db: _select(db, name, project) or _insert(db, name, size_gb, interface, region, project)
    )


def find(id_or_name: str, project: str = DEFAULT_PROJECT) -> Volume | None:
    """The project's volume of this id or name, or None."""
    return volume_db.read(lambda db: _select(db, id_or_name, project))


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
    """The project's volumes, oldest first; of all projects if `project` is None."""

    def rows(db: sqlite3.Connection) -> list[Volume]:
        found = db.execute(
            f"SELECT {_COLUMNS} FROM volumes WHERE deleted_at IS NULL AND (?1 IS NULL OR project = ?1)"
            " ORDER BY created_at, id",
            (project,),
        )
        return [_volume(row) for row in found]

    return volume_db.read(rows) or []


def delete(id_or_name: str, project: str = DEFAULT_PROJECT) -> Volume:
    """Delete a volume and all that is in it; return what it was.

    Raises `VolumeInUse` while anything uses it. Nothing can attach to it in between: the check and the deletion are
    one step.
    """
    volume = get(id_or_name, project)
    # Its directory may have been lost; the lock needs one.
    volume_db.made(os.path.dirname(volume.path))
    fd = _acquire(volume, exclusive=True, wait=False)
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
    _purge()
    return volume


def usage_bytes(volume: Volume) -> int:
    """The disk space that the volume's files take, in bytes, as `du` counts it. Hard links count once."""
    seen: set[tuple[int, int]] = set()
    total = 0
    pending = [volume.path]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    stat = entry.stat(follow_symlinks=False)
                    if stat.st_nlink > 1 and not entry.is_dir(follow_symlinks=False):
                        if (stat.st_dev, stat.st_ino) in seen:
                            continue
                        seen.add((stat.st_dev, stat.st_ino))
                    total += stat.st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
        except (FileNotFoundError, PermissionError):
            continue  # deleted while we counted, or the volume's user hid it from us
    return total


def check_size(volume: Volume) -> int:
    """Like `usage_bytes`, and a warning in the log if the volume holds more than its size."""
    used = usage_bytes(volume)
    if used > volume.size_gb * 10**9:
        import logging

        logging.getLogger(_LOG).warning(
            "volume %s holds %.1f GB, more than its size of %d GB", volume.label, used / 1e9, volume.size_gb
        )
    return used


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
        fd = _acquire(volume, exclusive=exclusive, wait=wait)
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
            os.set_inheritable(fd, True)
        except BaseException:
            volume_db.release(fd)
            raise
        return Attachment(volume, fd, exclusive=exclusive)


def in_use(volume: Volume) -> bool:
    """True if a process uses the volume at this moment. Only a hint: it may change before you act on it."""
    try:
        volume_db.release(_acquire(volume, exclusive=True, wait=False))
    except VolumeInUse:
        return True
    except VolumeNotFound:
        return False
    return False


def _acquire(volume: Volume, *, exclusive: bool, wait: bool) -> int:
    path = os.path.join(os.path.dirname(volume.path), "lock")
    try:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # a read-only home: enough for flock
    except FileNotFoundError:
        raise VolumeNotFound(
            f"volume {volume.label} is gone: there is no {os.path.dirname(path)}", hint="was it deleted meanwhile?"
        ) from None
    except OSError as error:
        raise volume_db.explain(error) from error
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        pids = _holders(fd)
        os.close(fd)
        by = f" by process {', '.join(map(str, pids))}" if pids else ""
        raise VolumeInUse(
            f"volume {volume.label} is in use{by}",
            hint="wait until that has ended, or cancel it; `file` volumes can be shared by tasks",
        ) from None
    except BaseException:
        os.close(fd)
        raise
    return fd


def _holders(fd: int) -> list[int]:
    """The processes that took a lock on this file, as the kernel lists them; [] where it doesn't say."""
    stat = os.fstat(fd)
    key = f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}:{stat.st_ino}"
    try:
        with open("/proc/locks") as lines:
            # 1: FLOCK  ADVISORY  WRITE 708 00:2d:5150 0 EOF     (waiting ones have "->" after the number)
            fields = [line.split() for line in lines]
    except OSError:
        return []
    return sorted({int(f[4]) for f in fields if len(f) > 5 and f[1] == "FLOCK" and f[5] == key and int(f[4]) > 0})


# -- storage -----------------------------------------------------------------------------------------------------------


def _data_path(volume_id: str) -> str:
    return os.path.join(volume_db.root(), volume_id, "data")


def _volume(row: tuple[Any, ...]) -> Volume:
    volume_id, project, name, size_gb, interface, region, created_at = row
    return Volume(volume_id, project, name, size_gb, interface, region, created_at, _data_path(volume_id))


def _select(db: sqlite3.Connection, id_or_name: str, project: str) -> Volume | None:
    column = "id" if is_id(id_or_name) else "name"
    row = db.execute(
        f"SELECT {_COLUMNS} FROM volumes WHERE {column} = ? AND project = ? AND deleted_at IS NULL",
        (id_or_name, project),
    ).fetchone()
    return _volume(row) if row else None


def _insert(
    db: sqlite3.Connection, name: str | None, size_gb: int, interface: str, region: str | None, project: str
) -> Volume:
    row = (_ID_PREFIX + os.urandom(8).hex(), project, name, size_gb, interface, region, time.time())
    # The directory goes first: killed before the commit, what is left is a directory that no row names.
    volume = _volume(row)
    os.mkdir(os.path.dirname(volume.path), 0o700)
    os.mkdir(volume.path)
    os.close(os.open(os.path.join(os.path.dirname(volume.path), "lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
    try:
        db.execute(f"INSERT INTO volumes ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)", row)
    except BaseException:
        _remove_tree(os.path.dirname(volume.path))
        raise
    return volume


def _purge() -> None:
    """Remove the files of deleted volumes: of this one, and of those whose deleter was killed."""
    doomed = (
        volume_db.read(lambda db: db.execute("SELECT id FROM volumes WHERE deleted_at IS NOT NULL").fetchall()) or []
    )
    for (volume_id,) in doomed:
        if _remove_tree(os.path.dirname(_data_path(volume_id))):
            volume_db.write(lambda db, gone=volume_id: db.execute("DELETE FROM volumes WHERE id = ?", (gone,)))  # type: ignore[misc]


def _remove_tree(path: str) -> bool:
    """Remove a directory, also where a directory in it can't be written to; True if it is gone."""
    import shutil

    def unlock(folder: str) -> None:
        os.chmod(folder, 0o700)
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    unlock(entry.path)

    shutil.rmtree(path, ignore_errors=True)
    if not os.path.lexists(path):
        return True
    try:
        unlock(path)
        shutil.rmtree(path)
    except FileNotFoundError:
        pass  # another process removes it too
    except OSError as error:
        import logging

        logging.getLogger(_LOG).warning("files of a deleted volume can't be removed, and stay at %s: %s", path, error)
    return not os.path.lexists(path)
