from __future__ import annotations

import pickle
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowfn_runtime import pickling
from flowfn_runtime.errors import SerializationError

BIG = b"big" * 30_000
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.text(max_size=20)
    | st.binary(max_size=20)
    | st.just(BIG)
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.tuples(inner, inner)
        | st.dictionaries(LEAVES.filter(lambda x: x == x), inner, max_size=4)
    ),
    max_leaves=25,
)


def round_trip(payload: pickling.Payload) -> Any:
    data = bytes(payload.data)
    return pickling.loads(data, [bytearray(b) for b in payload.buffers])[0]


def alike(one: Any, other: Any) -> bool:
    """Equal, with the same types all the way down."""
    if type(one) is not type(other):
        return False
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, dict):
        return alike(list(one.items()), list(other.items()))
    return bool(one == other)


@settings(max_examples=200, deadline=None)
@given(VALUES)
def test_any_way_gives_the_same(value: Any) -> None:
    quick = pickling.dumps(value)
    general = pickling._dumps_general(value)
    assert alike(round_trip(quick), value)
    assert alike(round_trip(general), value)
    if pickling.is_plain(value) and not quick.buffers:
        assert pickle.loads(quick.data) == pickle.loads(pickle.dumps(value, 5))


@settings(max_examples=100, deadline=None)
@given(VALUES)
def test_what_is_shared_stays_shared(value: Any) -> None:
    holder = [value, {"again": value}, (value,)]
    back = round_trip(pickling.dumps(holder))
    if isinstance(value, (list, dict)) or (isinstance(value, tuple) and value):
        assert back[0] is back[1]["again"] is back[2][0]


@pytest.mark.parametrize("big", [False, True])
def test_values_within_themselves(big: bool) -> None:
    loop: list[Any] = [b"x" * 100_000] if big else []
    loop.append(loop)
    table: dict[str, Any] = {"loop": loop}
    table["self"] = table
    back = round_trip(pickling.dumps(table))
    assert back["self"] is back and back["loop"][-1] is back["loop"]


def test_big_bytes_go_out_of_band_and_once() -> None:
    big = b"q" * 200_000
    payload = pickling.dumps({"a": big, "b": [big, {"c": big}]})
    assert len(payload.data) < 1000 and list(map(len, payload.buffers)) == [200_000]
    back = round_trip(payload)
    assert back == {"a": big, "b": [big, {"c": big}]} and type(back["a"]) is bytes


def test_arrays_go_out_of_band() -> None:
    np = pytest.importorskip("numpy")
    array = np.arange(10_000)
    payload = pickling.dumps({"x": array, "y": np.arange(3)})
    assert list(map(len, payload.buffers)) == [80_000], "a small array is not worth a buffer"
    back = round_trip(payload)
    assert np.array_equal(back["x"], array) and back["x"].flags.writeable and back["y"].flags.writeable


def test_nothing_out_of_band_where_that_is_asked_for() -> None:
    payload = pickling.dumps({"x": b"x" * 200_000, "y": bytearray(200_000)}, in_band=True)
    assert payload.buffers == [] and round_trip(payload)["x"] == b"x" * 200_000


@pytest.mark.parametrize(
    "value",
    [
        list(range(1000)),
        tuple("abc" * 50),
        {i: str(i) for i in range(100)},
        [[[[[[[[[1]]]]]]]]],
        {"a": {"b": {"c": {"d": {"e": {"f": {"g": 1}}}}}}},
    ],
    ids=["long-list", "long-tuple", "long-dict", "deep-list", "deep-dict"],
)
def test_containers_that_are_not_looked_into(value: Any) -> None:
    assert round_trip(pickling.dumps(value)) == value


def test_plain_is_only_what_pickle_alone_gets_right() -> None:
    class Text(str):
        __slots__ = ()

    class Items(list[Any]): ...

    for plain in (1, "x", None, [1, (2, {"a": b"b"})], {1: [2]}):
        assert pickling.is_plain(plain)
    for other in (Text("x"), Items(), {(1,): 2}, {1, 2}, [lambda: 1], range(3), [Text("x")], {"a": Items()}):
        assert not pickling.is_plain(other)


def test_functions_by_value() -> None:
    base = 10
    function = round_trip(pickling.dumps({"f": lambda x: x + base}))["f"]
    assert function(1) == 11


# references


class Reference:
    """A data reference, as `flow.File` is one."""

    def __reduce__(self) -> Any:
        pickling.note_reference(self)
        return _rebuilt, ()


def _rebuilt() -> Reference:
    reference = Reference()
    pickling.note_reference(reference)
    return reference


def test_references_are_noted_on_both_sides() -> None:
    one, other = Reference(), Reference()
    payload = pickling.dumps({"a": [one], "b": (other, 1), "c": one})
    assert payload.references == [one, other]
    value, references = pickling.loads(bytes(payload.data), payload.buffers)
    assert references == [value["a"][0], value["b"][0]] and value["c"] is value["a"][0]


def test_outside_of_flowfn_a_reference_is_pickled_as_it_is() -> None:
    assert isinstance(pickle.loads(pickle.dumps(Reference())), Reference)
    pickling.note_reference(Reference())


def test_what_is_pickled_meanwhile_notes_its_own() -> None:
    class Nested:
        def __reduce__(self) -> Any:
            inner = pickling.dumps([Reference()])
            assert len(inner.references) == 1
            return dict, ()

    outer = Reference()
    assert pickling.dumps([Nested(), outer]).references == [outer]


def test_a_shared_object_needs_its_call() -> None:
    with pytest.raises(SerializationError, match="put"):
        pickling.shared_object("1-1")
    payload = pickle.dumps(_SharedStandIn())
    assert pickling.loads(payload, objects={"7-7": "the object"})[0] == "the object"
    with pytest.raises(SerializationError, match="get"):
        pickling.loads(payload)


class _SharedStandIn:
    def __reduce__(self) -> Any:
        return pickling.shared_object, ("7-7",)


# what can't be pickled


class Slotted:
    __slots__ = ("lock",)

    def __init__(self) -> None:
        self.lock = threading.Lock()


class Holder:
    def __init__(self, part: Any) -> None:
        self.part = part


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (threading.Lock(), "value (a _thread.lock)"),
        ([1, [2, threading.Lock()]], "value[1][1] (a _thread.lock)"),
        ({"a": {"b": threading.Lock()}}, "value['a']['b']"),
        (Holder({"x": [Holder(threading.Lock())]}), "value.part['x'][0].part"),
        (Slotted(), "value.lock"),
        ((i for i in range(3)), "value (a generator)"),
        ({threading.Lock()}, "value[0]"),
    ],
)
def test_the_culprit_is_named(value: Any, path: str) -> None:
    with pytest.raises(SerializationError) as caught:
        pickling.dumps(value)
    assert caught.value.message.startswith(path), caught.value.message
    assert caught.value.hint and isinstance(caught.value, TypeError) and caught.value.__cause__ is not None


def test_the_culprit_in_a_function() -> None:
    lock = threading.Lock()
    with pytest.raises(SerializationError, match="closure variable 'lock'"):
        pickling.dumps(lambda: lock.locked())


def test_too_deep_is_said_so() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(SerializationError, match="too deeply"):
        pickling.dumps(deep)
    while deep:  # taken apart by hand: to free it at once would go as deep
        deep = deep.pop()


def test_what_raises_anything_while_it_is_pickled() -> None:
    class Spiteful:
        def __reduce__(self) -> Any:
            raise KeyError("no")

    with pytest.raises(SerializationError, match="Spiteful"):
        pickling.dumps({"x": Spiteful()})
