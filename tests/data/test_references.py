from __future__ import annotations

import copy
import dataclasses
import gc
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest

from flowfn_runtime import pickling
from flowfn_runtime.data import store
from flowfn_runtime.data.output import Output
from flowfn_runtime.data.reference import Reference
from flowfn_runtime.data.references import Dir, File, StagedPath, staged_path
from flowfn_runtime.errors import DataChanged, DataError, DataNotFound, DataUnavailable, ValidationError


def at(bucket: Path, key: str = "") -> str:
    return f"s3://{bucket.name}/{key}"


def send(value: Any) -> tuple[Any, list[Reference]]:
    """To a worker and out of the pickle there."""
    payload = pickling.dumps(value)
    return pickling.loads(bytes(payload.data), payload.buffers)


def streamed(ref: File) -> Any:
    with ref.open() as stream:
        return stream.read()


# -- what references are


def test_a_local_file_is_its_own_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "data.csv"
    file.write_text("a,b\n1,2\n")
    monkeypatch.chdir(tmp_path)
    for spelled in ("data.csv", "./data.csv", str(file), file, f"file://{file}"):
        ref = File(spelled)
        assert ref.url == ref.path == os.fspath(ref) == str(file)
        assert isinstance(ref, os.PathLike)
        with open(ref) as opened:
            assert opened.read() == Path(ref).read_text() == "a,b\n1,2\n"
    assert ref.name == "data.csv"
    np.save("array.npy", np.arange(3))
    assert list(np.load(File("array.npy"))) == list(np.load(File("array.npy"), mmap_mode="r")) == [0, 1, 2]


def test_identity(tmp_path: Path) -> None:
    assert File("s3://b/k") == File("s3://b/k") == File(File("s3://b/k"))
    assert hash(File("s3://b/k")) == hash(File("s3://b/k"))
    assert File("s3://b/k") != File("s3://b/other") != Dir("s3://b/k")
    assert File("s3://b/k", storage_options={"anon": True}) != File("s3://b/k")
    ref = File("s3://b/k")
    assert copy.copy(ref) is copy.deepcopy(ref) is ref


def test_secrets_are_not_shown() -> None:
    shown = repr(File("https://user:pw@host/x?sig=abc", storage_options={"key": "AKIA", "secret": "s3cr3t"}))
    assert not any(secret in shown for secret in ("pw", "abc", "AKIA", "s3cr3t"))
    assert repr(File("s3://b/k")) == "File('s3://b/k')"


@pytest.mark.parametrize("bad", ["", "a\0b", 3, None, b"bytes"])
def test_what_is_no_url_is_refused(bad: Any) -> None:
    with pytest.raises((ValidationError, TypeError)):
        File(bad)


