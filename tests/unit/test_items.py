from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowfn_runtime import items, pickling, wire
from flowfn_runtime.items import Packed

PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
GENERAL = st.lists(PLAIN, max_size=3) | st.dictionaries(st.text(max_size=3), PLAIN, max_size=3) | st.sets(st.integers())


def round_trip(values: list[Any]) -> list[Any]:
    flags, table, body, buffers = items.pack(values)
    return items.unpack(flags, table, body, [bytearray(b) for b in buffers])


@given(st.lists(PLAIN, max_size=50))
def test_plain_values_are_one_pickle(values: list[Any]) -> None:
    flags, table, _, buffers = items.pack(values)
    assert flags & wire.PLAIN and not table and not buffers
    assert round_trip(values) == values


@given(st.lists(PLAIN | GENERAL.map(lambda value: Packed(pickling.dumps(value), b"")), max_size=20))
def test_others_are_each_by_itself(values: list[Any]) -> None:
    unpacked = round_trip(values)
    assert len(unpacked) == len(values)
    for given_, got in zip(values, unpacked, strict=True):
        if type(got) is Packed:
            wanted = pickling.loads(given_.payload.data)[0] if type(given_) is Packed else given_
            assert got.head == b"" and pickling.loads(got.payload.data, got.payload.buffers)[0] == wanted
        else:
            assert got == given_


@given(st.lists(st.tuples(st.binary(max_size=20), st.binary(max_size=50), st.lists(st.binary(max_size=9), max_size=3))))
def test_heads_and_buffers_stay_with_their_item(rows: list[tuple[bytes, bytes, list[bytes]]]) -> None:
    packed = [Packed(pickling.Payload(data, buffers, []), head) for head, data, buffers in rows]
    flags, table, body, buffers = items.pack(packed) if packed else (0, b"", b"", [])
    got = items.unpack(flags, table, body, buffers)
    assert [(p.head, bytes(p.payload.data), list(map(bytes, p.payload.buffers))) for p in got] == rows


def test_a_bad_pickle_harms_nobody_but_itself() -> None:
    values = round_trip([1, Packed(pickling.Payload(b"no pickle", [], [])), "x"])
    assert [type(value) for value in values] == [Packed, Packed, Packed]
    assert pickling.loads(values[0].payload.data)[0] == 1 and pickling.loads(values[2].payload.data)[0] == "x"
    with pytest.raises(Exception, match="load key"):
        pickling.loads(values[1].payload.data)


def test_subclasses_of_plain_types_are_not_plain() -> None:
    class Text(str):
        __slots__ = ()

    flags, *_ = items.pack(["a", Packed(pickling.dumps(Text("b")))])
    assert not flags & wire.PLAIN
    (value,) = round_trip([Packed(pickling.dumps(Text("b")))])
    assert type(pickling.loads(value.payload.data)[0]) is Text
