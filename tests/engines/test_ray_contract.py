"""The ray backend keeps the contract of backends, on a real Ray of three nodes."""

from __future__ import annotations

from collections.abc import Iterator

import engines
import pytest
import ray_cluster
from ray_cluster import RayCluster

import flowfn as flow
from flowfn.testing import BackendContract


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    engines.need(ray_cluster.why_not())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ray_cluster.ENVIRON.items():
            patch.setenv(name, value)
        made = RayCluster()
        try:
            yield made.start()
        finally:
            made.remove()


class TestRay(BackendContract):
    unsupported = {"commands", "nodes", "ports", "tasks"}
    direct = True

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls, cluster: RayCluster) -> Iterator[flow.Backend]:
        import ray

        from flowfn.backends.ray import RayBackend

        # As of a user who uses Ray as well. And Ray keeps a descriptor open of every time that it is connected to.
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        backend = RayBackend(**cluster.options(direct=cls.direct))
        yield backend
        flow.shutdown()
        backend.close()
        ray.shutdown()

    @pytest.fixture(autouse=True)
    def _cluster(self, cluster: RayCluster) -> None:
        self._processes = cluster

    def left_over(self) -> set[str]:
        own = set(map(str, self._processes.processes())) - set(map(str, self._processes.workers()))
        return super().left_over() - own


class TestRelayed(TestRay):
    """As from a machine from which only Ray's own ways lead to the nodes."""

    direct = False
