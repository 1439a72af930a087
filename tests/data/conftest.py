from __future__ import annotations

from pathlib import Path

import pytest
from s3 import S3


@pytest.fixture
def bucket(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory that is the bucket `s3://<its name>`, which this process's environment has the credentials for."""
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    return s3.root
