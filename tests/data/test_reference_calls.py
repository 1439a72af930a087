"""References, outputs and volumes through real calls on the local backend."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from s3 import S3

import flowfn as flow
from flowfn_runtime import sandbox
from flowfn_runtime.data import volumes


@pytest.fixture(autouse=True)
def _fresh_workers(bucket: Path) -> Iterator[None]:
    """Workers of the test's own, with its home, cache and credentials."""
    flow.shutdown()
    yield
    flow.shutdown()


@pytest.fixture
def needs_sandbox() -> None:
    try:
        sandbox.check()
    except flow.SandboxError as error:
        pytest.skip(str(error))


@flow.function
def copy(source: dict[str, list[flow.File]], out: flow.Output) -> tuple[flow.File, int]:
    with open(source["x"][0], "rb") as data, open(out, "wb") as copied:
        copied.write(data.read())
    return flow.File(out.url), os.getpid()


def test_in_by_a_file_out_by_an_output(bucket: Path) -> None:
    (bucket / "in").write_bytes(b"content")
    url = f"s3://{bucket.name}"
    result, pid = copy.remote({"x": [flow.File(f"{url}/in")]}, flow.Output(f"{url}/deep/out"))
    assert pid != os.getpid()
    assert (bucket / "deep" / "out").read_bytes() == b"content"
    with result.open() as stream:
        assert stream.read() == b"content"


def test_a_failed_call_publishes_nothing(bucket: Path) -> None:
    @flow.function
    def fail(out: flow.Output, how: str) -> None:
        Path(out).write_bytes(b"half")
        if how == "raise":
            raise KeyError("no")
        if how == "exit":
            os._exit(3)
        time.sleep(100)

    for how, error, options in (
        ("raise", KeyError, {}),
        ("exit", flow.WorkerLost, {}),
        ("sleep", flow.FunctionTimeout, {"timeout": 0.5}),
    ):
        with pytest.raises(error):
            fail.options(**options).remote(flow.Output(f"s3://{bucket.name}/out"), how)

    @flow.function
    def count(out: flow.Output, end: int) -> Iterator[int]:
        with open(out, "w") as file:
            for number in range(end):
                print(number, file=file)
                yield number

    numbers = count.remote(flow.Output(f"s3://{bucket.name}/out"), 10**9)
    next(numbers)
    numbers.close()  # type: ignore[attr-defined]  # before its end
    assert list(count.remote(flow.Output(f"s3://{bucket.name}/whole"), 3)) == [0, 1, 2]
    assert (bucket / "whole").read_text() == "0\n1\n2\n"
    (bucket / "whole").unlink()
    assert os.listdir(bucket) == []
    # What the killed ones left on the host, the next one cleans up.
    with flow.Output(f"s3://{bucket.name}/out") as path:
        Path(path).write_bytes(b"whole")
    assert os.listdir(Path(os.environ["FLOW_CACHE"], "outputs")) == []


