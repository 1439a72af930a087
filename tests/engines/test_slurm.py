"""The slurm backend against a real Slurm: the contract of backends, and what is Slurm's own."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster

import flowfn as flow
from flowfn.backends.slurm import SlurmBackend
from flowfn.testing import BackendContract


@pytest.fixture(scope="module")
def options(slurm_cluster: SlurmCluster) -> flow.Slurm:
    return flow.Slurm(workers=3, cache=f"{slurm_cluster.root}/cache", home=f"{slurm_cluster.root}/home")


class TestContract(BackendContract):
    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls, slurm_cluster: SlurmCluster, options: flow.Slurm) -> Iterator[SlurmBackend]:
        backend = SlurmBackend(options)
        yield backend
        flow.shutdown()
        backend.close()

    @pytest.fixture(autouse=True)
    def cluster(self, slurm_cluster: SlurmCluster) -> None:
        self._cluster = slurm_cluster

    def left_over(self) -> set[str]:
        return super().left_over() | {f"job {number}" for number in self._cluster.jobs()}
