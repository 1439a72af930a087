"""What can go wrong between a server and the cache, each with a real server and a proxy that makes it happen."""

from __future__ import annotations

import os
import pickle
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from s3 import S3, Fault, Proxy, Request, S3Server, xml

from flowfn_runtime.data.cache import Cache
from flowfn_runtime.data.snapshot import Snapshot
from flowfn_runtime.data.sources import open_source
from flowfn_runtime.data.transfer import PART_BYTES, WHOLE_BYTES
from flowfn_runtime.data.upload import upload
from flowfn_runtime.data.verify import verify
from flowfn_runtime.errors import DataAccessDenied, DataChanged, DataError, DataNotFound, DataUnavailable

MEBI = 1 << 20


@pytest.fixture
def proxy(s3: S3) -> Iterator[Proxy]:
    with s3.proxy() as proxy:
        yield proxy


def stage(s3: S3, proxy: Proxy | None, path: str = "", **options: Any) -> Snapshot:
    seen = s3.through(proxy) if proxy else s3
    source = open_source(f"{s3.url}/{path}", {**seen.options, **options})
    try:
        return Cache().stage(source)
    finally:
        source.close()


def content(snapshot: Snapshot) -> dict[str, bytes]:
    root = Path(snapshot.path)
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def clean() -> bool:
    """Whether the cache holds nothing wrong and nothing half done."""
    cache = Cache()
    cache.room.sweep()
    return not list(verify(cache)) and not list(Path(cache.root, "building").iterdir())


# -- what passes -------------------------------------------------------------------------------------------------------

PASSING: dict[str, Callable[[Request], Fault]] = {
    "500": lambda request: Fault(status=500, body=xml("InternalError")),
    "503 SlowDown": lambda request: Fault(status=503, body=xml("SlowDown", "Please reduce your request rate.")),
    "429": lambda request: Fault(status=429),
    "reset": lambda request: Fault(reset=True),
    "truncated": lambda request: Fault(keep=3, close=True),
    "reset in the body": lambda request: Fault(keep=3),
    "too short by its own account": lambda request: Fault(length=2),
    "too long by its own account": lambda request: Fault(length=2000),
    "damaged": lambda request: Fault(flip=True),
    "nonsense": lambda request: Fault(status=200, body=b"<html>a captive portal</html>"),
}


@pytest.mark.parametrize("name", PASSING)
def test_errors_that_pass_are_not_seen(s3: S3, proxy: Proxy, name: str) -> None:
    expected = {f"{index}": os.urandom(1000) for index in range(8)}
    for key, value in expected.items():
        s3.put(f"set/{key}", value)
    failed: set[str] = set()

    def once_a_key(request: Request) -> Fault | None:
        if request.is_get and request.target not in failed:
            failed.add(request.target)
            return PASSING[name](request)
        return None

    proxy.rule = once_a_key
    with stage(s3, proxy, "set") as snapshot:
        assert content(snapshot) == expected
    assert len(failed) == 8 and clean()


