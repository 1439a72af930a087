from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from s3 import S3


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
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB of its own (root can mount one; others skip)."""
    if os.getuid():
        pytest.skip("mounting a small disk needs root")
    path = tmp_path / "small-disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path)], check=True)
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture
def bucket(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory that is the bucket `s3://<its name>`, which this process's environment has the credentials for."""
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    return s3.root
