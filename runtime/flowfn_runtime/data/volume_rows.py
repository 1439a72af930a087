"""A volume as a row of the registry, as a record in a bucket, and as a directory of this host."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..errors import VolumeError
from . import volume_db, volume_files
from .volume_model import ID_PREFIX, Interface, Volume, is_id

if TYPE_CHECKING:
    import sqlite3

COLUMNS = "id, project, name, size_gb, interface, region, created_at"


def data_path(volume_id: str) -> str:
    return os.path.join(volume_db.root(), volume_id, "data")


def volume_of(row: tuple[Any, ...]) -> Volume:
    volume_id, project, name, size_gb, interface, region, created_at = row
    return Volume(volume_id, project, name, size_gb, interface, region, created_at, data_path(volume_id))


def select(db: sqlite3.Connection, id_or_name: str, project: str) -> Volume | None:
    column = "id" if is_id(id_or_name) else "name"
    row = db.execute(
        f"SELECT {COLUMNS} FROM volumes WHERE {column} = ? AND project = ? AND deleted_at IS NULL",
        (id_or_name, project),
    ).fetchone()
    return volume_of(row) if row else None


def new(name: str | None, size_gb: int, interface: Interface, region: str | None, project: str) -> Volume:
    volume_id = ID_PREFIX + os.urandom(8).hex()
    return Volume(volume_id, project, name, size_gb, interface, region, time.time(), data_path(volume_id))


def insert(db: sqlite3.Connection, volume: Volume) -> Volume:
    # The directory goes first: killed before the commit, what is left is a directory that no row names.
    make_folder(volume)
    try:
        db.execute(f"INSERT INTO volumes ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)", tuple(record_of(volume).values()))
    except BaseException:
        volume_files.remove_tree(os.path.dirname(volume.path))
        raise
    return volume


def make_folder(volume: Volume) -> None:
    for folder in (os.path.dirname(volume_db.root()), volume_db.root(), os.path.dirname(volume.path)):
        volume_db.made(folder)
    try:
        os.makedirs(volume.path, exist_ok=True)
        lock = os.path.join(os.path.dirname(volume.path), "lock")
        os.close(os.open(lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise volume_db.explain(error) from error


def record_of(volume: Volume) -> dict[str, Any]:
    record = asdict(volume)
    del record["path"]  # another host has another one
    return {column: record[column] for column in COLUMNS.split(", ")}


def from_record(record: Mapping[str, Any]) -> Volume:
    try:
        if not is_id(record["id"]) or os.sep in record["id"]:
            raise KeyError("id")
        return volume_of(tuple(record[column] for column in COLUMNS.split(", ")))
    except KeyError as missing:
        raise VolumeError(f"a record of a volume in the bucket has no valid {missing}") from None


def purge() -> None:
    """Remove the files of deleted volumes: of this one, and of those whose deleter was killed."""
    doomed = (
        volume_db.read(lambda db: db.execute("SELECT id FROM volumes WHERE deleted_at IS NOT NULL").fetchall()) or []
    )
    for (volume_id,) in doomed:
        if volume_files.remove_tree(os.path.dirname(data_path(volume_id))):
            volume_db.write(lambda db, gone=volume_id: db.execute("DELETE FROM volumes WHERE id = ?", (gone,)))  # type: ignore[misc]
