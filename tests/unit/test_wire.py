"""Frames over real sockets and pipes: whatever is sent arrives, and whatever is not a frame is noticed."""

from __future__ import annotations

import gc
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowfn_runtime import shm, wire
from flowfn_runtime.errors import ProtocolError, VersionMismatch


class Pair:
    """Two ends of a conversation."""

    def __init__(self, *, shared_memory: bool = False, threshold: int = 1 << 17) -> None:
        one, other = socket.socketpair()
        fds = one.detach(), other.detach()
        self.here, self.there = wire.Stream(fds[0], fds[0]), wire.Stream(fds[1], fds[1])
        self.sides: list[socket.socket] = []
        if shared_memory:
            self.sides = list(socket.socketpair())
            for stream, side in zip((self.here, self.there), self.sides, strict=True):
                stream.arena, stream.mapped = shm.Arena(side, threshold), shm.Mapped(side)

    def close(self) -> None:
        self.here.close()
        self.there.close()
        for side in self.sides:
            side.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


@pytest.fixture
def shared() -> Iterator[Pair]:
    made = Pair(shared_memory=True, threshold=4096)
    yield made
    made.close()


FRAMES = st.fixed_dictionaries(
    {
        "kind": st.sampled_from([wire.CALL, wire.BATCH, wire.RESULT, wire.LOG]),
        "call": st.integers(0, 2**32 - 1),
        "arg": st.integers(0, 2**32 - 1),
        "flags": st.sampled_from([0, wire.AHEAD, wire.PLAIN | wire.LAST, wire.STDERR]),
        "meta": st.binary(max_size=300),
        "body": st.binary(max_size=5000) | st.just(b"b" * 100_000),
        "buffers": st.lists(st.binary(max_size=5000) | st.just(b"x" * 70_000), max_size=5),
    }
)


def same(frame: wire.Frame, sent: dict[str, Any]) -> bool:
    return (
        all(getattr(frame, name) == sent[name] for name in ("kind", "call", "arg", "meta"))
        and frame.flags & ~wire.BODY_SHARED == sent["flags"]
        and bytes(frame.body) == sent["body"]
        and list(map(bytes, frame.buffers)) == sent["buffers"]
    )


@pytest.mark.parametrize("shared_memory", [False, True])
@settings(max_examples=60, deadline=None)
@given(frames=st.lists(FRAMES, min_size=1, max_size=6))
def test_frames_arrive_as_they_were_sent(shared_memory: bool, frames: list[dict[str, Any]]) -> None:
    pair = Pair(shared_memory=shared_memory, threshold=4096)

    def send() -> None:
        for frame in frames:
            pair.here.send(**frame)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        for frame in frames:
            assert same(pair.there.receive(), frame)
    finally:
        sender.join()
        pair.close()


@settings(max_examples=60, deadline=None)
@given(frames=st.lists(FRAMES, min_size=1, max_size=4), data=st.data())
def test_in_whatever_pieces_they_come(frames: list[dict[str, Any]], data: st.DataObject) -> None:
    source, sink = Pair(), Pair()
    written = bytearray()

    def collect() -> None:
        while piece := os.read(source.there.read_fd, 1 << 16):
            written.extend(piece)

    collector = threading.Thread(target=collect)
    collector.start()
    for frame in frames:
        source.here.send(**frame)
    source.here.close()
    collector.join()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(written)), max_size=8)))

    def feed() -> None:
        for start, end in zip([0, *cuts], [*cuts, len(written)], strict=True):
            with memoryview(bytes(written[start:end])) as view:
                at = 0
                while at < len(view):
                    at += os.write(sink.here.write_fd, view[at:])

    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        for frame in frames:
            assert same(sink.there.receive(), frame)
    finally:
        feeder.join()
        source.close()
        sink.close()


@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=wire.HEAD.size, max_size=200))
def test_what_is_no_frame_is_noticed(noise: bytes) -> None:
    pair = Pair()
    try:
        os.write(pair.here.write_fd, noise)
        with pytest.raises(ProtocolError, match="no frame"):
            pair.there.receive()
    finally:
        pair.close()


def test_a_damaged_header_is_noticed(pair: Pair) -> None:
    pair.here.send(wire.CALL, call=7, meta=b"m", body=b"body")
    frame = bytearray(os.read(pair.there.read_fd, 1000))
    for position in range(wire.HEAD.size):
        damaged = bytearray(frame)
        damaged[position] ^= 1
        os.write(pair.here.write_fd, damaged)
        with pytest.raises(ProtocolError):
            pair.there.receive()
        while pair.there.pending or len(damaged) > len(frame):
            pair.there._rest = b""
    pair.there._rest = b""
    os.write(pair.here.write_fd, frame)
    assert pair.there.receive().body == b"body"


