from __future__ import annotations

import contextlib
import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from s3 import S3

from flowfn_runtime.data.cache import Cache
from flowfn_runtime.data.model import Listing, Object
from flowfn_runtime.data.room import parse_limit
from flowfn_runtime.data.snapshot import Snapshot, read_meta, write_file
from flowfn_runtime.data.sources import open_source
from flowfn_runtime.data.tree import plan
from flowfn_runtime.data.verify import matches, verify
from flowfn_runtime.errors import CacheFull, ConfigError, DataError, DataNotFound


def stage(bucket: Any, path: str = "", *, cache: Cache | None = None, **more: Any) -> Snapshot:
    source = open_source(f"{bucket.url}/{path}", bucket.options)
    try:
        return (cache or Cache()).stage(source, **more)
    finally:
        source.close()


def content(snapshot: Snapshot) -> dict[str, bytes | None]:
    root = Path(snapshot.path)
    return {
        str(path.relative_to(root)): None if path.is_dir() else path.read_bytes() for path in sorted(root.rglob("*"))
    }


# -- keys --------------------------------------------------------------------------------------------------------------

ODD = [
    "with space",
    " leading and trailing ",
    "ünïcødé/日本語/🎉",
    "plus+percent%20amp&amp;lt<gt>",
    "quote'double\"",
    "back\\slash",
    "semi;colon?question#hash=equals",
    "Case",
    "case",
    "CASE/x",
    ".hidden",
    "..almost",
    "a..b/...",
    "empty",
    "deep/" * 60 + "end",
    "~tilde",
    "-dash",
    "n" * 255,
]


def test_odd_keys_become_the_files_of_that_name(exact_s3: Any) -> None:
    for key in ODD:
        exact_s3.put(f"set/{key}", b"" if key == "empty" else key.encode())
    exact_s3.put("set/folder/")  # as consoles mark a directory
    exact_s3.put("set/")
    exact_s3.put("set/marked/")
    exact_s3.put("set/marked/file", b"x")
    exact_s3.put("set/also", b"")  # an empty object that is a prefix too is a mark of the same kind
    exact_s3.put("set/also/file", b"y")
    with stage(exact_s3, "set/") as snapshot:
        found = content(snapshot)
        for key in ODD:
            assert found[key] == (b"" if key == "empty" else key.encode())
        assert found["folder"] is None and found["marked/file"] == b"x" and found["also/file"] == b"y"
    with stage(exact_s3, "set") as again:
        assert again.digest == snapshot.digest and again.fetched_bytes == 0
    assert not list(verify(Cache()))


def test_names_that_listings_encode_in_more_than_one_way(s3: S3) -> None:
    # This server writes a space as "+" in its listings, as Amazon's does; moto's as "%20".
    names = ["a b", "a+b", "a%20b", "a%2Bb", "ü + %", "1=2&3;4", "<tag> \"quoted\" 'x'"]
    for name in names:
        s3.put(f"set/{name}", name.encode())
    with stage(s3, "set") as snapshot:
        assert content(snapshot) == {name: name.encode() for name in names}


@pytest.mark.parametrize(
    "key", ["set/../escape", "set/a/../../b", "set//double", "set/./dot", "set/slash/", "set/" + "n" * 256, "set/.."]
)
def test_keys_that_are_no_paths_are_refused_by_name(exact_s3: Any, key: str, tmp_path: Path) -> None:
    exact_s3.put("set/fine", b"x")
    exact_s3.put(key, b"content")
    with pytest.raises(DataError, match="1 key that can't be file names") as caught:
        stage(exact_s3, "set/")
    assert repr(key) in str(caught.value)
    with stage(exact_s3, "set/fine") as snapshot:
        assert Path(snapshot.path).read_bytes() == b"x"
    # The object itself can still be read.
    source = open_source(f"{exact_s3.url}/{key}", exact_s3.options)
    (found, *_) = source.listing().objects if not key.endswith("/") else [Object(key)]
    pieces: list[bytes] = []
    source.fetch(found, 0, None, lambda piece: pieces.append(bytes(piece)))
    assert b"".join(pieces) == b"content"
    source.close()


