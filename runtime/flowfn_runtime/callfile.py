"""A pickled value in a file: the payloads and outcomes of calls made durable.

```
magic (8 bytes) │ number of parts │ length of each (8 bytes) │ the pickle │ its out-of-band buffers │ magic
```

The mark at the end says that it was written whole.
"""

from __future__ import annotations

import mmap
import os
import struct
from typing import Any

from .pickling import Payload

VALUE, ERROR, CALL = b"flowval1", b"flowerr1", b"flowcal1"
_HEAD = struct.Struct("<8sQ")
_MARK = 8


def write(fd: int, kind: bytes, payload: Payload) -> None:
    """Write a payload to an empty file."""
    parts = [memoryview(payload.data).cast("B"), *(memoryview(buffer).cast("B") for buffer in payload.buffers)]
    with open(fd, "wb", closefd=False) as file:
        file.write(_HEAD.pack(kind, len(parts)))
        file.write(struct.pack(f"<{len(parts)}Q", *(part.nbytes for part in parts)))
        for part in parts:
            file.write(part)
        file.write(kind)
        file.flush()


def dumps(kind: bytes, payload: Payload) -> bytes:
    """A payload as the content of such a file."""
    parts = [payload.data, *payload.buffers]
    sizes = [memoryview(part).nbytes for part in parts]
    return b"".join([_HEAD.pack(kind, len(parts)), struct.pack(f"<{len(parts)}Q", *sizes), *parts, kind])


def read(fd: int) -> tuple[bytes, Any, list[Any]] | None:
    """What such a file holds: its kind, the pickle and the buffers, which lie in private memory of their own.

    None if it was not written whole.
    """
    size = os.fstat(fd).st_size
    if size < _HEAD.size + _MARK:
        return None
    # Private: arrays on it may be written to, which changes no file.
    view = memoryview(mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE))
    kind, count = _HEAD.unpack_from(view)
    if view[-_MARK:] != kind or kind not in (VALUE, ERROR, CALL) or count * 8 > size:
        return None
    sizes = struct.unpack_from(f"<{count}Q", view, _HEAD.size)
    offset = _HEAD.size + 8 * count
    if offset + sum(sizes) + _MARK != size:
        return None
    parts = []
    for length in sizes:
        parts.append(view[offset : offset + length])
        offset += length
    return kind, parts[0], parts[1:]
