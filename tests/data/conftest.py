from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3 import S3


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
