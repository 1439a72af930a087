from __future__ import annotations

from collections.abc import Callable, Iterator

import docker_daemon
import engines
import podman
import pytest
import slurm_cluster as slurm
import sshd
from docker_daemon import Docker
from slurm_cluster import SlurmCluster
from sshd import Sshd

import flowfn as flow


@pytest.fixture(scope="session")
def ssh_server() -> Iterator[Sshd]:
    """An SSH server on loopback with three declared GPUs, for the whole session."""
    engines.need(sshd.why_not())
    server = Sshd(FLOW_GPUS="a100:2,h100:1").start()
    yield server
    server.remove()


@pytest.fixture
def ssh_servers() -> Iterator[Callable[..., Sshd]]:
    """Starts further SSH servers, of the test's own: call it with what `Sshd` takes."""
    engines.need(sshd.why_not())
    started: list[Sshd] = []

    def start(**options: object) -> Sshd:
        if "hostname" in options:
            engines.need(engines.namespaces())
        started.append(Sshd(**options).start())  # type: ignore[arg-type]
        return started[-1]

    yield start
    for server in started:
        server.remove()


@pytest.fixture(scope="module")
def slurm_cluster() -> Iterator[SlurmCluster]:
    """A Slurm of three nodes; Slurm's commands in this process are about it."""
    engines.need(slurm.why_not())
    cluster = SlurmCluster()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(cluster.conf))
        try:
            yield cluster.start()
        finally:
            cluster.remove()


@pytest.fixture(scope="module")
def docker() -> Iterator[Docker]:
    """A Docker of its own, which has the tests' base image."""
    engines.need(docker_daemon.why_not())
    podman.ready()
    daemon = Docker()
    try:
        daemon.start().load(podman.BASE)
        yield daemon
    finally:
        flow.shutdown()
        daemon.remove()