@pytest.mark.parametrize("fault", [Fault(keep=MEBI), Fault(keep=MEBI, close=True), Fault(reset=True), Fault(flip=True)])
def test_a_large_object_survives_failing_ranges(s3: S3, proxy: Proxy, fault: Fault) -> None:
    data = random.Random(1).randbytes(WHOLE_BYTES + 5 * MEBI + 1)
    s3.put("big.bin", data)
    failed: set[str] = set()

    def once_a_range(request: Request) -> Fault | None:
        if request.is_get and (span := request.headers["range"]) not in failed and len(failed) < 2:
            failed.add(span)
            return fault
        return None

    proxy.rule = once_a_range
    with stage(s3, proxy, "big.bin") as snapshot:
        assert Path(snapshot.path).read_bytes() == data
    parts = -(-len(data) // PART_BYTES)
    spans = {tuple(request.headers["range"].removeprefix("bytes=").split("-")) for request in proxy.gets}
    assert len({last for _, last in spans}) == parts
    if fault.close:  # what has come in order is not asked for again
        assert len(spans) > parts
    assert clean()


def test_listings_are_tried_again(s3: S3, proxy: Proxy) -> None:
    s3.put("set/a", b"a")
    proxy.rule = lambda request: Fault(status=503, body=xml("SlowDown")) if request.number < 3 else None
    with stage(s3, proxy, "set") as snapshot:
        assert content(snapshot) == {"a": b"a"}


def test_a_server_that_is_killed_and_restarted_in_mid_transfer(tmp_path: Path) -> None:
    server = S3Server(tmp_path / "buckets").start()
    (server.root / "bucket").mkdir()
    s3 = S3(server, "bucket", f"http://127.0.0.1:{server.port}")
    expected = {f"{index}": os.urandom(200_000) for index in range(40)}
    for key, value in expected.items():
        s3.put(f"set/{key}", value)
    with s3.proxy() as proxy:
        once = threading.Lock()

        def crash() -> None:
            server.kill()
            server.start()

        def rule(request: Request) -> Fault | None:
            if len(proxy.gets) >= 10 and once.acquire(blocking=False):
                return Fault(keep=70_000, then=crash)
            return None

        proxy.rule = rule
        with stage(s3, proxy, "set") as snapshot:
            assert content(snapshot) == expected
        assert once.locked() and clean()
    server.kill()


# -- what does not pass ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [Fault(status=503, body=xml("SlowDown")), Fault(reset=True), Fault(keep=3)])
def test_a_server_that_keeps_failing_is_unavailable(
    s3: S3, proxy: Proxy, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.put("set/a", b"a" * 1000)
    monkeypatch.setenv("FLOW_DATA_PATIENCE", "0.5")
    proxy.rule = lambda request: fault if request.is_get else None
    with pytest.raises(DataUnavailable, match=f"s3://{s3.bucket}/set") as caught:
        stage(s3, proxy, "set")
    assert caught.value.hint and clean()


def test_nobody_listens(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOW_DATA_PATIENCE", "0.2")
    with pytest.raises(DataUnavailable, match="Connection refused") as caught:
        stage(s3, None, "set", endpoint_url="http://127.0.0.1:9")
    assert "endpoint" in str(caught.value)
    with pytest.raises(DataUnavailable, match=r"nowhere\.invalid"):
        stage(s3, None, "set", endpoint_url="http://nowhere.invalid")


def test_content_that_never_fits_its_digest(s3: S3, proxy: Proxy) -> None:
    s3.put("set/a", b"a" * 1000)
    proxy.rule = lambda request: Fault(flip=True) if request.is_get else None
    with pytest.raises(DataChanged, match="arrived with the MD5"):
        stage(s3, proxy, "set")
    assert clean()
    s3.put("big", bytes(WHOLE_BYTES + 1))
    with pytest.raises(DataChanged, match="arrived with the MD5"):
        stage(s3, proxy, "big")
    assert clean()


def test_an_object_that_changes_between_listing_and_read_is_listed_again(s3: S3, proxy: Proxy) -> None:
    s3.put("set/a", b"old")
    s3.put("set/b", b"b")
    changed: list[str] = []

    def change_first(request: Request) -> Fault | None:
        if request.is_get and not changed:
            changed.append(s3.put("set/a", b"newer"))
            (s3.root / "set/b").unlink()
        return None

    proxy.rule = change_first
    with stage(s3, proxy, "set") as snapshot:
        assert content(snapshot) == {"a": b"newer"}


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda path: path.write_bytes(b"newer"), "not the version"), (Path.unlink, "deleted after it was listed")],
)
def test_a_listing_that_decides_and_no_longer_holds(
    s3: S3, proxy: Proxy, change: Callable[[Path], Any], message: str
) -> None:
    s3.put("set/a", b"old")
    source = open_source(f"{s3.url}/set", s3.options)
    listing = source.listing()
    change(s3.root / "set/a")
    with pytest.raises(DataChanged, match=message) as caught:
        Cache().stage(source, listing=listing)
    assert f"{s3.url}/set/a" in str(caught.value) and clean()
    source.close()