def test_a_key_that_is_a_prefix_too(exact_s3: Any) -> None:
    exact_s3.put("set/a", b"object")
    exact_s3.put("set/a/b", b"below")
    exact_s3.put("set/a-b", b"between the two in order")
    with pytest.raises(DataError, match=r"objects and prefixes of others at once: 'set/a'"):
        stage(exact_s3, "set/")
    with pytest.raises(DataError, match="both an object and a prefix") as caught:
        stage(exact_s3, "set/a")
    assert f"{exact_s3.url}/set/a/ " in str(caught.value)
    with stage(exact_s3, "set/a/") as snapshot:
        assert content(snapshot) == {"b": b"below"}


def test_prefixes_end_at_a_slash(exact_s3: Any) -> None:
    for key in ("p-1", "p/x", "p0", "pp/x"):
        exact_s3.put(key, key.encode())
    with stage(exact_s3, "p") as snapshot:
        assert content(snapshot) == {"x": b"p/x"}
    with stage(exact_s3, "p0") as single:
        assert single.single and Path(single.path).read_bytes() == b"p0"


def test_nothing_is_not_an_empty_directory(exact_s3: Any) -> None:
    with stage(exact_s3) as snapshot:  # the bucket is there, and it is empty
        assert content(snapshot) == {}
    exact_s3.put("dir/")
    with stage(exact_s3, "dir") as snapshot:
        assert content(snapshot) == {}
    for path in ("typo", "typo/", "di"):
        with pytest.raises(DataNotFound, match=f"nothing at .*/{path}"):
            stage(exact_s3, path)


def test_more_keys_than_a_page(s3: S3) -> None:
    keys = [f"{index:05}" for index in range(2345)]
    for key in keys:
        s3.put(f"set/{key}")
    for key in ("se", "set-1", "set0", "set/00999-", "zzz"):
        s3.put(key)
    expected = sorted([*keys, "00999-"])
    first = stage(s3, "set/")
    assert list(content(first)) == expected
    with stage(s3, "set") as same:
        assert same.digest == first.digest
    # The second listing runs in series side by side that begin where the pages of the first did.
    (s3.root / "set/01998").unlink()
    s3.put("set/00000-new")
    with stage(s3, "set/") as second:
        assert list(content(second)) == sorted({*expected, "00000-new"} - {"01998"})
    first.close()


def test_multipart_etags_are_digests_too(exact_s3: Any) -> None:
    data = os.urandom(11 << 20)
    client, bucket = exact_s3.client, exact_s3.bucket
    upload = client.create_multipart_upload(Bucket=bucket, Key="big")["UploadId"]
    parts = []
    for number, start in enumerate(range(0, len(data), 5 << 20), 1):
        answer = client.upload_part(
            Bucket=bucket, Key="big", UploadId=upload, PartNumber=number, Body=data[start : start + (5 << 20)]
        )
        parts.append({"PartNumber": number, "ETag": answer["ETag"]})
    etag = client.complete_multipart_upload(
        Bucket=bucket, Key="big", UploadId=upload, MultipartUpload={"Parts": parts}
    )["ETag"].strip('"')
    assert etag.endswith("-3")
    with stage(exact_s3, "big") as snapshot:
        assert Path(snapshot.path).read_bytes() == data
        assert matches(snapshot.path, len(data), etag) is True
        assert matches(snapshot.path, len(data), "0" * 32) is False
        assert matches(snapshot.path, len(data), "opaque") is None


BAD = {"", ".", "..", "a\0b", "\udc80", "n" * 256, "ü" * 128}
segments = st.sampled_from(["a", "b", "A", "ü", "c.d", "..a", "\\", "~", " ", "\n", "n" * 255, *sorted(BAD)])
keys = st.lists(segments, min_size=1, max_size=5).map("/".join)


@given(st.lists(st.tuples(keys, st.integers(0, 2)), unique_by=lambda pair: pair[0], max_size=8))
def test_no_key_leads_out_of_the_tree(objects: list[tuple[str, int]]) -> None:
    listing = Listing("s3://b/p/", "p/", False, tuple(Object("p/" + key, size) for key, size in sorted(objects)))
    try:
        tree = plan(listing)
    except DataError:
        names = [key.removesuffix("/") if not size else key for key, size in objects]
        odd = any(BAD & set(name.split("/")) for name in names)
        folders = {key.rstrip("/") for key, size in objects if not size and key.endswith("/")} | {
            "/".join(key.split("/")[:depth]) for key, _ in objects for depth in range(1, key.count("/") + 1)
        }
        assert odd or any(size and key in folders for key, size in objects)
        return
    paths = [*tree.directories, *(path for path, _ in tree.files)]
    assert len(paths) == len(set(paths))
    for path in paths:
        assert os.path.normpath(path) == path and path[0] != "/" and path.split("/")[0] != ".."
        parent = os.path.dirname(path)
        assert not parent or parent in tree.directories


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_cached_files_are_read_only_and_dated(s3: S3) -> None:
    s3.put("set/a", b"a")
    os.utime(s3.root / "set/a", (1_700_000_000, 1_700_000_000))
    with stage(s3, "set") as snapshot:
        status = os.stat(os.path.join(snapshot.path, "a"))
        assert stat.S_IMODE(status.st_mode) & 0o222 == 0
        assert status.st_mtime == 1_700_000_000
        assert stat.S_IMODE(os.stat(Cache().root).st_mode) == 0o700


