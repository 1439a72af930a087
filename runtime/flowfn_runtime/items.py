"""Items and results of a batch in one frame, each with a fate of its own.

Plain values go as one pickle of a list, which costs a fraction of a microsecond each. Anything else is pickled by
itself, so that one that fails does not touch its neighbours and nothing is shared between two of them.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Sequence
from typing import Any

from . import wire
from .pickling import PLAIN, Payload

_ROW = struct.Struct("<IQII")  # bytes of head, bytes of pickle, buffers, unused
PROGRESS = struct.Struct("<Iff")  # index of the item that runs, seconds it has run, seconds since the batch started


class Packed:
    """A value pickled by itself. `head` is empty, or says (as an ERROR frame's meta does) what went wrong."""

    __slots__ = ("head", "payload")

    def __init__(self, payload: Payload, head: bytes = b"") -> None:
        self.payload = payload
        self.head = head


def pack(values: Sequence[Any], *, plain: bool = False) -> tuple[int, bytes, Any, list[Any]]:
    """Flags, table, body and buffers for plain values and `Packed` ones. `plain`: all are known to be plain."""
    if plain or PLAIN.issuperset(map(type, values)):
        return wire.PLAIN, b"", pickle.dumps(values, 5), []
    rows, parts, buffers = [], [], []
    for value in values:
        item = value if type(value) is Packed else Packed(Payload(pickle.dumps(value, 5), [], []))
        rows.append(_ROW.pack(len(item.head), len(item.payload.data), len(item.payload.buffers), 0))
        parts += [item.head, item.payload.data]
        buffers += item.payload.buffers
    return 0, b"".join(rows), b"".join(parts), buffers


def unpack(flags: int, table: bytes, body: Any, buffers: Sequence[Any]) -> list[Any]:
    """The plain values, or a `Packed` for each; nothing but plain values is unpickled here."""
    if flags & wire.PLAIN:
        values: list[Any] = pickle.loads(body)
        return values
    values = []
    view = memoryview(body)
    at = used = 0
    for head_size, size, count, _ in _ROW.iter_unpack(table):
        head = bytes(view[at : at + head_size])
        at += head_size
        values.append(Packed(Payload(view[at : at + size], list(buffers[used : used + count]), []), head))
        at += size
        used += count
    return values
