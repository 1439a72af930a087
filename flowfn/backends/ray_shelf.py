"""What lies with the keeper of a Ray cluster's tasks: a directory for each task, and the blobs that tasks need.

It goes to the head by value, as the keeper does, and needs nothing of flowfn's there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

CHUNK_BYTES = 1 << 22
UNUSED_S = 600.0  # how long projects are kept that no task needs any more
_TASK = re.compile(r"task_\w+")
_FILE = re.compile(r"\d+\.(out|err)|result|call|plan|started|cancel|(outcome|state|needs|turn)\.json|supervisor\.log")
_BLOB = re.compile(r"(code|runtime)-[0-9a-f]+")


class Shelf:
    """Files below `root`. Raises ValueError for names that nothing here has."""

    def __init__(self, root: str) -> None:
        self._root = root
        os.makedirs(root, mode=0o700, exist_ok=True)

    # tasks

    def tasks(self) -> list[str]:
        """Whose files are here."""
        return [name for name in os.listdir(self._root) if _TASK.fullmatch(name)]

    def knows(self, task_id: str) -> bool:
        return os.path.isdir(self._directory(task_id))

    def has(self, task_id: str, name: str) -> bool:
        return os.path.exists(self._path(task_id, name))

    def put(self, task_id: str, name: str, offset: int, data: bytes) -> None:
        """A piece of a file; it makes the task known."""
        os.makedirs(self._directory(task_id), mode=0o700, exist_ok=True)
        _write(self._path(task_id, name), offset, data)

    def replace(self, task_id: str, name: str, data: bytes) -> None:
        """The whole of a file, at once."""
        path = self._path(task_id, name)
        _write(path + ".new", 0, data)
        os.rename(path + ".new", path)

    def set_json(self, task_id: str, name: str, value: Mapping[str, Any]) -> None:
        self.replace(task_id, name, json.dumps(value).encode())

    def read(self, task_id: str, name: str, offset: int) -> bytes:
        """At most CHUNK_BYTES; nothing at the end, or where there is no such file."""
        return _read(self._path(task_id, name), offset)

    def text(self, task_id: str, name: str) -> str | None:
        """The whole of a short file."""
        return self.read(task_id, name, 0).decode() if self.has(task_id, name) else None

    def json(self, task_id: str, name: str) -> dict[str, Any] | None:
        """None if it is not there, or nothing in it yet."""
        try:
            value: dict[str, Any] = json.loads(self.text(task_id, name) or "")
            return value
        except ValueError:
            return None

    def take(self, task_id: str, name: str) -> bytes | None:
        """The whole of a file, which is gone then; None if it is not there."""
        try:
            with open(self._path(task_id, name), "rb") as file:
                data = file.read()
        except FileNotFoundError:
            return None
        os.unlink(file.name)
        return data

    def end_of(self, task_id: str, name: str, lines: int) -> int:
        """Where the last lines of a file begin."""
        path = self._path(task_id, name)
        position = size = os.path.getsize(path) if os.path.exists(path) else 0
        if lines <= 0 or not size:
            return size
        tail = b""
        with open(path, "rb") as file:
            while position and tail.count(b"\n") <= lines:
                step = min(1 << 16, position)
                position -= step
                tail = os.pread(file.fileno(), step, position) + tail
        kept = tail.split(b"\n")[-lines - (1 if tail.endswith(b"\n") else 0) :]
        return size - len(b"\n".join(kept))

    def remove(self, task_id: str) -> None:
        shutil.rmtree(self._directory(task_id), ignore_errors=True)

    # blobs

    def lacks(self, names: Sequence[str]) -> list[str]:
        """Which of these blobs are not here."""
        return [name for name in names if not os.path.exists(self._blob(name))]

    def keep(self, name: str, part: str, offset: int, data: bytes, last: bool) -> None:
        """A piece of a blob; `part` names who sends it. It is there when the last one is."""
        path = f"{self._blob(name)}.{int(part, 16):x}"
        _write(path, offset, data)
        if last:
            os.rename(path, self._blob(name))

    def blob(self, name: str, offset: int) -> bytes:
        return _read(self._blob(name), offset)

    def clean(self) -> None:
        """Drop projects that no task needs."""
        needed: set[str] = set()
        for task_id in self.tasks():
            needed.update((self.json(task_id, "needs.json") or {}).get("blobs", ()))
        for name in os.listdir(self._root):
            path = os.path.join(self._root, name)
            if name.startswith("code-") and name not in needed and time.time() - os.stat(path).st_mtime > UNUSED_S:
                os.unlink(path)

    # places

    def _directory(self, task_id: str) -> str:
        if not _TASK.fullmatch(task_id):
            raise ValueError(f"{task_id!r} is no task")
        return os.path.join(self._root, task_id)

    def _path(self, task_id: str, name: str) -> str:
        if not _FILE.fullmatch(name):
            raise ValueError(f"{name!r} is no file of a task")
        return os.path.join(self._directory(task_id), name)

    def _blob(self, name: str) -> str:
        if not _BLOB.fullmatch(name):
            raise ValueError(f"{name!r} is not kept here")
        return os.path.join(self._root, name)


def _write(path: str, offset: int, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (0 if offset else os.O_TRUNC), 0o600)
    try:
        view = memoryview(data)
        while len(view):
            count = os.pwrite(fd, view, offset)
            view, offset = view[count:], offset + count
    finally:
        os.close(fd)


def _read(path: str, offset: int) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return b""
    try:
        return os.pread(fd, CHUNK_BYTES, offset)
    finally:
        os.close(fd)