def test_an_answer_with_another_etag_than_was_listed(s3: S3, proxy: Proxy) -> None:
    s3.put("set/a", b"content")
    other = Fault(headers={"etag": '"00000000000000000000000000000000"'})
    proxy.rule = lambda request: other if request.is_get and len(proxy.gets) == 1 else None
    with stage(s3, proxy, "set") as snapshot:  # as if it had changed: another listing decides
        assert content(snapshot) == {"a": b"content"}
    assert len(proxy.gets) == 2
    s3.put("set/b", b"more")
    proxy.rule = lambda request: other if request.is_get else None
    with pytest.raises(DataChanged, match="its ETag is 00000000000000000000000000000000"):
        stage(s3, proxy, "set")
    assert clean()


DENIED = [
    (403, "ExpiredToken", DataAccessDenied, "have expired", "AWS_SESSION_TOKEN"),
    (400, "ExpiredToken", DataAccessDenied, "have expired", "aws sso login"),
    (403, "InvalidAccessKeyId", DataAccessDenied, "does not know this access key", "AWS_ACCESS_KEY_ID"),
    (403, "SignatureDoesNotMatch", DataAccessDenied, "secret does not fit", "AWS_SECRET_ACCESS_KEY"),
    (403, "InvalidToken", DataAccessDenied, "session token is not valid", "AWS_SESSION_TOKEN"),
    (403, "RequestTimeTooSkewed", DataAccessDenied, "clock", "clock"),
    (403, "AccessDenied", DataAccessDenied, "denies listing", "s3:ListBucket"),
    (404, "NoSuchBucket", DataNotFound, "There is no bucket", "spelling"),
    (301, "PermanentRedirect", DataError, "not served by the region us-east-1", "AWS_REGION"),
    (400, "AuthorizationHeaderMalformed", DataError, "not served by the region us-east-1", "AWS_REGION"),
    (418, "Teapot", DataError, "418", ""),
]


@pytest.mark.parametrize(("status", "code", "kind", "message", "hint"), DENIED)
def test_each_refusal_says_what_to_do(
    s3: S3, proxy: Proxy, status: int, code: str, kind: type[DataError], message: str, hint: str
) -> None:
    s3.put("set/a", b"a")
    proxy.rule = lambda request: Fault(status=status, body=xml(code, "so it is"))
    with pytest.raises(kind, match=message) as caught:
        stage(s3, proxy, "set/")
    assert type(caught.value) is kind
    assert hint in (caught.value.hint or "") and s3.bucket in str(caught.value)
    assert s3.secret not in str(caught.value) and s3.key not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_real_refusals_of_a_real_server(s3: S3) -> None:
    s3.put("set/a", b"a")
    with pytest.raises(DataAccessDenied, match="does not know this access key"):
        stage(s3, None, "set", key="somebody-else")
    with pytest.raises(DataAccessDenied, match="secret does not fit"):
        stage(s3, None, "set", secret="wrong-secret")
    with pytest.raises(DataNotFound, match="nothing at"):
        stage(s3, None, "sett")
    source = open_source("s3://no-such-bucket-here/x", s3.options)
    with pytest.raises(DataNotFound, match="no bucket 'no-such-bucket-here'"):
        source.listing()
    source.close()


def test_a_prefix_may_be_denied_while_others_are_not(s3: S3, proxy: Proxy) -> None:
    s3.put("open/a", b"a")
    s3.put("secret/b", b"b")
    proxy.rule = lambda request: Fault(status=403, body=xml("AccessDenied")) if "secret" in request.target else None
    with pytest.raises(DataAccessDenied, match="secret"):
        stage(s3, proxy, "secret/")
    with pytest.raises(DataAccessDenied, match=r"denies read access to .*/secret/b"):
        stage(s3, proxy, "")
    with stage(s3, proxy, "open/") as snapshot:
        assert content(snapshot) == {"a": b"a"}


