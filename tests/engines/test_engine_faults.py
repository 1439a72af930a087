"""What no backend's own tests have of the faults that each engine has to survive: cut networks, and full disks."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import engines
import podman
import pytest
import slurm_cluster as slurm
from slurm_cluster import SlurmCluster
from sshd import Sshd
from test_slurm import wait_until

import flowfn as flow
from flowfn.backends.slurm import SlurmBackend
from flowfn.backends.ssh import SshBackend

WAIT_S = 100.0
CUT_S = 10.0


@pytest.fixture
def made() -> Iterator[list[Any]]:
    """Backends that are closed at the end."""
    backends: list[Any] = []
    yield backends
    flow.shutdown()
    for backend in backends:
        backend.close()


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The project is a small one."""
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")


@pytest.fixture
def small(elsewhere: None) -> Iterator[Callable[[Path], None]]:
    """Puts a filesystem of 24 MiB over a directory."""
    mounted: list[Path] = []

    def mount(place: Path) -> None:
        place.mkdir(exist_ok=True, parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m,mode=777", "tmpfs", place], check=True)
        mounted.append(place)

    yield mount
    for place in mounted:
        subprocess.run(["umount", "--lazy", place], check=True)


def make_work() -> Callable[[str, str], str]:
    """A function that goes by value. It says that it runs, and waits to be let go."""

    def work(running: str, go: str) -> str:
        import os
        import time

        open(running, "w").close()
        while not os.path.exists(go):
            time.sleep(0.01)
        return "through"

    return work


# ssh; a network that is gone for good, and a full disk, are among its own tests


def test_ssh_a_network_that_is_gone_for_ten_seconds(ssh_servers: Callable[..., Sshd], made: list[Any]) -> None:
    server = ssh_servers(hostname="gpu-one", subnet=3)
    made.append(SshBackend(server.url, config=str(server.config)))  # with what it believes of networks by itself
    running, go = server.files / "running", server.files / "go"
    future = flow.function(backend=made[0], retries=None)(make_work()).spawn(str(running), str(go))
    server.wait_for(running)
    server.link(up=False)
    time.sleep(CUT_S)
    go.touch()  # its result comes when the network is back
    server.link(up=True)
    assert future.result(timeout=WAIT_S) == "through"
    assert flow.function(backend=made[0])(lambda: 5).remote() == 5


# Slurm


@pytest.fixture
def cluster() -> Iterator[SlurmCluster]:
    """A Slurm whose n3 is in a network of its own."""
    engines.need(slurm.why_not())
    engines.need(engines.namespaces())
    cluster = SlurmCluster(apart=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(cluster.conf))
        try:
            yield cluster.start()
        finally:
            flow.shutdown()
            cluster.remove()


@pytest.mark.parametrize("for_good", [False, True])
def test_slurm_a_network_that_is_gone(cluster: SlurmCluster, made: list[Any], tmp_path: Path, for_good: bool) -> None:
    made.append(SlurmBackend(cluster.options(partition="cpu")))
    running, go = tmp_path / "running", tmp_path / "go"
    make = make_work()

    def generate(running: str, go: str) -> Any:  # whose loss is never tried again
        import os

        yield os.environ["SLURMD_NODENAME"]
        yield make(running, go)

    stream = flow.function(backend=made[0])(generate).remote(str(running), str(go))
    assert next(stream) == "n3"
    wait_until(running.exists)
    cluster.link(up=False)
    if for_good:
        # Slurm gives the node up after its SlurmdTimeout.
        with pytest.raises(flow.WorkerLost, match=r"lost its node|was cancelled|connection was lost"):
            next(stream)
    else:
        time.sleep(CUT_S)
        go.touch()
        cluster.link(up=True)
        assert next(stream) == "through"
    cluster.link(up=True)


def test_slurm_a_full_disk(
    slurm_cluster: SlurmCluster, made: list[Any], small: Callable[[Path], None], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    small(cache)
    (cache / "filler").write_bytes(bytes((24 << 20) - (64 << 10)))
    made.append(SlurmBackend(slurm_cluster.options(cache=str(cache))))
    f = flow.function(backend=made[0])(lambda: 1)
    with pytest.raises(flow.BackendUnavailable, match=r"runtime can't be put in place.*No space left") as caught:
        f.remote()
    assert "cache=" in str(caught.value)
    made.append(SlurmBackend(slurm_cluster.options(home=f"{cache}/home")))
    with pytest.raises(flow.FlowError, match=rf"can't be put into {cache}/home: No space left"):
        f.options(backend=made[-1]).submit()
    (cache / "filler").unlink()
    assert f.remote() == 1


# containers; killed workers, engines and clients are among their own tests, and there is no network in between


def test_container_a_full_disk(
    made: list[Any], small: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines.need(podman.why_not())
    podman.ready()
    cache = tmp_path / "cache"
    small(cache)
    (cache / "filler").write_bytes(bytes((24 << 20) - (64 << 10)))
    monkeypatch.setenv("FLOW_CACHE", str(cache))
    made.append(podman.backend())
    f = flow.function(backend=made[0])(lambda: 1)
    with pytest.raises(flow.BackendUnavailable, match=r"runtime can't be put in place.*No space left"):
        f.remote()
    (cache / "filler").unlink()
    assert f.remote() == 1