def test_what_is_configured_for_fsspec_holds_for_the_worker(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec.config

    @flow.function(env={"FSSPEC_CONFIG_DIR": "/none"})
    def read(file: flow.File) -> str:
        return Path(file).read_text()

    for name in s3.env:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FSSPEC_CONFIG_DIR", "/none")
    monkeypatch.setitem(fsspec.config.conf, "s3", s3.options)
    assert read.remote(flow.File(s3.put("in", b"content"))) == "content"


def test_who_asks_may_change_while_workers_are_there(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @flow.function
    def length(file: flow.File | None) -> int:
        return len(Path(file).read_bytes()) if file else 0

    (bucket / "in").write_bytes(b"content")
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert length.remote(None) == 0
    with pytest.raises(flow.DataAccessDenied, match="AWS_SECRET_ACCESS_KEY"):
        length.remote(flow.File(f"s3://{bucket.name}/in"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    assert length.remote(flow.File(f"s3://{bucket.name}/in")) == 7


def test_changed_and_missing_data_are_the_calls_errors(bucket: Path) -> None:
    @flow.function
    def size(file: flow.File) -> int:
        return os.path.getsize(file)

    with pytest.raises(flow.DataNotFound, match="none"):
        size.remote(flow.File(f"s3://{bucket.name}/none"))
    (bucket / "x").write_bytes(b"one")
    seen = flow.File(f"s3://{bucket.name}/x")
    assert seen.info().size_bytes == 3
    (bucket / "x").write_bytes(b"another")
    with pytest.raises(flow.DataChanged, match="size in bytes was 3, and is 7"):
        size.remote(seen)


def test_globs_and_partitions_feed_a_map(bucket: Path) -> None:
    @flow.function
    def total(part: flow.Partition) -> int:
        return sum(map(int, part))

    @flow.function
    def size(file: flow.File) -> int:
        return os.path.getsize(file)

    (bucket / "a.txt").write_bytes(b"".join(b"%d\n" % n for n in range(30_000)))
    (bucket / "b.txt").write_bytes(b"7\n")
    assert list(size.map(flow.files(f"s3://{bucket.name}/*.txt"))) == [168_890, 2]
    assert sum(total.map(flow.partitions(f"s3://{bucket.name}/*.txt", size="20kB"))) == sum(range(30_000)) + 7


def test_an_upload_goes_as_an_argument_and_comes_as_a_result(tmp_path: Path) -> None:
    @flow.function
    def shout(file: flow.File) -> flow.File:
        Path("/tmp/flowfn-shout.txt").write_text(Path(file).read_text().upper())
        return flow.upload("/tmp/flowfn-shout.txt")

    (tmp_path / "note.txt").write_text("hello")
    uploaded = flow.upload(tmp_path / "note.txt")
    (tmp_path / "note.txt").unlink()
    result = shout.remote(uploaded)
    os.unlink("/tmp/flowfn-shout.txt")
    assert Path(result).read_text() == "HELLO" and result.name == "flowfn-shout.txt"


@pytest.mark.usefixtures("needs_sandbox")
def test_in_a_filesystem_of_its_own(bucket: Path, tmp_path: Path) -> None:
    (bucket / "in").mkdir()
    (bucket / "in" / "x").write_bytes(b"content")
    url = f"s3://{bucket.name}"

    @flow.function(mounts={"/data": f"{url}/in", "/volumes/work": "volume://work"})
    def work(file: flow.File, stored: flow.File, out: flow.Output) -> dict[str, Any]:
        import fsspec

        Path(out).write_bytes(Path(file).read_bytes() + Path(stored).read_bytes())
        with fsspec.open("volume://work/by-url", "w") as by_url:
            by_url.write("1")
        Path("/volumes/work/by-path").write_text("2")
        Path("/tmp/private").write_text("of the worker's own")
        return {"private": flow.File("/tmp/private"), "volume": flow.File("volume://work/by-path"), "out": out}

    (tmp_path / "extra").write_bytes(b"!")
    result = work.remote(flow.File(f"{url}/in/x"), flow.upload(tmp_path / "extra"), flow.Output(f"{url}/out"))
    assert (bucket / "out").read_bytes() == b"content!"
    assert sorted(os.listdir(volumes.get("work").path)) == ["by-path", "by-url"]
    for name, text in (("private", b"of the worker's own"), ("volume", b"2")):
        with result[name].open() as stream:
            assert stream.read() == text
    assert not os.path.exists("/tmp/private")


@pytest.mark.usefixtures("needs_sandbox")
def test_what_cannot_be_kept_is_refused(bucket: Path, tmp_path: Path) -> None:
    @flow.function(mounts={"/data": f"s3://{bucket.name}/"})
    def write(out: flow.Output) -> None:
        Path(out).write_bytes(b"1")

    (bucket / "x").write_bytes(b"")
    with pytest.raises(flow.DataNotFound, match="not mounted here"):
        write.remote(flow.Output("volume://elsewhere/x"))
    with pytest.raises(flow.DataError, match="read-only"):
        write.remote(flow.Output("/srv/flowfn-test/x"))
