"""The embedded backend keeps the contract, with shared memory and over the plain stream."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import flowfn as flow
from flowfn.backends.local import LocalBackend
from flowfn.testing import BackendContract


class TestLocal(BackendContract):
    accelerated = True

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def flow_home(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
        """One home for all cases, since they share workers, which hold locks there."""
        with pytest.MonkeyPatch.context() as patch:
            home = tmp_path_factory.mktemp("home")
            patch.setenv("FLOW_HOME", str(home))
            patch.setenv("FLOW_CACHE", str(tmp_path_factory.mktemp("cache")))
            for name in ("FLOW_BACKEND", "FLOW_GPUS", "FLOW_PROJECT"):
                patch.delenv(name, raising=False)
            yield home

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls) -> Iterator[LocalBackend]:
        backend = LocalBackend(accelerated=cls.accelerated)
        yield backend
        flow.shutdown()
        backend.close()


class TestPlainStream(TestLocal):
    accelerated = False
