"""The embedded backend keeps the contract, with shared memory and over the plain stream."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import flowfn as flow
from flowfn.backends.local import LocalBackend
from flowfn.testing import BackendContract


class TestLocal(BackendContract):
    accelerated = True

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls) -> Iterator[LocalBackend]:
        backend = LocalBackend(accelerated=cls.accelerated)
        yield backend
        flow.shutdown()
        backend.close()


class TestPlainStream(TestLocal):
    accelerated = False
