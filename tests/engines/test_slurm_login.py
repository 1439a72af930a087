"""A Slurm cluster from outside: its login node is a real SSH server, and all that this client has of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import SlurmCluster
from sshd import Sshd
from test_slurm import wait_until

import flowfn as flow
from flowfn.backends import registry
from flowfn.backends.slurm import SlurmBackend
from flowfn.testing import Meeting

WAIT_S = 60.0


@pytest.fixture(autouse=True)
def outside(slurm_cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process knows nothing of the cluster."""
    monkeypatch.delenv("SLURM_CONF")


@pytest.fixture
def login(slurm_cluster: SlurmCluster, ssh_servers: Callable[..., Sshd]) -> Iterator[Callable[..., Sshd]]:
    def start(**options: str) -> Sshd:
        return ssh_servers(**slurm_cluster.environ, **options)

    yield start
    flow.shutdown()
    wait_until(lambda: slurm_cluster.jobs() == [])


def options(server: Sshd, **more: Any) -> flow.Slurm:
    """Of workers whose files are the login's."""
    place = {"cache": f"{server.root}/cache", "home": f"{server.root}/home", "python": server.interpreter()}
    return flow.Slurm(login=server.url, ssh_config=str(server.config), **{"workers": 3, **place, **more})


def test_calls_and_maps(login: Callable[..., Sshd]) -> None:
    server = login()
    job, uid = flow.function(backend=options(server), gpu="a100")(
        lambda: (os.environ["SLURM_JOB_ID"], os.getuid())
    ).remote()
    assert job.isdigit()
    assert uid == int(subprocess.run(["id", "-u", server.user], capture_output=True, text=True).stdout)
    squares = flow.function(backend=options(server))(lambda n: (n * n, os.environ["SLURM_JOB_ID"]))
    found = list(squares.map(range(500)))
    assert [square for square, _ in found] == [n * n for n in range(500)]
    assert 1 <= len({number for _, number in found}) <= 3
    assert server.log().count("Accepted publickey") <= 2  # one connection for each set of options


def test_what_the_cluster_refuses(login: Callable[..., Sshd]) -> None:
    server = login()
    with pytest.raises(flow.ResourceUnavailable, match="a100:2"):
        flow.function(backend=options(server), gpu="b200")(abs).remote(-1)
    with pytest.raises(flow.ResourceUnavailable, match="'nowhere'"):
        flow.function(backend=options(server, partition="nowhere"))(abs).remote(-1)


def test_a_login_node_that_allows_few_sessions(login: Callable[..., Sshd]) -> None:
    server = login(settings="MaxSessions 3")

    @flow.function(backend=options(server), max_workers=3)
    def meet(place: str) -> int:
        import os
        import time

        open(f"{place}/{os.getpid()}", "w").close()
        while len(os.listdir(place)) < 3:
            time.sleep(0.01)
        return os.getpid()

    calls = [meet.spawn(str(server.files)) for _ in range(3)]
    assert len({call.result(timeout=WAIT_S) for call in calls}) == 3


def test_a_call_that_is_cancelled_while_its_job_waits(login: Callable[..., Sshd], slurm_cluster: SlurmCluster) -> None:
    server = login()
    filler = subprocess.Popen(
        ["srun", "-p", "urgent", "-w", "n3", "--exclusive", "--mem=0", "sh", "-c", "echo; exec cat"],
        env={**os.environ, **slurm_cluster.environ},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert filler.stdin and filler.stdout and filler.stdout.readline() == b"\n"
    try:
        backend = options(server, partition="cpu", wait="1s")
        with pytest.raises(flow.ResourceUnavailable, match="waited longer than 1 s in the queue"):
            flow.function(backend=backend)(abs).remote(-1)
        wait_until(lambda: len(slurm_cluster.jobs()) == 1)
    finally:
        filler.terminate()
        filler.wait()
        filler.stdin.close()
        filler.stdout.close()


def test_a_killed_client_leaves_no_job(
    login: Callable[..., Sshd], slurm_cluster: SlurmCluster, meeting: Meeting, tmp_path: Path
) -> None:
    server = login()
    shown = options(server)
    (tmp_path / "client.py").write_text(
        "import flowfn as flow\n"
        "def wait():\n"
        "    import socket\n"
        f"    connection = socket.create_connection({meeting._listener.getsockname()[:2]!r})\n"
        "    connection.sendall(b'here\\n')\n"
        "    connection.recv(1)\n"
        f"options = flow.Slurm(login={shown.login!r}, ssh_config={shown.ssh_config!r}, cache={shown.cache!r}, "
        f"home={shown.home!r}, python={shown.python!r})\n"
        "flow.function(backend=options)(wait).remote()\n"
    )
    client = subprocess.Popen([sys.executable, "client.py"], cwd=tmp_path)
    met = meeting.next()
    client.kill()
    client.wait()
    met.wait_for_end()
    wait_until(lambda: slurm_cluster.jobs() == [])


def test_a_login_node_that_is_lost(login: Callable[..., Sshd], slurm_cluster: SlurmCluster, meeting: Meeting) -> None:
    server = login()
    meet = meeting.meet

    def generate() -> Any:
        import os

        yield os.environ["SLURM_JOB_ID"]
        meet().recv(1)

    stream = flow.function(backend=options(server))(generate).remote()
    next(stream)
    met = meeting.next()
    server.crash()
    with pytest.raises((flow.WorkerLost, flow.BackendUnavailable)):
        next(stream)
    met.wait_for_end()
    wait_until(lambda: slurm_cluster.jobs() == [])


def test_what_can_not_be(login: Callable[..., Sshd], tmp_path: Path) -> None:
    with pytest.raises(flow.ConfigError, match="no login node"):
        registry.get("slurm://")
    assert isinstance(registry.get("slurm://me@cluster"), SlurmBackend)
    server = login()
    server.known.write_text("")
    with pytest.raises(flow.BackendUnavailable, match="is not known here"):
        flow.function(backend=options(server))(abs).remote(-1)


def test_a_host_that_is_no_login_node(ssh_servers: Callable[..., Sshd]) -> None:
    server = ssh_servers()
    server.stop()
    (server.root / "bin").mkdir()
    for tool in ("sh", "id", "timeout", "sed"):
        (server.root / "bin" / tool).symlink_to(f"/usr/bin/{tool}")
    server.environ["PATH"] = f"{server.root}/bin"
    server.start()
    with pytest.raises(flow.BackendUnavailable, match="not on the PATH of") as caught:
        flow.function(backend=options(server))(abs).remote(-1)
    assert f"-p {server.port}" in (caught.value.hint or "")
