"""The ssh backend keeps the contract of backends, against a real server and as another user than the tests'."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from sshd import Sshd

import flowfn as flow
from flowfn.backends.ssh import SshBackend
from flowfn.testing import BackendContract


class TestSsh(BackendContract):
    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls, ssh_server: Sshd) -> Iterator[SshBackend]:
        backend = SshBackend(ssh_server.url, config=str(ssh_server.config), python=ssh_server.python("numpy"))
        yield backend
        flow.shutdown()
        backend.close()

    @pytest.fixture(autouse=True)
    def server(self, ssh_server: Sshd) -> None:
        self._server = ssh_server

    def places(self) -> list[str]:
        return [*super().places(), f"{self._server.root}/home", f"{self._server.root}/cache"]

    @pytest.fixture
    def tmp_path(self, ssh_server: Sshd) -> Path:
        """One that the login may enter: pytest's own is the user's alone."""
        place = ssh_server.root / uuid.uuid4().hex
        place.mkdir()
        shutil.chown(place, ssh_server.user)
        return place
