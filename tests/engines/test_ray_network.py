"""A Ray cluster whose second node is in a network of its own, with a link that is cut: for a while, and for good.

Workers there are reached by TCP, straight, or are relayed by Ray where that is not to be had.
"""

from __future__ import annotations

import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engines
import pytest
import ray_cluster
from ray_cluster import Network, RayCluster, wait_until
from test_ray_faults import Client

# A node that can't be reached is given up in seconds, but not within the ten that one is cut off for.
PATIENCE = {"timeout_ms": "5000", "failure_threshold": "3", "initial_delay_ms": "0"}
ENVIRON = {f"RAY_health_check_{name}": value for name, value in PATIENCE.items()}
NODES: list[dict[str, Any]] = [{"num_cpus": 2}, {"num_cpus": 4, "resources": {"away": 4}, "away": True}]

HOW = """
def how():
    return sorted({type(one).__name__ for one in backend._session.workers()})

def network():
    return os.readlink("/proc/self/ns/net")
"""

SQUARES = """
@flow.function(backend=backend, cpu=1, max_workers=3)
def square(n):
    import time
    time.sleep(0.2)
    return n * n

squares = iter(square.map(range(60)))
seen = [next(squares) for _ in range(6)]
say("under way")
seen += squares
assert seen == [n * n for n in range(60)], seen
say("all there")
flow.shutdown()
"""


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    engines.need(ray_cluster.why_not())
    engines.need(engines.namespaces())
    made = Network()
    try:
        yield made.make()
    finally:
        made.remove()


@pytest.fixture(scope="module")
def started(network: Network) -> Iterator[RayCluster]:
    """A head with two cores, and a node with four behind the link."""
    with ray_cluster.running(nodes=NODES, network=network, environ=ENVIRON, client=True) as made:
        yield made


@pytest.fixture
def cluster(started: RayCluster) -> RayCluster:
    return started.whole()


@pytest.mark.parametrize("outside", [False, True], ids=["inside", "ray://"])
def test_a_worker_on_another_machine(cluster: RayCluster, tmp_path: Path, outside: bool) -> None:
    script = """
    f = flow.function(backend=backend)
    assert f(network).remote() != network()
    data = os.urandom(1 << 25)
    assert f(lambda data: data[::-1]).remote(data) == data[::-1]
    assert list(f(lambda n: 2 * n).map(range(2000))) == [2 * n for n in range(2000)]

    def die():
        print("last words")
        os._exit(3)

    try:
        f(die).remote()
    except flow.WorkerLost as error:
        assert error.exitcode == 3, error
        say("lost")
    say(how())
    flow.shutdown()
    """
    where = {"address": None, "url": cluster.url} if outside else {}
    options = {**where, "elsewhere": True, "resources": {"away": 1}}
    client = Client(HOW + textwrap.dedent(script), cluster, tmp_path / "client", **options)
    client.expect("lost")
    client.expect("['RayConnection']")
    assert client.end()[0] == 0
    wait_until(lambda: not cluster.workers(), "workers are left")


def test_a_door_that_can_not_be_reached(cluster: RayCluster, network: Network, tmp_path: Path) -> None:
    """What comes to it vanishes: workers are relayed, and the node is not asked to try it again."""
    script = """
    backend.slots(flow.function(backend=backend)(network).spec)  # it is connected from here on
    say(backend._starter.door().addresses[1][1][1])
    input()
    f = flow.function(backend=backend, max_workers=2)
    assert f(network).remote() != network()
    say(how())
    say(len(backend._starter._far))
    assert f(lambda: 2).options(memory="100MiB").remote() == 2
    say(how())
    flow.shutdown()
    """
    client = Client(HOW + textwrap.dedent(script), cluster, tmp_path / "client", elsewhere=True, resources={"away": 1})
    network.swallow(int(client.line()))
    client.tell("go on")
    client.expect("['RelayedConnection']")
    client.expect("1")
    client.expect("['RelayedConnection']")
    assert client.end()[0] == 0


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "relayed"])
def test_a_client_that_is_killed(cluster: RayCluster, tmp_path: Path, direct: bool) -> None:
    script = """
    def last():
        import subprocess
        import time
        subprocess.Popen(["sleep", "617"])
        time.sleep(617)

    flow.function(backend=backend)(last).spawn()
    say(flow.function(backend=backend)(lambda: "ready").remote())
    while True:
        time.sleep(1)
    """
    options = {"elsewhere": True, "direct": direct, "resources": {"away": 1}}
    client = Client(script, cluster, tmp_path / "client", **options)
    client.expect("ready")
    wait_until(lambda: b"sleep\x00617" in cluster.commands(), "nothing runs")
    client.process.kill()
    client.end()
    wait_until(lambda: not cluster.workers(), "workers are left")
    wait_until(lambda: b"sleep\x00617" not in cluster.commands(), "more is left")


@pytest.mark.parametrize("for_good", [False, True])
def test_a_network_that_is_gone(cluster: RayCluster, network: Network, for_good: bool, tmp_path: Path) -> None:
    """Nothing is lost or doubled: what the node had is there later, or is done by the other one."""
    clients = [
        Client(SQUARES, cluster, tmp_path / f"client{direct}", elsewhere=True, direct=direct)
        for direct in (True, False)
    ]
    for client in clients:
        client.expect("under way")
    cluster.broken = for_good
    network.plug(up=False)
    if not for_good:
        with pytest.raises(subprocess.TimeoutExpired):  # it is gone for ten seconds, and there are more items
            clients[0].process.wait(10)
        network.plug(up=True)
    for client in clients:
        client.expect("all there")
    for client in clients:
        status, said = client.end()
        assert status == 0, said[-4000:]