def test_found_at_any_depth_and_noted_on_both_sides(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x")

    @dataclasses.dataclass
    class Config:
        inputs: dict[str, list[File]]

    class Model(pydantic.BaseModel):
        weights: File
        out: Output

    model = Model(weights="/w", out="s3://b/o")  # type: ignore[arg-type]
    value = [Config({"a": [File(tmp_path / "x")]}), (model,), {"d": Dir(tmp_path)}]
    payload = pickling.dumps(value)
    expected = {File(tmp_path / "x"), File("/w"), Output("s3://b/o"), Dir(tmp_path)}
    assert set(payload.references) == expected
    rebuilt, noted = pickling.loads(bytes(payload.data), payload.buffers)
    assert set(noted) == expected
    assert rebuilt[1][0].weights == File("/w")
    assert json.loads(model.model_dump_json()) == {"weights": "/w", "out": "s3://b/o"}


def test_libraries_take_a_reference_for_a_path(bucket: Path, tmp_path: Path) -> None:
    np.save(bucket / "a.npy", np.arange(5))
    assert np.load(File(at(bucket, "a.npy"))).tolist() == [0, 1, 2, 3, 4]


# -- staging and pins


def test_staged_once_by_name_and_content(bucket: Path) -> None:
    (bucket / "dir").mkdir()
    (bucket / "dir" / "data.csv.gz").write_bytes(b"1,2")
    ref, again = File(at(bucket, "dir/data.csv.gz")), File(at(bucket, "dir/data.csv.gz"))
    assert os.path.basename(ref.path) == "data.csv.gz"
    assert Path(ref).read_bytes() == b"1,2"
    assert again.path == ref.path
    (bucket / "dir" / "data.csv.gz").write_bytes(b"new!")
    assert File(at(bucket, "dir/data.csv.gz")).path != ref.path
    assert Path(ref).read_bytes() == b"1,2"  # what it had before


def test_what_the_client_saw_is_what_the_worker_gets(bucket: Path) -> None:
    (bucket / "x").write_bytes(b"one")
    rebuilt, (noted,) = send(File(at(bucket, "x")))
    noted.prepare()
    assert rebuilt is noted
    assert Path(rebuilt).read_bytes() == b"one"
    noted.finish(True)

    payload = pickling.dumps(File(at(bucket, "x")))
    (bucket / "x").write_bytes(b"other")
    _, (late,) = pickling.loads(bytes(payload.data), payload.buffers)
    with pytest.raises(DataChanged, match=r"size in bytes was 3, and is 5"):
        late.prepare()
    with pytest.raises(DataChanged):
        late.open()
    with pytest.raises(DataChanged):
        late.info()
    assert late.exists()


def test_a_changed_local_file_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"one")
    payload = pickling.dumps(File(file))
    file.write_bytes(b"two")
    _, (late,) = pickling.loads(bytes(payload.data), payload.buffers)
    with pytest.raises(DataChanged, match="x is not what it was"):
        late.prepare()


def test_missing_objects_are_missed_where_they_are_read(bucket: Path) -> None:
    rebuilt, _ = send(File(at(bucket, "none")))
    assert not rebuilt.exists()
    for use in (rebuilt.prepare, rebuilt.open, rebuilt.info):
        with pytest.raises(DataNotFound, match="none"):
            use()
    with pytest.raises(FileNotFoundError):
        open(rebuilt)


def test_a_file_of_another_host_says_how_to_send_it(tmp_path: Path) -> None:
    rebuilt, _ = send(File(tmp_path / "only-there"))
    with pytest.raises(DataNotFound, match=r"flow\.upload"):
        rebuilt.prepare()


def test_what_was_staged_ahead_is_let_go(bucket: Path) -> None:
    (bucket / "x").write_bytes(b"x")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        _, (ahead,) = send(File(at(bucket, "x")))
        ahead.prepare()
    del ahead
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + 3  # a connection or two


def test_a_server_that_is_down_does_not_hold_up_every_pickle(monkeypatch: pytest.MonkeyPatch, bucket: Path) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("FLOW_DATA_PATIENCE", "0.1")
    refs = [File(f"s3://unreachable/{n}") for n in range(1000)]
    rebuilt, noted = send(refs)
    assert rebuilt == refs and len(noted) == 1000
    with pytest.raises(DataUnavailable):
        rebuilt[0].prepare()


def test_a_directory_is_staged_and_pinned_whole(bucket: Path) -> None:
    for name, data in {"a/1": b"1", "a/deep/2": b"22", "ab": b"no"}.items():
        (bucket / name).parent.mkdir(parents=True, exist_ok=True)
        (bucket / name).write_bytes(data)
    rebuilt, (noted,) = send(Dir(at(bucket, "a")))
    noted.prepare()
    assert sorted(p.relative_to(rebuilt.path).as_posix() for p in Path(rebuilt).rglob("*") if p.is_file()) == [
        "1",
        "deep/2",
    ]
    assert streamed(rebuilt / "deep/2") == b"22"
    info = rebuilt.info()
    assert (info.count, info.size_bytes, info.is_dir) == (2, 3, True)
    (bucket / "a" / "3").write_bytes(b"3")
    _, (noted,) = send(Dir(at(bucket, "a")))
    (bucket / "a" / "4").write_bytes(b"4")
    with pytest.raises(DataChanged, match="number of objects was 3, and is 4"):
        noted.prepare()
    with pytest.raises(DataNotFound):
        Dir(at(bucket, "none")).prepare()


