from __future__ import annotations

import gzip
import hmac
import http.server
import json
import os
import socket
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from s3 import S3, Fault, Request, xml

from flowfn.cli import main
from flowfn_runtime import limits
from flowfn_runtime.data import crew
from flowfn_runtime.data.cache import Cache
from flowfn_runtime.data.connection import BUFFER_BYTES
from flowfn_runtime.data.copying import download, stream
from flowfn_runtime.data.credentials import environment, s3_settings
from flowfn_runtime.data.endpoint import Endpoint
from flowfn_runtime.data.fsspec_source import FsspecSource
from flowfn_runtime.data.http1 import Pool
from flowfn_runtime.data.model import Progress
from flowfn_runtime.data.s3 import Signer
from flowfn_runtime.data.sources import S3Source, open_source
from flowfn_runtime.data.transfer import PART_BYTES, WHOLE_BYTES
from flowfn_runtime.data.upload import upload
from flowfn_runtime.errors import ConfigError, DataAccessDenied, DataError, DataNotFound, FlowError


def fetch(url: str, options: dict[str, Any], path: Path, **more: Any) -> int:
    source = open_source(url, options)
    try:
        return download(source, str(path), **more)
    finally:
        source.close()


def tree(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


# -- S3 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, PART_BYTES, WHOLE_BYTES, WHOLE_BYTES + 1, 3 * PART_BYTES])
def test_any_size_comes_whole(s3: S3, tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    url = s3.put("file.bin", data)
    assert fetch(url, s3.options, tmp_path / "out") == size
    assert (tmp_path / "out").read_bytes() == data
    assert fetch(url, s3.options, tmp_path) == size  # into a directory: under its own name
    assert (tmp_path / "file.bin").read_bytes() == data


@pytest.mark.parametrize("size", [0, 1, 100_000, (16 << 20) + 1, 33 << 20])
def test_uploads_arrive_whole(s3: S3, tmp_path: Path, size: int) -> None:
    (tmp_path / "file").write_bytes(data := os.urandom(size))
    assert upload(str(tmp_path / "file"), f"{s3.url}/deep/file.bin", options=s3.options) == size
    assert (s3.root / "deep/file.bin").read_bytes() == data


def test_uploads_survive_what_passes_and_report_what_does_not(s3: S3, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "small").write_bytes(b"small")
    (folder / "sub/big").write_bytes(data := os.urandom(20 << 20))
    failed: set[str] = set()

    def once(request: Request) -> Fault | None:
        if request.target not in failed:
            failed.add(request.target)
            return Fault(status=503, body=xml("SlowDown"))
        return None

    with s3.proxy() as proxy:
        proxy.rule = once
        seen: list[Progress] = []
        upload(str(folder), f"{s3.url}/up", options=s3.through(proxy).options, progress=seen.append)
        assert tree(s3.root / "up") == {"small": b"small", "sub/big": data}
        assert seen[-1].done_bytes == seen[-1].total_bytes == len(data) + 5 and seen[-1].done_objects == 2
        proxy.rule = lambda request: Fault(status=403, body=xml("AccessDenied")) if request.method == "PUT" else None
        with pytest.raises(DataAccessDenied, match="denies write access") as caught:
            upload(str(folder), f"{s3.url}/denied", options=s3.through(proxy).options)
        assert "s3:PutObject" in str(caught.value)
    with pytest.raises(DataNotFound, match="nowhere"):
        upload(str(tmp_path / "nowhere"), f"{s3.url}/x", options=s3.options)
    with pytest.raises(DataError, match="names no object"):
        upload(str(folder / "small"), f"{s3.url}/", options=s3.options)


def test_an_interrupted_stream_goes_on_where_it_stopped(s3: S3) -> None:
    data = os.urandom(3 << 20)
    s3.put("file", data)
    with s3.proxy() as proxy:
        proxy.rule = lambda request: (
            Fault(keep=1_500_000, close=True) if len(proxy.gets) <= 1 and request.is_get else None
        )
        source = open_source(f"{s3.url}/file", s3.through(proxy).options)
        pieces: list[bytes] = []
        stream(source, lambda piece: pieces.append(bytes(piece)))
        source.close()
        assert b"".join(pieces) == data
        assert len(proxy.gets) == 2 and proxy.gets[1].headers["range"] == "bytes=1500000-"


def test_a_reader_that_has_had_enough_is_not_the_networks_fault(s3: S3) -> None:
    s3.put("file", bytes(3 << 20))
    with s3.proxy() as proxy:
        source = open_source(f"{s3.url}/file", s3.through(proxy).options)

        def full(piece: memoryview) -> None:
            raise BrokenPipeError

        with pytest.raises(BrokenPipeError):
            stream(source, full)
        source.close()
        assert len(proxy.gets) == 1


def test_progress_adds_up(s3: S3, tmp_path: Path) -> None:
    for index in range(20):
        s3.put(f"set/{index}", os.urandom(1000))
    seen: list[Progress] = []
    fetch(f"{s3.url}/set", s3.options, tmp_path / "out", progress=seen.append)
    assert seen[-1] == Progress(f"{s3.url}/set", 20_000, 20_000, 20, 20)
    assert all(before.done_bytes <= after.done_bytes for before, after in pairwise(seen))


def test_several_processes_fetch_thousands_of_small_objects(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {f"{index % 20}/{index}": os.urandom(index % 50) for index in range(300)}
    for key, value in expected.items():
        s3.put(f"set/{key}", value)
    monkeypatch.setattr(limits, "cores", lambda: 3)
    monkeypatch.setattr(crew, "_OBJECTS_A_PROCESS", 100)
    with s3.proxy() as proxy:
        source = open_source(f"{s3.url}/set", s3.through(proxy).options)
        seen: list[Progress] = []
        with Cache().stage(source, progress=seen.append) as snapshot:
            assert tree(Path(snapshot.path)) == expected
        assert len(set(proxy.keys)) == len(proxy.keys) == 300 - 6  # nothing is asked for what is empty
        assert snapshot.fetched_bytes == sum(map(len, expected.values()))
        assert seen and seen[-1].total_objects == 300
        # And an error of one of them is everybody's.
        for key in expected:
            s3.put(f"set/{key}", b"new" + expected[key])
        proxy.rule = lambda request: Fault(status=403, body=xml("AccessDenied")) if request.is_get else None
        with pytest.raises(DataAccessDenied, match="denies read access"):
            Cache().stage(source)
        source.close()


def test_options_and_environment(tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text("[profile lab]\nregion = eu-west-3\nendpoint_url = http://lab:9000\n")
    env = {"AWS_CONFIG_FILE": str(config), "AWS_PROFILE": "lab"}
    settings = s3_settings({}, env)
    assert (settings.endpoint, settings.region, settings.path_style) == ("http://lab:9000", "eu-west-3", True)
    settings = s3_settings({"client_kwargs": {"region_name": "x", "endpoint_url": "http://o/"}, "anon": True}, env)
    assert (settings.endpoint, settings.region, settings.keys) == ("http://o", "x", None)
    assert s3_settings({"requester_pays": True, "key": "k", "secret": "s"}, {}).requester_pays
    given = s3_settings({}, {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_SESSION_TOKEN": "t"})
    assert given.keys is not None and given.keys().token == "t" and not given.path_style
    assert "secret" not in repr(given) + repr(given.keys())
    with pytest.raises(ConfigError, match="without its secret"):
        s3_settings({"key": "k"}, {})


def test_a_profile_of_the_tasks_own_environment(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.put("set/a", b"a")
    (tmp_path / "credentials").write_text(f"[lab]\naws_access_key_id = {s3.key}\naws_secret_access_key = {s3.secret}\n")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of-the-process")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of-the-process")
    env = {
        "AWS_PROFILE": "lab",
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
        "AWS_ENDPOINT_URL": s3.endpoint,
    }
    source = open_source(f"{s3.url}/set", None, env)
    assert len(source.listing().objects) == 1
    source.close()
    source = open_source(f"{s3.url}/set", None, {"AWS_ENDPOINT_URL": s3.endpoint})
    with pytest.raises(DataAccessDenied):
        source.listing()
    source.close()
    source = open_source(f"{s3.url}/set", {"profile": "nobody"}, env)
    with pytest.raises(DataAccessDenied, match="no AWS profile 'nobody'"):
        source.listing()
    source.close()


def test_half_an_identity_is_not_completed_from_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of-the-process")
    merged = environment({"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"})
    assert "AWS_SESSION_TOKEN" not in merged and merged["PATH"] == os.environ["PATH"]


def test_fsspec_s_own_configuration_counts(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.put("set/a", b"a")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FSSPEC_S3", json.dumps(s3.options))
    source = open_source(f"{s3.url}/set")
    assert len(source.listing().objects) == 1
    source.close()


# -- HTTP --------------------------------------------------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    content = b""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path, data = self.path, self.content
        if path.startswith("/redirect"):
            self.answer(302, b"moved", location="/file.bin?signed=yes")
        elif path.startswith("/circle"):
            self.answer(302, b"", location="/circle")
        elif path.startswith("/private") and self.headers.get("Authorization") != "Bearer token":
            self.answer(401, b"who are you?")
        elif path.startswith("/chunked"):
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for start in range(0, len(data), 70_000):
                piece = data[start : start + 70_000]
                self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            self.wfile.write(b"0\r\n\r\n")
        elif path.startswith("/until-close"):
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(data)
            self.close_connection = True
        elif path.startswith("/plain"):
            self.answer(200, data)
        elif path.startswith("/empty"):
            self.answer(416, b"", content_range="bytes */0") if "Range" in self.headers else self.answer(200, b"")
        elif path.startswith(("/file.bin", "/private", "/a%20b")):
            first, last = 0, len(data) - 1
            if span := self.headers.get("Range"):
                begin, _, end = span.removeprefix("bytes=").partition("-")
                first, last = int(begin), min(last, int(end or last))
                self.answer(206, data[first : last + 1], content_range=f"bytes {first}-{last}/{len(data)}", etag='"v1"')
            else:
                self.answer(200, data, etag='"v1"')
        else:
            self.answer(404, b"no")

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def web() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    Handler.content = os.urandom(WHOLE_BYTES + 12345)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("path", ["file.bin", "redirect/file.bin", "chunked", "until-close", "plain", "a%20b"])
def test_http_files(web: str, path: str, tmp_path: Path) -> None:
    source = open_source(f"{web}/{path}")
    with Cache().stage(source) as snapshot:
        assert Path(snapshot.path).read_bytes() == Handler.content
        assert os.path.basename(snapshot.path) == path.rpartition("/")[2].replace("%20", " ")
    source.close()


@pytest.mark.parametrize("path", ["file.bin", "chunked", "until-close", "plain"])
@pytest.mark.parametrize("every", [1, 3])
def test_a_sink_may_keep_what_it_gets(web: str, path: str, every: int) -> None:
    pool = Pool(Endpoint("http", "127.0.0.1", int(web.rpartition(":")[2])))
    for _ in range(2):  # the second time on a connection that is kept
        pieces: list[memoryview | bytes] = []

        def sink(piece: memoryview) -> memoryview | None:
            if len(pieces) % every:  # noqa: B023
                pieces.append(bytes(piece))  # noqa: B023
                return None
            pieces.append(piece)  # noqa: B023
            return memoryview(bytearray(BUFFER_BYTES))

        length = pool.request("GET", f"GET /{path} HTTP/1.1\r\nHost: here\r\n\r\n".encode()).pour(sink)
        assert length == len(Handler.content) and b"".join(pieces) == Handler.content
    pool.close()


def test_several_requests_are_under_way_before_an_answer_is_taken(web: str) -> None:
    pool = Pool(Endpoint("http", "127.0.0.1", int(web.rpartition(":")[2])))
    for _ in range(2):  # the second time on connections that are kept
        asked = [
            pool.ask("GET", f"GET /{path} HTTP/1.1\r\nHost: here\r\n\r\n".encode())
            for path in ("plain", "nothing", "chunked", "until-close", "plain")
        ]
        asked[0].drop()
        answers = [request.answer() for request in asked[1:]]
        assert [answer.status for answer in answers] == [404, 200, 200, 200]
        assert [answer.read() == Handler.content for answer in answers] == [False, True, True, True]
    pool.close()


def test_a_connection_that_the_server_has_closed_is_replaced() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        accepted = []

        def serve() -> None:
            for _ in range(3):
                connection, _ = server.accept()
                with connection:
                    accepted.append(connection.recv(1000))
                    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

        thread = threading.Thread(target=serve)
        thread.start()
        pool = Pool(Endpoint("http", "127.0.0.1", server.getsockname()[1]))
        for number in range(3):
            if number == 2:
                pool.interrupt()  # not even the request can be sent now
            assert pool.request("GET", b"GET / HTTP/1.1\r\nhost: here\r\n\r\n").read() == b"ok"
        thread.join()
        assert len(accepted) == 3
        pool.close()


@given(st.binary(max_size=64), st.binary(max_size=300))
def test_signatures_are_hmac_sha256(key: bytes, text: bytes) -> None:
    assert Signer(key).digest(text) == hmac.digest(key, text, "sha256")


def test_http_errors(web: str) -> None:
    for path, kind, message in (
        ("nothing", DataNotFound, "nothing at"),
        ("private", DataAccessDenied, "denies access"),
        ("circle", DataError, "circle"),
    ):
        source = open_source(f"{web}/{path}")
        with pytest.raises(kind, match=message):
            source.listing()
        source.close()
    source = open_source(f"{web}/private", {"headers": {"Authorization": "Bearer token"}})
    assert source.stat().size == len(Handler.content)
    source.close()
    source = open_source(f"{web}/empty")
    with Cache().stage(source) as snapshot:
        assert Path(snapshot.path).read_bytes() == b""
    source.close()


# -- anything else -----------------------------------------------------------------------------------------------------


def test_other_filesystems_are_sources_too(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    name = f"/source-{os.urandom(4).hex()}"
    expected = {"a": b"a", "sub/b": os.urandom(WHOLE_BYTES + 5), "empty": b""}
    for key, value in expected.items():
        memory.pipe_file(f"{name}/{key}", value)
    source = open_source(f"memory:/{name}")
    with Cache().stage(source) as snapshot:
        assert tree(Path(snapshot.path)) == expected
    memory.pipe_file(f"{name}/a", b"new")
    with Cache().stage(source) as second:
        assert second.fetched_bytes == 3 and (Path(second.path) / "a").read_bytes() == b"new"
    with Cache().stage(open_source(f"memory:/{name}/sub/b")) as single:
        assert Path(single.path).read_bytes() == expected["sub/b"]
    with pytest.raises(DataNotFound):
        open_source(f"memory:/{name}/nothing").listing()
    memory.rm(name, recursive=True)


def test_archives_are_told_apart(tmp_path: Path) -> None:
    import zipfile

    def archive(name: str, content: str) -> str:
        with zipfile.ZipFile(tmp_path / name, "w") as packed:
            packed.writestr("top.txt", content)
            packed.writestr("sub/a.txt", content)
        return str(tmp_path / name)

    def staged(url: str) -> tuple[dict[str, bytes], int]:
        with Cache().stage(open_source(url)) as snapshot:
            path = Path(snapshot.path)
            return {path.name: path.read_bytes()} if snapshot.single else tree(path), snapshot.fetched_bytes

    one, two = archive("1.zip", "abc"), archive("2.zip", "xyz")
    assert staged(f"zip://::{one}") == ({"top.txt": b"abc", "sub/a.txt": b"abc"}, 6)
    assert staged(f"zip://::{one}")[1] == 0
    assert staged(f"zip://sub::{two}") == ({"a.txt": b"xyz"}, 3)
    assert staged(f"zip://top.txt::{two}") == ({"top.txt": b"xyz"}, 3)
    archive("1.zip", "new")
    assert staged(f"zip://sub::{one}") == ({"a.txt": b"new"}, 3)


def test_what_has_neither_version_nor_time_is_not_taken_for_the_same(web: str) -> None:
    source = open_source(f"{web}/plain")
    for content in (b"old", b"new"):
        Handler.content = content
        with Cache().stage(source) as snapshot:
            assert Path(snapshot.path).read_bytes() == content
    source.close()


def test_s3_by_way_of_fsspec_where_there_is_a_proxy(s3: S3) -> None:
    """Proxies are left to s3fs: the same data, credentials and errors."""
    expected = {"a": b"a", "sub/b": os.urandom(WHOLE_BYTES + 5), "empty": b""}
    for key, value in expected.items():
        s3.put(f"set/{key}", value)
    # A proxy for another scheme than the server's: what decides is tested, and the way stays open.
    env = {**s3.env, "HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}
    direct = open_source(f"{s3.url}/set", None, env)
    assert isinstance(direct, S3Source)
    direct.close()
    assert not isinstance(open_source(f"{s3.url}/set", None, env | {"NO_PROXY": ""}), S3Source)
    source = FsspecSource(f"{s3.url}/set", {}, s3.env)
    with Cache().stage(source) as snapshot:
        assert tree(Path(snapshot.path)) == expected
    s3.put("set/a", b"new")
    with Cache().stage(source) as snapshot:
        assert snapshot.fetched_bytes == 3 and (Path(snapshot.path) / "a").read_bytes() == b"new"
    with pytest.raises(DataNotFound):
        FsspecSource(f"{s3.url}/nothing", {}, s3.env).listing()
    with pytest.raises(DataAccessDenied):
        FsspecSource(f"{s3.url}/set", {"secret": "wrong"}, s3.env).listing()


@pytest.mark.parametrize(
    ("url", "message", "hint"),
    [
        ("quux://host/path", "knows no quux://", "install the package"),
        ("htp://user:secret@host/path", "knows no htp://", "did you mean http://"),
        ("gs://bucket/path", "needs a package", "pip install gcsfs"),
        ("hf://datasets/x/y", "needs a package", "pip install huggingface_hub"),
        ("s3://", "names no bucket", "s3://bucket"),
        ("http:///path", "names no server", "http://server"),
        ("s3:/bucket/path", "neither a URL nor a path", "s3://bucket/path"),
        ("http://127.0.0.1:9/x", "Connection refused", "URL right"),
        ("", "is empty", "unset"),
    ],
)
def test_what_can_be_no_source_says_so(url: str, message: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOW_DATA_PATIENCE", "0.2")
    with pytest.raises(FlowError, match=message) as caught:
        open_source(url).listing()
    assert hint in (caught.value.hint or "") and "secret" not in str(caught.value)


# -- command line ------------------------------------------------------------------------------------------------------


@pytest.fixture
def configured(s3: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    return s3


def output(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    assert main(list(arguments)) == code
    text = capsys.readouterr().out
    return json.loads(text) if "--json" in arguments else text


def test_the_cache_verb(configured: S3, capsys: pytest.CaptureFixture[str]) -> None:
    s3 = configured
    s3.put("set/a", b"abc")
    s3.put("set/b", b"defg")
    url = f"{s3.url}/set"
    assert "2 objects, 7 B, of which 7 B were fetched now" in output(capsys, "cache", "prefetch", url)
    (prefetched,) = output(capsys, "cache", "prefetch", url, "--json")
    assert prefetched["fetched_bytes"] == 0 and prefetched["url"] == url
    (held,) = output(capsys, "cache", "ls", "--json")
    assert held["url"] == url and held["size_bytes"] == 7 and not held["in_use"]
    assert url in output(capsys, "cache", "ls")
    assert output(capsys, "cache", "du", "--json")["used_bytes"] == 7
    assert "FLOW_CACHE_LIMIT" in output(capsys, "cache", "du")
    assert output(capsys, "cache", "verify", "--json") == {"problems": [], "dropped": 0}
    damaged = Path(prefetched["path"]) / "a"
    os.chmod(damaged, 0o600)
    damaged.write_bytes(b"xyz")
    assert "a: was written to after it was staged" in output(capsys, "cache", "verify", code=1)
    assert output(capsys, "cache", "verify", "--drop", "--json")["dropped"] == 1
    assert output(capsys, "cache", "prefetch", url, "--json")[0]["fetched_bytes"] == 7
    assert output(capsys, "cache", "prune", "--json") == {"freed_bytes": 7, "used_bytes": 0}
    assert output(capsys, "cache", "ls", "--json") == []


def test_the_data_verb(configured: S3, capsysbinary: Any, tmp_path: Path) -> None:
    s3 = configured
    s3.put("set/a.txt", b"abc")
    s3.put("set/sub/b", b"defg")

    def run(*arguments: str, code: int = 0) -> Any:
        assert main(["data", *arguments]) == code
        text = capsysbinary.readouterr().out
        return json.loads(text) if "--json" in arguments else text

    assert [entry["name"] for entry in run("ls", f"{s3.url}/set", "--json")] == ["a.txt", "sub/"]
    assert [entry["name"] for entry in run("ls", f"{s3.url}", "--json")] == ["set/"]
    assert [entry["name"] for entry in run("ls", "-r", f"{s3.url}/set/", "--json")] == ["a.txt", "sub/b"]
    assert [entry["name"] for entry in run("ls", f"{s3.url}/set/a.txt", "--json")] == ["a.txt"]
    assert b"a.txt" in run("ls", f"{s3.url}/set")
    assert run("stat", f"{s3.url}/set", "--json")["objects"] == 2
    assert run("stat", f"{s3.url}/set/a.txt", "--json")["size"] == 3
    assert run("cat", f"{s3.url}/set/a.txt") == b"abc"
    run("cp", f"{s3.url}/set", str(tmp_path / "copy"))
    assert tree(tmp_path / "copy") == {"a.txt": b"abc", "sub/b": b"defg"}
    run("cp", str(tmp_path / "copy"), f"{s3.url}/back")
    run("cp", f"{s3.url}/set/a.txt", f"{s3.url}/elsewhere/")
    assert tree(s3.root / "back") == tree(s3.root / "set")
    assert (s3.root / "elsewhere/a.txt").read_bytes() == b"abc"
    (tmp_path / "z.gz").write_bytes(gzip.compress(b"z"))
    assert run("cp", str(tmp_path / "z.gz"), f"{s3.url}/z.gz", "--json")["size_bytes"] > 0
    assert gzip.decompress(run("cat", f"{s3.url}/z.gz")) == b"z"
    for arguments in (("ls", f"{s3.url}/nothing"), ("cat", f"{s3.url}/nothing"), ("stat", f"{s3.url}/nothing")):
        run(*arguments, code=3)
    run("cp", "a", "b", code=2)


def test_copies_between_all_kinds_of_places(
    configured: S3, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3, here = configured, tmp_path / "here"
    s3.put("set/a.txt", b"abc")
    s3.put("set/sub/b", b"defg")
    whole = {"a.txt": b"abc", "sub/b": b"defg"}

    def cp(source: object, target: object, code: int = 0) -> str:
        assert main(["data", "cp", str(source), str(target)]) == code
        return capsys.readouterr().err

    cp(f"{s3.url}/set", here)
    cp(f"{s3.url}/set/a.txt", f"{tmp_path}/new/")
    cp(f"{s3.url}/set/a.txt", f"file://{tmp_path}/new/c.txt")
    assert tree(tmp_path / "new") == {"a.txt": b"abc", "c.txt": b"abc"}
    os.chmod(here / "sub/b", 0o755)
    cp(here, "volume://vol/all")
    cp(here / "a.txt", "volume://vol")
    cp(f"{s3.url}/set", "volume://vol/more")
    cp(f"{s3.url}/set/a.txt", "volume://vol/one/")
    cp("volume://vol", f"{s3.url}/back")
    expected = {f"{place}/{name}": content for place in ("all", "more") for name, content in whole.items()}
    assert tree(s3.root / "back") == expected | {"a.txt": b"abc", "one/a.txt": b"abc"}
    cp("volume://vol", tmp_path / "out")
    assert tree(tmp_path / "out") == tree(s3.root / "back")
    cp("volume://vol/all", f"file://{tmp_path}/filed")
    assert os.stat(tmp_path / "filed/sub/b").st_mode & 0o700 == 0o700 and tree(tmp_path / "filed") == whole
    # What came by way of the cache can be written to, and replaced.
    cp("volume://vol/all/sub/b", "volume://vol/more/a.txt")
    cp("volume://vol/more/a.txt", tmp_path / "out/a.txt")
    assert (tmp_path / "out/a.txt").read_bytes() == b"defg"

    assert "is a file" in cp(f"{s3.url}/set", here / "a.txt", code=1)
    assert "Not a directory" in cp(f"{s3.url}/set/a.txt", here / "a.txt/x", code=1)
    assert f"mkdir -p {tmp_path}/no" in cp(f"{s3.url}/set/a.txt", tmp_path / "no/x", code=1)
    (tmp_path / "empty").mkdir()
    assert "no files" in cp(tmp_path / "empty", f"{s3.url}/empty", code=1)
    # Nothing is left but what was asked for, where the system has no nameless files neither.
    monkeypatch.setattr("flowfn_runtime.data.newfile.nameless", lambda folder, mode: None)
    cp(f"{s3.url}/set", here)
    cp(f"{s3.url}/set/a.txt", "volume://vol/one/")
    assert tree(here) == whole and not list(tmp_path.rglob(".flow-*"))