def test_stray_output_between_frames_is_noticed(pair: Pair) -> None:
    pair.here.send(wire.RESULT, body=b"1")
    os.write(pair.here.write_fd, b"hello from a chatty library, which is long enough to be seen\n")
    assert pair.there.receive().body == b"1"
    with pytest.raises(ProtocolError, match="chatty"):
        pair.there.receive()


def test_the_end_of_the_other_side(pair: Pair) -> None:
    pair.here.send(wire.CALL, body=b"x" * 1000)
    whole = os.read(pair.there.read_fd, 1 << 16)
    for cut in (0, 10, wire.HEAD.size, len(whole) - 1):
        broken = Pair()
        os.write(broken.here.write_fd, whole[:cut])
        broken.here.close()
        with pytest.raises(EOFError):
            broken.there.receive()
        broken.close()
    pair.there.close()
    with pytest.raises(EOFError):
        for _ in range(100):
            pair.here.send(wire.CALL, body=b"y" * 100_000)


def test_received_buffers_may_be_written(pair: Pair, shared: Pair) -> None:
    for one in (pair, shared):
        for size in (600, 3000, 20_000, 200_000):
            sender = threading.Thread(target=one.here.send, args=(wire.CALL,), kwargs={"buffers": [bytes(size)]})
            sender.start()
            (buffer,) = one.there.receive().buffers
            sender.join()
            memoryview(buffer)[0] = 1


@pytest.mark.parametrize("size", [600, 1 << 16, 200_000, 3 << 20, wire.FRESH_BYTES])
def test_bytes_arrive_as_bytes_and_arrays_as_their_owners_to_change(pair: Pair, size: int) -> None:
    value = os.urandom(size)
    sent = [memoryview(value), memoryview(bytearray(value)), memoryview(value)]
    sender = threading.Thread(target=pair.here.send, args=(wire.CALL,), kwargs={"buffers": sent})
    sender.start()
    received = pair.there.receive().buffers
    sender.join()
    assert received == [value] * 3
    assert not memoryview(received[1]).readonly
    if size >= 1 << 16:
        assert type(received[0]) is type(received[2]) is bytes