def test_a_file_is_no_directory_and_the_other_way_round(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x")
    with pytest.raises(DataError, match=r"flow\.Dir"):
        File(tmp_path).prepare()
    with pytest.raises(DataError, match=r"flow\.File"):
        Dir(tmp_path / "x").prepare()


def test_streams(bucket: Path) -> None:
    data = os.urandom(3_000_000)
    (bucket / "x").write_bytes(data)
    ref = File(at(bucket, "x"))
    with ref.open() as stream:
        assert stream.read(10) == data[:10]
        stream.seek(-5, 2)
        assert stream.read() == data[-5:]
        stream.seek(1_000_000)
        assert stream.read(100_000) == data[1_000_000:1_100_000]
        assert stream.tell() == 1_100_000
        stream.seek(0)
        assert stream.read() == data
    assert not os.path.exists(os.environ["FLOW_CACHE"])  # nothing was staged
    with ref.open("wb") as stream:
        stream.write(b"line 1\nline 2\n")
    assert (bucket / "x").read_bytes() == b"line 1\nline 2\n"
    with ref.open("rt") as text:
        assert list(text) == ["line 1\n", "line 2\n"]
    with File(at(bucket, "y.gz")).open("wb", compression="infer") as stream:
        stream.write(b"packed")
    with File(at(bucket, "y.gz")).open("rt", compression="gzip") as text:
        assert text.read() == "packed"


def test_a_stream_reads_one_version(bucket: Path) -> None:
    (bucket / "x").write_bytes(b"1" * 2_000_000)
    with File(at(bucket, "x")).open() as stream:
        assert stream.read(10) == b"1" * 10
        (bucket / "x").write_bytes(b"2" * 2_000_001)
        with pytest.raises(DataChanged):
            stream.read()


# -- outputs


def call(ref: Reference, function: Any, *, ok: bool = True) -> None:
    """What a worker does around a call."""
    ref.prepare()
    try:
        function(ref)
    finally:
        ref.finish(ok)


def test_an_output_is_published_only_if_the_call_succeeds(bucket: Path, tmp_path: Path) -> None:
    for url, where in (
        (at(bucket, "out/x.bin"), bucket / "out" / "x.bin"),
        (str(tmp_path / "o" / "x"), tmp_path / "o/x"),
    ):
        out, (noted,) = send(Output(url))
        assert noted is out
        call(out, lambda ref: Path(ref).write_bytes(b"bad"), ok=False)
        assert not where.exists()
        out.prepare()
        path = out.path
        Path(path).write_bytes(b"good")
        out.finish(True)
        assert where.read_bytes() == b"good"
        assert not os.path.exists(path)
        assert os.path.basename(path) == os.path.basename(url)
    assert not any(name for name in os.listdir(Path(os.environ["FLOW_CACHE"], "outputs")))


def test_an_output_can_be_a_directory(bucket: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "old").write_bytes(b"stays")

    def write(ref: Any) -> None:
        os.makedirs(os.path.join(ref, "deep"))
        Path(ref, "deep", "1").write_bytes(b"1")
        Path(ref, "2").write_bytes(b"2")

    targets = [(at(bucket, "tree/"), bucket / "tree"), (str(tmp_path / "new"), tmp_path / "new")]
    for url, where in [*targets, (str(tmp_path / "there"), tmp_path / "there")]:
        call(Output(url), write)
        assert (where / "deep" / "1").read_bytes() == b"1"
        assert (where / "2").read_bytes() == b"2"
    assert (tmp_path / "there" / "old").read_bytes() == b"stays"


def test_an_output_that_fails_half_way_takes_back_what_is_new(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOW_DATA_PATIENCE", "0.2")
    (bucket / "t").mkdir()
    (bucket / "t" / "a").write_bytes(b"old")
    (bucket / "t" / "z").mkdir()  # a key that can't become an object: rclone's bucket is a directory tree
    (bucket / "t" / "z" / "inner").write_bytes(b"")

    def write(ref: Any) -> None:
        os.mkdir(ref)
        for name in ("a", "b", "c", "z"):
            Path(ref, name).write_bytes(b"new")

    with pytest.raises(DataError):
        call(Output(at(bucket, "t")), write)
    assert sorted(os.listdir(bucket / "t")) == ["a", "z"]


def test_an_output_nothing_was_written_to_is_an_error_that_names_what_is_beside(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"but beside it: x\.npy"):
        call(Output(tmp_path / "x"), lambda ref: np.save(ref, np.arange(3)))
    call(Output(tmp_path / "y"), lambda ref: None)  # never looked at: no harm
    assert os.listdir(tmp_path) == ["flow-cache"]


def test_an_output_has_a_path_only_in_a_call_or_a_with_block(tmp_path: Path) -> None:
    out = Output(tmp_path / "x")
    with pytest.raises(DataError, match=r"with flow\.Output"):
        out.path  # noqa: B018
    with out as path:
        Path(path).write_bytes(b"1")
    assert (tmp_path / "x").read_bytes() == b"1"
    with pytest.raises(ZeroDivisionError), out as path:
        Path(path).write_bytes(b"2")
        1 / 0  # noqa: B018
    assert (tmp_path / "x").read_bytes() == b"1"
    assert streamed(File(out)) == b"1"


def test_a_killed_writer_publishes_nothing_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    code = """
import os, sys
from flowfn_runtime.data.output import Output
out = Output(sys.argv[1])
out.prepare()
with open(out, "wb") as file:
    file.write(bytes(1000))
    file.flush()
    print(out.path, flush=True)
    os.kill(os.getpid(), 9)
"""
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], stdout=subprocess.PIPE, text=True)
    assert killed.returncode == -signal.SIGKILL
    left = killed.stdout.strip()
    assert os.path.getsize(left) == 1000 and not (tmp_path / "x").exists()
    with Output(tmp_path / "other") as path:
        living = os.path.dirname(path)
        with Output(tmp_path / "third") as third:  # which leaves the living one alone
            Path(third).write_bytes(b"3")
        Path(path).write_bytes(b"1")
        assert not os.path.exists(os.path.dirname(left))
        assert os.path.isdir(living)
    assert os.listdir(Path(os.environ["FLOW_CACHE"], "outputs")) == []