def test_a_cache_in_the_working_directory(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.put("set/a", b"a")
    monkeypatch.chdir(tmp_path)
    source = open_source(f"{s3.url}/set", s3.options)
    with Cache("here").stage(source) as snapshot:
        assert content(snapshot) == {"a": b"a"}
        assert Path(snapshot.path).is_relative_to(tmp_path / "here")
    source.close()


def test_versions_share_what_did_not_change(s3: S3) -> None:
    for index in range(5):
        s3.put(f"set/{index}", bytes(1000))
    with stage(s3, "set") as first:
        s3.put("set/0", b"new")
        with stage(s3, "set") as second:
            assert second.fetched_bytes == 3
            inodes = [os.stat(os.path.join(snapshot.path, "1")).st_ino for snapshot in (first, second)]
            assert inodes[0] == inodes[1]
            assert Cache().room.used_bytes() == 5003


def limited(limit: int) -> Cache:
    return Cache(limit_bytes=limit)


def urls(cache: Cache) -> set[str]:
    return {held.url.rpartition("/")[2] for held in cache.room.snapshots()}


def test_the_least_recently_used_goes_first_and_nothing_in_use(s3: S3) -> None:
    cache = limited(3500)
    for name in "abcd":
        s3.put(name, os.urandom(1000))
    held = stage(s3, "a", cache=cache)
    stage(s3, "b", cache=cache).close()
    stage(s3, "c", cache=cache).close()
    with stage(s3, "b", cache=cache) as older:
        os.utime(Path(older.path).parent.parent / "lease", (1, 1))
    os.utime(Path(held.path).parent.parent / "lease", (0, 0))
    stage(s3, "d", cache=cache).close()
    assert urls(cache) == {"a", "c", "d"}
    assert cache.room.used_bytes() == 3000
    held.close()
    s3.put("e", os.urandom(1000))
    stage(s3, "e", cache=cache).close()
    assert urls(cache) == {"c", "d", "e"}


def test_what_a_child_inherited_is_in_use(s3: S3) -> None:
    cache = limited(1500)
    s3.put("a", os.urandom(1000))
    s3.put("b", os.urandom(1000))
    snapshot = stage(s3, "a", cache=cache)
    child = subprocess.Popen(
        [sys.executable, "-c", "input()"], pass_fds=[snapshot.lease_fd], stdin=subprocess.PIPE, text=True
    )
    snapshot.close()
    with pytest.raises(CacheFull, match=r"1000 B of s3://\S+/b don't fit .* running tasks hold s3://\S+/a \(1000 B\)"):
        stage(s3, "b", cache=cache)
    assert urls(cache) == {"a"}
    child.communicate("\n")
    with stage(s3, "b", cache=cache):
        assert urls(cache) == {"b"}


def test_too_much_for_the_limit_is_said_before_anything_moves(s3: S3) -> None:
    s3.put("set/a", bytes(5000))
    s3.put("small", bytes(10))
    cache = limited(4000)
    stage(s3, "small", cache=cache).close()
    with s3.proxy() as proxy:
        with pytest.raises(CacheFull, match=r"may hold 3\.9 KiB") as caught:
            stage(s3.through(proxy), "set", cache=cache)
        assert not proxy.gets
    assert "FLOW_CACHE_LIMIT" in str(caught.value) and cache.root in str(caught.value)
    assert urls(cache) == {"small"}  # dropping it would not have helped


def test_a_full_disk_is_cache_full_and_leaves_room_again(
    s3: S3, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOW_CACHE", str(small_disk / "cache"))
    for index in range(6):
        s3.put(f"set/{index}", bytes(1 << 20))
    cache = limited(1 << 40)
    stage(s3, "set/0", cache=cache).close()
    (small_disk / "other").write_bytes(bytes(4 << 20))
    with pytest.raises(CacheFull, match="its disk has"):
        stage(s3, "set", cache=cache)
    (small_disk / "other").unlink()
    with stage(s3, "set", cache=cache) as snapshot:
        assert len(content(snapshot)) == 6
    assert not list(verify(cache))


def test_a_disk_without_inodes_left_is_full_too(s3: S3, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,nr_inodes=150", str(small_disk)], check=True)
    for index in range(100):
        s3.put(f"set/{index // 3}/{index}", bytes(10))
    cache = Cache(str(small_disk / "cache"))
    with pytest.raises(CacheFull, match=r"of the 150 files \(inodes\)"):
        stage(s3, "set", cache=cache)
    with stage(s3, "set/0", cache=cache) as snapshot:
        assert len(content(snapshot)) == 3


def test_a_disk_that_fills_up_in_mid_transfer(s3: S3, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from s3 import Fault

    monkeypatch.setenv("FLOW_CACHE", str(small_disk / "cache"))
    for index in range(5):
        s3.put(f"set/{index}", os.urandom(1 << 20))
    cache = limited(1 << 40)

    filling, filled = threading.Lock(), threading.Event()

    def fill() -> None:
        with filling:
            if not filled.is_set():
                with contextlib.suppress(OSError), open(small_disk / "other", "wb") as file:
                    while True:
                        os.write(file.fileno(), bytes(1 << 16))
                filled.set()

    with s3.proxy() as proxy:
        proxy.rule = lambda request: Fault(then=fill) if len(proxy.gets) >= 2 else None
        with pytest.raises(CacheFull):
            stage(s3.through(proxy), "set", cache=cache)
    assert filled.wait(60)
    (small_disk / "other").unlink()
    assert cache.room.used_bytes() == 0 and cache.room.free_bytes() > 7 << 20
    with stage(s3, "set", cache=cache) as snapshot:
        assert len(content(snapshot)) == 5


def test_after_a_crash_of_the_machine_what_is_short_is_made_again(s3: S3) -> None:
    s3.put("set/a", b"a" * 100)
    s3.put("set/b", b"b" * 100)
    snapshot = stage(s3, "set")
    snapshot.close()
    folder = os.path.dirname(snapshot.path)
    meta = read_meta(folder)
    assert meta is not None
    write_file(os.path.join(folder, "meta.json"), json.dumps(meta | {"boot": "before"}).encode())
    with stage(s3, "set") as whole:
        assert whole.fetched_bytes == 0
    os.chmod(os.path.join(snapshot.path, "a"), 0o600)
    os.truncate(os.path.join(snapshot.path, "a"), 50)
    write_file(os.path.join(folder, "meta.json"), json.dumps(meta | {"boot": "before"}).encode())
    with stage(s3, "set") as mended:
        assert content(mended) == {"a": b"a" * 100, "b": b"b" * 100}


def test_verify_names_what_is_wrong(s3: S3) -> None:
    for name in "abcd":
        s3.put(f"set/{name}", os.urandom(100))
    with stage(s3, "set") as snapshot:
        assert not list(verify(Cache()))
        a, b, c = (Path(snapshot.path, name) for name in "abc")
        a.unlink()
        os.chmod(b, 0o600)
        os.truncate(b, 5)
        os.chmod(c, 0o600)
        modified = os.stat(c).st_mtime
        c.write_bytes(bytes(100))
        os.utime(c, (modified, modified))
        assert [(problem.path, problem.what) for problem in verify(Cache())] == [
            (str(a), "can't be read: No such file or directory"),
            (str(b), "has 5 bytes instead of 100"),
            (str(c), "has other content than its ETag says"),
        ]
        assert all(problem.url == f"{s3.url}/set" for problem in verify(Cache()))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("100", 100), ("2kB", 2000), ("1.5GiB", 3 << 29), ("10 MB", 10**7), ("50%", 500), ("1t", 10**12)],
)
def test_limits(text: str, expected: int) -> None:
    assert parse_limit(text, 1000) == expected


@pytest.mark.parametrize("text", ["", "much", "-1", "1XB", "1.2.3G"])
def test_wrong_limits(text: str) -> None:
    with pytest.raises(ConfigError, match="FLOW_CACHE_LIMIT"):
        parse_limit(text, 1000)
