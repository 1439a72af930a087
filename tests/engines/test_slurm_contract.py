"""The slurm backend keeps the contract of backends, on a real Slurm."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from slurm_cluster import SlurmCluster

import flowfn as flow
from flowfn.backends.slurm import SlurmBackend
from flowfn.testing import BackendContract


class TestSlurm(BackendContract):
    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls, slurm_cluster: SlurmCluster) -> Iterator[SlurmBackend]:
        backend = SlurmBackend(slurm_cluster.options())
        yield backend
        flow.shutdown()
        backend.close()

    @pytest.fixture(autouse=True)
    def cluster(self, slurm_cluster: SlurmCluster) -> None:
        self._cluster = slurm_cluster

    def places(self) -> list[str]:
        return [*super().places(), f"{self._cluster.root}/home", f"{self._cluster.root}/cache"]

    def left_over(self) -> set[str]:
        return super().left_over() | {f"job {number}" for number in self._cluster.jobs()}