# -- the store


def test_the_same_bytes_are_stored_once_and_keep_their_name(tmp_path: Path, flow_home: Path) -> None:
    (tmp_path / "data.csv").write_bytes(b"1,2")
    (tmp_path / "copy.txt").write_bytes(b"1,2")
    one, two = store.upload(tmp_path / "data.csv"), store.upload(tmp_path / "copy.txt")
    assert one.url == two.url
    kept = os.stat(one.url)
    assert store.upload(tmp_path / "data.csv").url == one.url
    assert (os.stat(one.url).st_ino, os.stat(one.url).st_mtime_ns) == (kept.st_ino, kept.st_mtime_ns)
    (tmp_path / "data.csv").unlink()
    for ref, name in ((one, "data.csv"), (two, "copy.txt")):
        rebuilt, (noted,) = send(ref)
        noted.prepare()
        assert rebuilt.name == os.path.basename(rebuilt.path) == name
        assert Path(rebuilt).read_bytes() == b"1,2"
        assert streamed(rebuilt) == b"1,2"


def tree_of(root: Any) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in Path(root).rglob("*") if path.is_file()}


class Kept:
    """What the store holds of directories: in the home, or in a bucket."""

    def __init__(self, home: Path, exact_s3: Any = None) -> None:
        self.home, self.s3 = home, exact_s3

    def state(self) -> dict[str, Any]:
        if self.s3 is None:
            return {str(path): path.stat().st_mtime_ns for path in self.home.rglob("trees/*/*/**/*") if path.is_file()}
        listed = self.s3.client.list_objects_v2(Bucket=self.s3.bucket, Prefix="store/trees/").get("Contents", [])
        return {item["Key"]: item["LastModified"] for item in listed}

    def write(self, name: str, content: bytes | None) -> None:
        (key,) = [key for key in self.state() if key.endswith(name)]
        if self.s3 is not None:
            self.s3.put(key, content) if content is not None else self.s3.client.delete_object(
                Bucket=self.s3.bucket, Key=key
            )
            return
        Path(key).unlink()
        if content is not None:
            Path(key).write_bytes(content)