def test_an_anonymous_request_carries_no_signature(s3: S3, proxy: Proxy) -> None:
    def rule(request: Request) -> Fault:
        assert "authorization" not in request.headers
        return Fault(status=403, body=xml("AccessDenied"))

    proxy.rule = rule
    with pytest.raises(DataAccessDenied, match="denies listing") as caught:
        stage(s3, proxy, "set/", anon=True)
    assert "anonymous" in str(caught.value) and proxy.requests


def test_who_pays_is_said_and_signed(s3: S3, proxy: Proxy) -> None:
    s3.put("set/a", b"a")
    with stage(s3, proxy, "set", requester_pays=True) as snapshot:
        assert content(snapshot) == {"a": b"a"}
    assert proxy.gets
    for request in proxy.requests:
        assert request.headers["x-amz-request-payer"] == "requester"
        assert "x-amz-request-payer" in request.headers["authorization"]


def test_an_object_can_be_read_where_listing_is_denied(s3: S3, proxy: Proxy) -> None:
    s3.put("set/a", b"a")
    proxy.rule = lambda request: Fault(status=403, body=xml("AccessDenied")) if request.is_listing else None
    with stage(s3, proxy, "set/a") as snapshot:
        assert Path(snapshot.path).read_bytes() == b"a"


def test_the_region_that_the_server_names_is_used(s3: S3, proxy: Proxy) -> None:
    s3.put("set/a", b"a")
    wrong = xml("AuthorizationHeaderMalformed", "the region 'us-east-1' is wrong", Region="eu-north-1")

    def rule(request: Request) -> Fault | None:
        return None if "/eu-north-1/s3/" in request.headers["authorization"] else Fault(status=400, body=wrong)

    proxy.rule = rule
    with stage(s3, proxy, "set") as snapshot:
        assert content(snapshot) == {"a": b"a"}


# -- many at once, and sudden death ------------------------------------------------------------------------------------

STAGER = """
import os, sys
from flowfn_runtime.data.mounts import stage
from flowfn_runtime.data.spec import parse_mounts
staged = stage(parse_mounts(sys.argv[1]))
print(staged.binds[0].host_path, staged.fetched_bytes, flush=True)
sys.stdin.read()
"""


