"""Objects over 5 GiB, which S3 takes in parts only: their ETag is no digest of the content, but one of digests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowfn_runtime.data.cache import Cache
from flowfn_runtime.data.sources import open_source
from flowfn_runtime.data.verify import matches

SIZE, PART = (5 << 30) + 1, 8 << 20


@pytest.fixture
def server() -> Iterator[tuple[str, str]]:
    """The endpoint of a server with one such object, and its ETag."""
    program = [sys.executable, str(Path(__file__).with_name("big_s3.py")), str(SIZE), str(PART)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port, etag = process.stdout.readline().split()
        yield f"http://127.0.0.1:{port}", etag
        process.kill()


def test_an_object_of_more_than_5_gib(server: tuple[str, str], tmp_path: Path) -> None:
    room = os.statvfs(tmp_path)
    if room.f_bavail * room.f_frsize < 2 * SIZE:
        pytest.skip("there is no room for so large an object")
    endpoint, etag = server
    assert etag.endswith("-641")
    source = open_source("s3://big/zeros", {"key": "k", "secret": "s", "endpoint_url": endpoint})
    cache = Cache()
    with cache.stage(source) as snapshot:
        source.close()
        assert snapshot.fetched_bytes == SIZE and os.path.getsize(snapshot.path) == SIZE
        assert matches(snapshot.path, SIZE, etag) is True
    shutil.rmtree(cache.root)  # pytest keeps what is in tmp_path for a while