@pytest.fixture(params=["home", "bucket"])
def kept(request: Any, flow_home: Path, exact_s3: Any, monkeypatch: pytest.MonkeyPatch) -> Kept:
    if request.param == "home":
        return Kept(flow_home)
    monkeypatch.setenv("FLOW_STORE", f"{exact_s3.url}/store")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", exact_s3.options["endpoint_url"])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", exact_s3.options["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", exact_s3.options["secret"])
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    return Kept(flow_home, exact_s3)


def test_a_directory_is_stored_once_and_whole(kept: Kept, tmp_path: Path) -> None:
    for name, content in {"a": b"1", "deep/er/b c": os.urandom(100_000), "empty": b""}.items():
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(content)
    (tmp_path / "data" / "link").symlink_to("a")
    expected = tree_of(tmp_path / "data")
    one = store.upload(tmp_path / "data")
    assert isinstance(one, Dir)
    state = kept.state()
    assert len(state) == 5  # the files, and the manifest
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    assert store.upload(tmp_path / "copy") == one and kept.state() == state
    rebuilt, (noted,) = send(one)
    shutil.rmtree(tmp_path / "data")
    noted.prepare()
    assert tree_of(rebuilt) == expected
    (tmp_path / "copy" / "a").write_bytes(b"2")
    assert store.upload(tmp_path / "copy") != one