def test_many_threads_may_send(pair: Pair) -> None:
    def send(number: int) -> None:
        for i in range(30):
            pair.here.send(wire.LOG, call=number, arg=i, body=bytes([number]) * 3000, buffers=[bytes([number]) * 900])

    threads = [threading.Thread(target=send, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    seen: dict[int, int] = dict.fromkeys(range(8), 0)
    for _ in range(240):
        frame = pair.there.receive()
        assert frame.arg == seen[frame.call], "frames of one thread came out of order"
        seen[frame.call] += 1
        assert set(bytes(frame.body)) == set(bytes(frame.buffers[0])) == {frame.call}
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("size", [1, 5000, 60_000])
def test_a_body_straight_from_a_pipe(pair: Pair, size: int) -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, b"p" * size + b"later")
    pair.here.send_piped(wire.LOG, read_end, size, call=3, flags=wire.STDERR)
    frame = pair.there.receive()
    assert (frame.kind, frame.call, frame.flags) == (wire.LOG, 3, wire.STDERR) and frame.body == b"p" * size
    assert os.read(read_end, 100) == b"later"
    os.close(read_end)
    os.close(write_end)


# shared memory


def test_a_segment_is_used_again_once_nobody_has_it(shared: Pair) -> None:
    def send(byte: bytes) -> Any:
        shared.here.send(wire.CALL, body=b"", buffers=[byte * 50_000])
        return shared.there.receive().buffers[0]

    def release() -> None:
        shared.there.send(wire.RESULT)
        shared.here.receive()

    first = send(b"a")
    second = send(b"b")
    assert bytes(first) == b"a" * 50_000 and bytes(second) == b"b" * 50_000
    arena = shared.here.arena
    assert arena is not None and len(arena._segments) == 2
    part = first[10:20]
    del first, second
    gc.collect()
    release()
    third = send(b"c")
    assert len(arena._segments) == 2, "the second one's memory was free"
    assert bytes(part) == b"a" * 10 and bytes(third) == b"c" * 50_000
    del part, third
    gc.collect()
    release()
    assert len(arena._free) == 2


def give_back(shared: Pair, buffers: list[Any]) -> list[Any]:
    """Send these buffers of the other side's memory back; what arrives."""
    shared.there.send_back(wire.RESULT, call=1, arg=0, body=b"", buffers=buffers)
    frame = shared.here.receive()
    assert frame.kind == wire.RESULT and frame.flags == 0
    return frame.buffers


def test_what_nothing_else_refers_to_goes_back_in_its_segment(shared: Pair) -> None:
    there, here = shared.there.arena, shared.here.arena
    assert there is not None and here is not None
    for _ in range(3):
        shared.here.send(wire.CALL, buffers=[b"x" * 50_000, b"y" * 50_000])
        buffers = shared.there.receive().buffers
        buffers[1][:3] = b"new"
        back = give_back(shared, [buffers.pop(), buffers.pop()[5:20_000]])
        assert bytes(back[0]) == b"new" + b"y" * 49_997 and bytes(back[1]) == b"x" * 19_995
        assert not there._segments and not here._free
        del back, buffers
    assert len(here._segments) == 1, "it was used again each time"


def test_what_is_still_referred_to_is_copied(shared: Pair) -> None:
    there = shared.there.arena
    assert there is not None
    shared.here.send(wire.CALL, buffers=[b"x" * 50_000])
    kept = shared.there.receive().buffers[0]
    back = give_back(shared, [kept[:30_000]])
    kept[:5] = b"later"
    assert bytes(back[0]) == b"x" * 30_000 and len(there._segments) == 1
    del kept
    shared.there.send(wire.LOG)  # which says that the segment is free
    assert shared.here.receive().kind == wire.LOG
    assert shared.here.arena is not None and len(shared.here.arena._free) == 1


def test_what_lies_elsewhere_is_copied(shared: Pair) -> None:
    shared.here.send(wire.CALL, buffers=[b"x" * 50_000])
    received = shared.there.receive().buffers
    other = bytearray(b"z" * 50_000)
    assert list(map(bytes, give_back(shared, [received.pop(), memoryview(other)]))) == [b"x" * 50_000, bytes(other)]
    assert give_back(shared, [b"read-only" * 5000]) == [b"read-only" * 5000]
    assert give_back(shared, []) == []


def test_a_segment_that_was_never_sent(shared: Pair) -> None:
    shared.here._write(wire.RESULT, wire.GIVEN_BACK, 1, 0, 7, b"", b"", [(5, 1)], ())
    with pytest.raises(ProtocolError, match="never sent"):
        shared.there.receive()


def test_large_buffers_are_copied_whole_by_several_threads(shared: Pair) -> None:
    numpy = pytest.importorskip("numpy")
    size = 3 * shm.PART_BYTES + 12_345
    for seed in (1, 2):  # the second time into warm pages
        sent = numpy.random.default_rng(seed).integers(0, 255, size, dtype=numpy.uint8)
        shared.here.send(wire.CALL, buffers=[b"head" * 20, memoryview(sent)])
        head, received = shared.there.receive().buffers
        assert bytes(head) == b"head" * 20 and numpy.array_equal(numpy.frombuffer(received, numpy.uint8), sent)
        del head, received
        shared.there.send(wire.RESULT)
        shared.here.receive()
    assert shared.here.arena is not None and len(shared.here.arena._segments) == 1


def test_shared_memory_that_was_not_agreed_on(shared: Pair, pair: Pair) -> None:
    shared.here.send(wire.CALL, buffers=[b"x" * 50_000])
    os.write(pair.here.write_fd, os.read(shared.there.read_fd, 1000))
    with pytest.raises(ProtocolError, match="shared memory"):
        pair.there.receive()


def test_no_more_descriptors_means_the_plain_stream(shared: Pair) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    taken = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 2, limits[1]))
    try:
        try:
            while True:
                taken.append(os.dup(0))
        except OSError:
            pass
        shared.here.send(wire.CALL, buffers=[b"x" * 50_000])
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert bytes(shared.there.receive().buffers[0]) == b"x" * 50_000


# versions


def test_the_same_versions_understand_each_other() -> None:
    wire.check_versions(wire.versions(), wire.versions(), where="there")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("protocol", 99, "protocol 99"),
        ("python", [3, 1], "Python 3.1"),
        ("implementation", "pypy", "implementation pypy"),
        ("byteorder", "big", "byteorder big"),
        ("python", None, "Python None"),
    ],
)
def test_other_versions_are_named_with_the_remedy(key: str, value: Any, said: str) -> None:
    here = {**wire.versions(), "byteorder": "little"}
    with pytest.raises(VersionMismatch) as caught:
        wire.check_versions(here, {**here, key: value}, where="gpu-box")
    assert said in caught.value.message and "gpu-box" in caught.value.message and caught.value.hint


def test_platforms_may_differ() -> None:
    wire.check_versions(wire.versions(), {**wire.versions(), "platform": "darwin"}, where="there")
