"""The ray backend keeps the contract of backends, on a real Ray of three nodes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engines
import pytest
import ray_cluster
from ray_cluster import RayCluster

import flowfn as flow
from flowfn.testing import BackendContract, Exceptions, Identity, Logs, LostWorkers, Maps, Values, base, lifecycle


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster.running(jobs=True) as made:
        yield made


def connected(cluster: RayCluster, **options: Any) -> Iterator[flow.Backend]:
    import ray

    from flowfn.backends.ray import RayBackend

    # As of a user who uses Ray as well. And Ray keeps a descriptor open of every time that it is connected to.
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    backend = RayBackend(**cluster.options(**options))
    yield backend
    flow.shutdown()
    backend.close()
    ray.shutdown()


class TestRay(BackendContract):
    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls, cluster: RayCluster) -> Iterator[flow.Backend]:
        yield from connected(cluster)

    @pytest.fixture(autouse=True)
    def _cluster(self, cluster: RayCluster) -> None:
        self._processes = cluster

    @pytest.fixture(autouse=True)
    def _descriptors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Ray keeps connections to its processes as it likes; what is ours is no TCP."""

        def ours() -> set[str]:
            rows = [
                row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/net/{name}").read_text().splitlines()
            ]
            tcp = {f"socket:[{row[9]}]" for row in rows[1:]}
            return {entry for entry in base.open_descriptors() if entry.partition(" ")[2] not in tcp}

        monkeypatch.setattr(lifecycle, "open_descriptors", ours)

    def left_over(self) -> set[str]:
        own = set(map(str, self._processes.processes())) - set(map(str, self._processes.workers()))
        return super().left_over() - own


class TestElsewhere(LostWorkers, Maps, Logs, Exceptions, Values, Identity):
    """As from another machine: workers come by TCP. What travels, and what ends."""

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls, cluster: RayCluster) -> Iterator[flow.Backend]:
        engines.need(engines.namespaces())
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_RUNTIME_DIR", str(cluster.sockets))
            yield from connected(cluster)

    def test_they_come_by_tcp(self, backend: flow.Backend) -> None:
        def parents() -> tuple[set[str], set[str]]:
            import os
            from pathlib import Path

            fds = {os.readlink(entry) for entry in Path(f"/proc/{os.getppid()}/fd").iterdir() if entry.is_symlink()}
            rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
            return fds, {f"socket:[{row[9]}]" for row in rows}

        fds, tcp = flow.function(backend=backend)(parents).remote()
        assert fds & tcp


class TestRelayed(LostWorkers, Maps, Logs, Exceptions, Values, Identity):
    """As from a machine from which only Ray's own ways lead to the nodes: what travels, and what ends."""

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls, cluster: RayCluster) -> Iterator[flow.Backend]:
        yield from connected(cluster, direct=False)
