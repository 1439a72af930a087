"""Data that is staged for the next call while the present one computes."""

from __future__ import annotations

import os
import pickle
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3 import S3, Proxy, Request

import flowfn as flow
from flowfn_runtime.data import ahead
from flowfn_runtime.data.cache import Cache
from flowfn_runtime.data.references import File
from flowfn_runtime.errors import DataNotFound


@pytest.fixture
def proxy(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with s3.proxy() as proxy:
        for name, value in s3.through(proxy).env.items():
            monkeypatch.setenv(name, value)
        flow.shutdown()
        yield proxy
        flow.shutdown()
        ahead.forget()


def sent(url: str) -> File:
    """A reference as it arrives in a worker."""
    arrived: File = pickle.loads(pickle.dumps(File(url)))
    return arrived


def in_use() -> list[bool]:
    return [snapshot.in_use for snapshot in Cache().room.snapshots()]


@pytest.mark.parametrize("size", [10, 5 << 20])
def test_it_is_there_without_another_look_and_held(s3: S3, proxy: Proxy, size: int) -> None:
    content = os.urandom(size)
    url = s3.put("data.bin", content)
    first, second = sent(url), sent(url)
    ahead.stage([first])
    assert in_use() == [True]
    before = len(proxy.requests)
    second.prepare()
    assert Path(second).read_bytes() == content
    assert len(proxy.requests) == before
    second.finish(True)
    while in_use() != [False]:  # the helper lets go when it has handed over, in its own time
        time.sleep(0.01)


def test_a_helper_that_was_killed_is_replaced(s3: S3, proxy: Proxy) -> None:
    for name in ("a", "b"):
        s3.put(name, os.urandom(5 << 20))
    ahead.stage([sent(f"{s3.url}/a")])
    first = ahead._helper
    assert first is not None
    first.shutdown(socket.SHUT_RDWR)
    ahead.stage([sent(f"{s3.url}/b")])
    assert ahead._helper is not first
    assert in_use() == [True, True]
    for name in ("a", "b"):
        staged = ahead.take(sent(f"{s3.url}/{name}"))
        assert staged is not None
        staged.close()


def test_what_nobody_calls_for_does_not_stay(s3: S3, proxy: Proxy) -> None:
    for number in range(40):
        s3.put(f"{number}", b"x")
        ahead.stage([sent(f"{s3.url}/{number}")])
    assert sum(in_use()) <= 16
    for number in range(40):
        if staged := ahead.take(sent(f"{s3.url}/{number}")):
            staged.close()
    assert not any(in_use())


@pytest.mark.parametrize("size", [10, 5 << 20])
def test_errors_are_for_the_call_that_needs_it(s3: S3, proxy: Proxy, size: int) -> None:
    url = s3.put("gone", os.urandom(size))
    reference = sent(url)
    (s3.root / "gone").unlink()
    ahead.stage([reference])
    with pytest.raises(DataNotFound):
        reference.prepare()


def test_a_map_lists_and_fetches_each_object_once(s3: S3, proxy: Proxy) -> None:
    urls = [s3.put(f"{number}.bin", os.urandom(5 << 20)) for number in range(6)]

    @flow.function(max_workers=1)
    def size(file: flow.File) -> int:
        return os.path.getsize(file)

    assert list(size.map([flow.File(url) for url in urls])) == [5 << 20] * 6

    def key(request: Request) -> str:
        return next(url for url in urls if url.rpartition("/")[2] in request.target)

    # Once by the client, which pins it, and once by whoever stages it.
    assert max(Counter(key(request) for request in proxy.requests if request.is_listing).values()) <= 2
    assert Counter(map(key, proxy.gets)) == Counter(urls)
