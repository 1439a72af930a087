from __future__ import annotations

import os
import signal
import sys
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from s3 import S3, S3Server


@pytest.fixture(autouse=True)
def flow_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A flowfn home and cache of the test's own."""
    home = tmp_path / "flow-home"
    monkeypatch.setenv("FLOW_HOME", str(home))
    monkeypatch.setenv("FLOW_CACHE", str(tmp_path / "flow-cache"))
    for name in ("FLOW_BACKEND", "FLOW_GPUS", "FLOW_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    yield home


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server on loopback, for the whole session."""
    server = S3Server(tmp_path_factory.mktemp("s3")).start()
    yield server
    server.kill()


@pytest.fixture
def s3(s3_server: S3Server) -> S3:
    """A new bucket on the S3 server, and how to get at it: see `s3.S3`."""
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    (s3_server.root / bucket).mkdir()
    return S3(s3_server, bucket, f"http://127.0.0.1:{s3_server.port}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With `FLOW_REQUIRE_ENGINES=1` a test that skips for want of something fails: whoever set it installed it all."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("FLOW_REQUIRE_ENGINES") == "1":
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        # A kernel can't be installed, each Python has its own run, and what a backend can't do is in docs/backends.md.
        if not any(words in reason for words in ("this kernel", "this Python", "came with Python", "the backend says")):
            report.outcome = "failed"
            report.longrepr = f"FLOW_REQUIRE_ENGINES=1, and this test found something missing: {reason}"
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of several processes one has all tests of an engine's module, and so one cluster; other tests go anywhere."""
    from xdist.scheduler import LoadScopeScheduling

    class ByEngine(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid.partition("::")[0] if nodeid.startswith("tests/engines/") else nodeid

    return ByEngine(config, log)


def pytest_configure() -> None:
    """Keep what installers cache beside the environment, as `scripts/install` does: the user's caches are theirs.

    And take signals as a program on a terminal does, also where the run is a background job that ignores some.
    """
    for name, folder in (("UV_CACHE_DIR", "uv"), ("PIP_CACHE_DIR", "pip")):
        os.environ.setdefault(name, os.path.join(sys.prefix, ".cache", folder))
    for number, default in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGQUIT, signal.SIG_DFL),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, default)


class ExactS3:
    """A bucket on a server that keeps keys as they are (rclone's are files): versions, multipart ETags, odd names."""

    def __init__(self, client: Any, endpoint: str, bucket: str) -> None:
        self.client = client
        self.bucket = bucket
        self.url = f"s3://{bucket}"
        self.options = {"key": "test", "secret": "test", "endpoint_url": endpoint}

    def put(self, key: str, content: bytes = b"") -> None:
        self.client.put_object(Bucket=self.bucket, Key=key, Body=content)


@pytest.fixture(scope="session")
def moto_server() -> Iterator[str]:
    """moto's S3 server on loopback."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def exact_s3(moto_server: str) -> Iterator[ExactS3]:
    """A new bucket on moto's S3 server."""
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=moto_server,
        aws_access_key_id="test",
        aws_secret_access_key="test",
        region_name="us-east-1",
    )
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=bucket)
    yield ExactS3(client, moto_server, bucket)
    client.close()


@pytest.fixture
def meeting() -> Iterator[Any]:
    """Where a test meets its workers: a `flowfn.testing.Meeting`."""
    from flowfn.testing import Meeting

    place = Meeting("127.0.0.1")
    yield place
    place.close()
