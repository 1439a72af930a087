"""Reading a task's log: its end, or all that comes until the task has ended."""

from __future__ import annotations

import os
from collections.abc import Iterator

from . import taskdir
from .watch import Watch

_BLOCK = 1 << 16


def name_of(node: int, stderr: bool) -> str:
    """The name of the file that holds a stream of a node."""
    return f"{node}.{'err' if stderr else 'out'}"


def start_of(path: str, lines: int) -> int:
    """Where the last `lines` lines of a file begin."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_size - len(_last_lines(file.fileno(), lines))
    except FileNotFoundError:
        return 0


def tail(path: str, lines: int | None) -> str:
    """The last `lines` lines of a file, or all of it; "" if it isn't there. What is no UTF-8 is replaced."""
    try:
        with open(path, "rb") as file:
            raw = file.read() if lines is None else _last_lines(file.fileno(), lines)
    except FileNotFoundError:
        return ""
    return raw.decode("utf-8", "replace")


def _last_lines(fd: int, lines: int) -> bytes:
    if lines <= 0:
        return b""
    end = os.fstat(fd).st_size
    blocks: list[bytes] = []
    newlines, position = 0, end
    # One more newline than lines: the one that ends the line before the first wanted.
    while position > 0 and newlines <= lines:
        size = min(_BLOCK, position)
        position -= size
        blocks.append(os.pread(fd, size, position))
        newlines += blocks[-1].count(b"\n")
    raw = b"".join(reversed(blocks))
    unfinished = not raw.endswith(b"\n")
    kept = raw.split(b"\n")[-lines - (0 if unfinished else 1) :]
    return b"\n".join(kept)


def follow(
    directory: str, streams: list[tuple[int, bool]], *, lines: int | None = None
) -> Iterator[tuple[int, bool, str]]:
    """Yield (node, is stderr, line) as the task's lines come, from its last `lines` lines on, until it has ended.

    Lines keep their newline; the last one of a stream may have none. The supervisor's death ends it as well.
    """
    readers = [_Reader(os.path.join(directory, name_of(node, stderr)), lines) for node, stderr in streams]
    with Watch(directory) as watch:
        while True:
            # In this order: what is written before the end is read after it was seen.
            ended = not taskdir.is_held(directory) and not taskdir.is_held(directory, "tree")
            for (node, stderr), reader in zip(streams, readers, strict=True):
                for line in reader.lines(last=ended):
                    yield node, stderr, line
            if ended:
                return
            watch.wait()


class _Reader:
    """The lines of a file that grows."""

    def __init__(self, path: str, lines: int | None) -> None:
        self._path = path
        self._fd = -1
        self._rest = b""
        self._tail = lines

    def lines(self, *, last: bool) -> Iterator[str]:
        if self._fd < 0:
            try:
                self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return
            if self._tail is not None:
                size = os.fstat(self._fd).st_size
                os.lseek(self._fd, size - len(_last_lines(self._fd, self._tail)), os.SEEK_SET)
        while chunk := os.read(self._fd, _BLOCK):
            *whole, self._rest = (self._rest + chunk).split(b"\n")
            for line in whole:
                yield line.decode("utf-8", "replace") + "\n"
        if last:
            os.close(self._fd)
            if self._rest:
                yield self._rest.decode("utf-8", "replace")
