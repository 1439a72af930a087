"""A Ray cluster whose second node is in a network of its own, with a link that is cut: for a while, and for good."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import engines
import pytest
import ray_cluster

from flowfn_runtime import limits

START_S = 120.0
_BESIDE = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))  # tests beside this one have their own
NETWORK, LINK = f"flowfn-ray-{_BESIDE}", f"fnray{_BESIDE}"
HERE, AWAY = f"10.96.{_BESIDE}.1", f"10.96.{_BESIDE}.2"
PORT = 26379 + 2 * _BESIDE

CLIENT = """
import os
import flowfn as flow
from flowfn.backends.ray import RayBackend

# Both nodes are this machine, so what is said would not take the network by itself.
backend = RayBackend(address={address!r}, cache={cache!r}, home={home!r}, direct=False)

@flow.function(backend=backend, cpu=1, max_workers=3)
def square(n):
    import time
    time.sleep(0.2)
    return n * n

squares = iter(square.map(range(60)))
seen = [next(squares) for _ in range(6)]
print("under way", flush=True)
seen += squares
assert seen == [n * n for n in range(60)], seen
print("all there", flush=True)
flow.shutdown()
"""


def link(up: bool) -> None:
    """Plug the second node's network in, or pull it out."""
    subprocess.run(["ip", "link", "set", LINK, "up" if up else "down"], check=True)


@pytest.fixture
def address(tmp_path: Path, for_good: bool) -> Iterator[str]:
    """A cluster: a head with one core, and a node with two behind the link."""
    engines.need(ray_cluster.why_not())
    engines.need(engines.namespaces())
    folder = tempfile.mkdtemp(prefix="ray-net-", dir="/tmp")  # short enough for Ray's sockets
    # A node that can't be reached is given up in seconds, but not within the ten that one is cut off for.
    patience = {"timeout_ms": "2000" if for_good else "10000", "failure_threshold": "3", "initial_delay_ms": "0"}
    patience = {f"RAY_health_check_{name}": value for name, value in patience.items()}
    environ = {**os.environ, **ray_cluster.ENVIRON, **patience}
    program = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
    nodes: list[subprocess.Popen[bytes]] = []

    def start(*argv: str) -> None:
        with open(tmp_path / f"node-{len(nodes)}", "wb") as said:
            nodes.append(subprocess.Popen(argv, env=environ, stdout=said, stderr=said, start_new_session=True))
        ray_cluster.wait_until(
            lambda: b"Ray runtime started" in (tmp_path / f"node-{len(nodes) - 1}").read_bytes(), "a node did not start"
        )

    remove_network()
    try:
        for command in (
            f"ip netns add {NETWORK}",
            f"ip link add {LINK} type veth peer name {LINK}n netns {NETWORK}",
            f"ip address add {HERE}/24 dev {LINK}",
            f"ip link set {LINK} up",
            f"ip -n {NETWORK} address add {AWAY}/24 dev {LINK}n",
            f"ip -n {NETWORK} link set {LINK}n up",
            f"ip -n {NETWORK} link set lo up",
        ):
            subprocess.run(command.split(), check=True)
        own = [
            f"--node-ip-address={HERE}",
            f"--port={PORT}",
            f"--ray-client-server-port={PORT + 1}",
            f"--temp-dir={folder}",
        ]
        start(*program, "--head", *own, "--num-cpus=1", "--include-dashboard=false")
        away = ["nsenter", f"--net=/run/netns/{NETWORK}"]
        start(*away, *program, f"--address={HERE}:{PORT}", f"--node-ip-address={AWAY}", "--num-cpus=2")
        yield f"{HERE}:{PORT}"
    finally:
        for node in nodes:
            for pid in [*limits.descendants(node.pid), node.pid]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            node.wait()
        remove_network()
        shutil.rmtree(folder, ignore_errors=True)


def remove_network() -> None:
    for command in (f"ip netns delete {NETWORK}", f"ip link delete {LINK}"):
        subprocess.run(command.split(), check=False, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("for_good", [False, True])
def test_a_network_that_is_gone(address: str, for_good: bool, tmp_path: Path) -> None:
    """Nothing is lost or doubled: what the node had is there later, or is done by the other one."""
    place = tmp_path / "client"
    place.mkdir()
    options = {"address": address, "cache": str(tmp_path / "cache"), "home": str(tmp_path / "home")}
    (place / "client.py").write_text(textwrap.dedent(CLIENT).format(**options))
    with (tmp_path / "said").open("wb") as said:
        client = subprocess.Popen(
            [sys.executable, "client.py"],
            cwd=place,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env={**os.environ, **ray_cluster.ENVIRON},
        )
    assert client.stdout is not None
    lines = (line.rstrip("\n") for line in client.stdout)
    assert "under way" in lines, (tmp_path / "said").read_text()
    link(up=False)
    if not for_good:
        with pytest.raises(subprocess.TimeoutExpired):  # it is gone for ten seconds, and there are more items
            client.wait(10)
        link(up=True)
    try:
        assert "all there" in lines, (tmp_path / "said").read_text()
        assert client.wait(START_S) == 0
    finally:
        client.kill()
        client.wait()
        client.stdout.close()