def test_a_directory_that_was_damaged_in_the_store_is_not_loaded(kept: Kept, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a").write_bytes(b"1")
    one = store.upload(tmp_path / "data")
    kept.write("/data/a", b"2")
    one._pin = None  # as from another host, after the damage
    with pytest.raises(DataChanged, match="damaged"):
        _ = send(one)[0].path


def test_an_upload_of_a_directory_that_broke_off_is_done_again(kept: Kept, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a").write_bytes(b"1")
    (tmp_path / "data" / "b").write_bytes(b"2")
    one = store.upload(tmp_path / "data")
    names = set(kept.state())
    kept.write("/manifest", None)
    kept.write("/data/b", None)
    assert store.upload(tmp_path / "data") == one
    assert set(kept.state()) == names and tree_of(send(one)[0]) == {"a": b"1", "b": b"2"}


def test_a_directory_without_files_is_not_stored(tmp_path: Path) -> None:
    (tmp_path / "data" / "deep").mkdir(parents=True)
    with pytest.raises(DataError, match="no files"):
        store.upload(tmp_path / "data")
    os.mkfifo(tmp_path / "data" / "pipe")
    with pytest.raises(DataError, match="no file"):
        store.upload(tmp_path / "data")


def test_a_store_in_a_bucket_checks_what_it_loads(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOW_STORE", at(bucket, "store"))
    (tmp_path / "x").write_bytes(b"weights")
    ref = store.upload(tmp_path / "x")
    assert ref.url.startswith(at(bucket, "store/sha256/"))
    assert Path(ref).read_bytes() == b"weights"
    digest = store.put(b"payload")
    assert store.get(digest) == b"payload"
    stored = bucket / "store" / "sha256" / digest[:2] / digest
    stored.write_bytes(b"PAYLOAD")
    with pytest.raises(DataChanged, match="damaged"):
        store.get(digest)
    with pytest.raises(DataNotFound):
        store.get("0" * 64)
    with pytest.raises(DataError):
        store.get("../../etc/passwd")
    changed = Path(bucket, ref.url.partition("/store/")[2] and "store/" + ref.url.partition("/store/")[2])
    changed.write_bytes(b"Weights")
    with pytest.raises(DataChanged, match="damaged"):
        File._of(ref.url, None, digest=ref._digest).prepare()


def test_a_worker_elsewhere_returns_local_files_through_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "result.csv"
    file.write_bytes(b"1,2")
    monkeypatch.setenv("FLOW_UPLOAD_LOCAL", "1")
    payload = pickling.dumps({"result": File(file)})
    monkeypatch.delenv("FLOW_UPLOAD_LOCAL")
    file.unlink()
    value, _ = pickling.loads(bytes(payload.data), payload.buffers)
    assert streamed(value["result"]) == b"1,2"
    assert os.path.basename(value["result"].path) == "result.csv"


def test_what_came_as_an_argument_is_returned_as_it_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(b"x")
    argument, _ = send(File(tmp_path / "x"))
    monkeypatch.setenv("FLOW_UPLOAD_LOCAL", "1")
    result, _ = send(argument)
    assert result.url == str(tmp_path / "x")


# -- invoke's strings


def test_a_staged_path_is_a_string_that_knows_its_url(bucket: Path) -> None:
    (bucket / "in").mkdir()
    (bucket / "in" / "x.csv").write_bytes(b"1")
    for url, kind in ((at(bucket, "in/x.csv"), os.path.isfile), (at(bucket, "in"), os.path.isdir)):
        path = staged_path(url)
        assert isinstance(path, str) and type(path) is StagedPath
        assert path.url == url and kind(path)
        assert json.dumps(path) == json.dumps(str(path))
        again = pickle.loads(pickle.dumps(path))
        assert again == path and again.url == url
    with pytest.raises(DataNotFound):
        staged_path(at(bucket, "none"))


def test_an_output_on_another_disk_appears_whole(tmp_path: Path) -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second filesystem at /dev/shm")
    folder = shm / f"flowfn-test-{os.getpid()}"
    folder.mkdir()
    try:
        left = folder / ".flowfn-part-of-a-killed-process"
        left.write_bytes(b"half")
        with Output(folder / "x") as path:
            Path(path).write_bytes(b"whole")
            os.chmod(path, 0o640)
        assert [p.name for p in folder.iterdir()] == ["x"]
        assert (folder / "x").read_bytes() == b"whole" and (folder / "x").stat().st_mode & 0o777 == 0o640
        with Output(folder / "dir") as path:
            os.makedirs(f"{path}/deep")
            Path(path, "deep", "y").write_bytes(b"y")
            Path(path, "link").symlink_to("deep/y")
        assert (folder / "dir" / "link").read_bytes() == b"y"
    finally:
        shutil.rmtree(folder)


def test_markers_of_completeness_come_last(bucket: Path) -> None:
    from flowfn_runtime.data.publish import _files

    with Output(at(bucket, "table")) as path:
        os.mkdir(path)
        for name in ("_SUCCESS", "part-0", "_metadata", "zz"):
            Path(path, name).write_bytes(name.encode())
        assert _files(path) == ["part-0", "zz", "_SUCCESS", "_metadata"]
    assert sorted(os.listdir(bucket / "table")) == ["_SUCCESS", "_metadata", "part-0", "zz"]


def test_a_stream_of_unknown_size(tmp_path: Path) -> None:
    """A server that sends no length, and knows no ranges."""
    import http.server
    import threading

    body = os.urandom(400_000)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/data.bin"
            assert streamed(File(url)) == body
            assert Path(File(url)).read_bytes() == body
        finally:
            server.shutdown()
