"""The container backend keeps the contract of backends, with a real Docker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import podman
import pytest
from docker_daemon import Docker

import flowfn as flow
from flowfn.backends.container import ContainerBackend
from flowfn.testing import BackendContract


class TestDocker(BackendContract):
    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls, docker: Docker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ContainerBackend]:
        # Workers see the tests' temporary directories.
        backend = docker.backend(image=docker.load(podman.with_numpy()), share=[tmp_path_factory.getbasetemp()])
        yield backend
        flow.shutdown()
        backend.close()

    @pytest.fixture(autouse=True)
    def flow_home(
        self, docker: Docker, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
    ) -> Path:
        """One for all cases, as workers live from one to the next and the locks of GPUs are there."""
        self._docker = docker
        home = tmp_path_factory.getbasetemp() / "contract-home"
        monkeypatch.setenv("FLOW_HOME", str(home))
        monkeypatch.setenv("FLOW_CACHE", str(tmp_path_factory.getbasetemp() / "contract-cache"))
        for name in ("FLOW_BACKEND", "FLOW_GPUS", "FLOW_PROJECT"):
            monkeypatch.delenv(name, raising=False)
        return home

    def left_over(self) -> set[str]:
        return super().left_over() | self._docker.containers()