def stager(s3: S3, url: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", STAGER, url],
        env={**os.environ, **s3.env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_32_processes_download_a_prefix_once(s3: S3, proxy: Proxy) -> None:
    for index in range(60):
        s3.put(f"set/{index}", os.urandom(5000))
    processes = [stager(s3.through(proxy), f"{s3.url}/set") for _ in range(32)]
    outputs = [process.communicate(timeout=100)[0].split() for process in processes]
    assert len({path for path, _ in outputs}) == 1
    assert sum(int(fetched) for _, fetched in outputs) == 60 * 5000
    assert sorted(proxy.keys) == sorted(f"/{s3.bucket}/set/{index}" for index in range(60))
    assert clean()


def test_overlapping_prefixes_share_downloads(s3: S3, proxy: Proxy) -> None:
    for index in range(60):
        s3.put(f"set/{index % 3}/{index}", os.urandom(5000))
    with ThreadPoolExecutor(4) as pool:
        snapshots = list(pool.map(lambda key: stage(s3, proxy, key), ["set", "set/0", "set/1", "set/2"]))
    assert len(proxy.keys) == len(set(proxy.keys)) == 60
    for snapshot in snapshots:
        snapshot.close()


def test_killing_the_stager_at_any_moment_leaves_a_cache_that_is_right(
    s3: S3, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {f"{index}": os.urandom(3000) for index in range(40)} | {"big": os.urandom(WHOLE_BYTES + 4 * MEBI)}
    for key, value in expected.items():
        s3.put(f"set/{key}", value)
    seen = s3.through(proxy)
    # A moment is that of a request's number, not of a clock.
    for moment in random.Random(7).sample(range(1, 45), 20):
        with monkeypatch.context() as patch:
            patch.setenv("FLOW_CACHE", str(tmp_path / f"cache-{moment}"))
            kill_stager_at(len(proxy.requests) + moment, seen, proxy)
            assert clean()
            with stage(s3, proxy, "set") as snapshot:
                assert content(snapshot) == expected
            assert clean()


def kill_stager_at(number: int, seen: S3, proxy: Proxy) -> None:
    died = threading.Event()
    process = stager(seen, f"{seen.url}/set")

    def rule(request: Request) -> Fault | None:
        if request.number == number:
            process.kill()
            process.wait()
            died.set()
        return None

    proxy.rule = rule
    try:
        assert died.wait(60) and process.returncode == -signal.SIGKILL
    finally:
        proxy.rule = lambda request: None
        assert process.stdin and process.stdout
        process.stdin.close()
        process.stdout.close()


@pytest.mark.parametrize("size", [3 * MEBI, WHOLE_BYTES + 4 * MEBI])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stager_that_ends_while_the_server_is_silent_leaves_nothing(
    s3: S3, proxy: Proxy, size: int, number: signal.Signals
) -> None:
    s3.put("set/big", os.urandom(size))
    stalled, done = threading.Event(), threading.Event()

    def stall() -> None:
        stalled.set()
        done.wait(100)

    proxy.rule = lambda request: Fault(keep=2 * MEBI, then=stall) if request.is_get else None
    process = stager(s3.through(proxy), f"{s3.url}/set")
    try:
        assert stalled.wait(60)
        process.send_signal(number)
        process.wait(30)  # not when the server comes back
    finally:
        process.kill()
        done.set()
        assert process.stdin and process.stdout
        process.stdin.close()
        process.stdout.close()
    building = Path(Cache().root, "building")
    left = [path for path in building.rglob("*") if path.is_file() and path.stat().st_size]
    assert not left  # the bytes went with the process, without anybody who sweeps
    if number == signal.SIGINT:
        assert not list(building.iterdir())


@pytest.mark.parametrize("upwards", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_copy_that_ends_while_the_server_is_silent_leaves_nothing(
    s3: S3, proxy: Proxy, tmp_path: Path, number: signal.Signals, upwards: bool
) -> None:
    data = os.urandom(WHOLE_BYTES + 4 * MEBI)
    s3.put("big", data)
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_bytes(data)
    stalled, done = threading.Event(), threading.Event()

    def stall() -> None:
        stalled.set()
        done.wait(100)

    def rule(request: Request) -> Fault | None:
        return Fault(then=stall, keep=MEBI if request.is_get else None) if not request.is_listing else None

    if upwards:
        proxy.rule = lambda request: rule(request) if "partNumber=2" in request.target else None
        places = [str(out / "old"), f"{s3.url}/new"]
    else:
        proxy.rule = rule
        places = [f"{s3.url}/big", str(out / "old")]
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name("flow")), "data", "cp", *places],
        env={**os.environ, **s3.through(proxy).env, "TMPDIR": str(tmp_path)},
    )
    try:
        assert stalled.wait(60)
        process.send_signal(number)
        # Not when the server comes back.
        assert process.wait(30) == (130 if number == signal.SIGINT else -signal.SIGKILL)
    finally:
        process.kill()
        done.set()
    assert not (s3.root / "new").exists()
    if upwards and number == signal.SIGINT:  # the server need not keep the parts
        assert [request.method for request in proxy.requests if "uploadId" in request.target][-1] == "DELETE"
    assert [path.name for path in out.iterdir()] == ["old"] and (out / "old").read_bytes() == data
    assert not list(tmp_path.glob("flow-cp-*"))


def test_a_server_that_is_gone_while_parts_are_written_is_the_error_that_is_shown(
    s3: S3, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOW_DATA_PATIENCE", "0.5")
    (tmp_path / "big").write_bytes(bytes(WHOLE_BYTES + MEBI))
    proxy.rule = lambda request: Fault(reset=True) if "uploadId" in request.target else None
    with pytest.raises(DataUnavailable, match="can't be reached"):
        upload(str(tmp_path / "big"), f"{s3.url}/new", options=s3.through(proxy).options)
