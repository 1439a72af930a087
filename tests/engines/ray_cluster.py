"""A real Ray for tests: nodes of this machine, made by Ray's own utility, with files and ports of their own.

Nodes may be in a network of their own, behind a link that can be cut, and see nothing of the client's sockets: as on
other machines. As a program it makes the cluster, says in a line of JSON what there is, and stays until its standard
input ends.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowfn_runtime import limits

# Tests of this machine's own Ray need neither its tokens nor to be counted.
ENVIRON = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_DEDUP_LOGS": "0"}
# A busy machine is not taken for a dead one: a raylet that is ends itself, and then the processes of its drivers. What
# is killed here refuses connections, and is found dead after five periods.
ENVIRON |= {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "60000",
    "RAY_gcs_rpc_server_connect_timeout_s": "60",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "120",
    "RAY_raylet_client_num_connect_attempts": "60",
    "RAY_worker_register_timeout_seconds": "120",
}
CPUS = 4  # of a node, by declaration
NODES: list[dict[str, Any]] = [
    {"num_gpus": 2, "resources": {"accelerator_type:A100": 1}},
    {"num_gpus": 1, "resources": {"accelerator_type:H100": 1}},
    {},
]
START_S = 90.0
ATTEMPTS = 3  # Ray gives a node 30 seconds to start, which on a machine that is busy may not do
PORTS = range(10000, 20000)  # below those that the kernel gives out: Ray binds them a while after they were chosen


def why_not() -> str | None:
    """Why there can be no Ray here, or None."""
    return None if importlib.util.find_spec("ray") else "Ray is not installed (pip install 'flowfn[ray]')"


class Network:
    """A network of its own with a link to this machine's."""

    def __init__(self) -> None:
        beside = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))  # tests beside have their own
        self.name, self._link = f"flowfn-ray-{beside}", f"fnray{beside}"
        self.here, self.away = f"10.96.{beside}.1", f"10.96.{beside}.2"

    def make(self) -> Network:
        self.remove()
        for command in (
            f"ip netns add {self.name}",
            f"ip link add {self._link} type veth peer name {self._link}n netns {self.name}",
            f"ip address add {self.here}/24 dev {self._link}",
            f"ip link set {self._link} up",
            f"ip -n {self.name} address add {self.away}/24 dev {self._link}n",
            f"ip -n {self.name} link set {self._link}n up",
            f"ip -n {self.name} link set lo up",
        ):
            subprocess.run(command.split(), check=True)
        return self

    def plug(self, up: bool) -> None:
        """Plug it in, or pull it out."""
        subprocess.run(["ip", "link", "set", self._link, "up" if up else "down"], check=True)

    def swallow(self, port: int) -> None:
        """Let vanish what comes to this port from there, without a word, as many a firewall does."""
        away = ["ip", "-n", self.name]
        for command in (
            "link add void type veth peer name voidn",
            "link set void up",
            "link set voidn up",
            f"neigh add {self.here} lladdr 02:00:00:00:00:01 dev void",
            f"route add {self.here} dev void table 100",
            f"rule add pref 10 ipproto tcp dport {port} lookup 100",
        ):
            subprocess.run([*away, *command.split()], check=True)

    def remove(self) -> None:
        for command in (f"ip netns delete {self.name}", f"ip link delete {self._link}"):
            subprocess.run(command.split(), check=False, stderr=subprocess.DEVNULL)


class RayCluster:
    """Three nodes: the head has two a100, another one an h100, the last no GPU. `address` is where drivers connect."""

    def __init__(
        self,
        nodes: list[dict[str, Any]] = NODES,
        *,
        client: bool = False,
        jobs: bool = False,
        network: Network | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.broken = False  # by a test, which says so: tests come in any order
        self._network = network  # for nodes with "away": True
        self._environ = dict(environ or {})
        self._nodes = nodes
        self._client = client  # whether there is a server for ray:// addresses
        self._jobs = jobs  # whether there is a Jobs server, which is part of the dashboard
        self._make_folders()

    def _make_folders(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="ray-test-", dir="/tmp"))  # short enough for Ray's sockets
        self.sockets = self.root / "sockets"  # as XDG_RUNTIME_DIR of a client that is on no machine of the nodes
        self.sockets.mkdir()
        self.cache = self.root / "cache"
        self.home = self.root / "home"

    def start(self) -> RayCluster:
        environ = {**os.environ, **ENVIRON, "RAY_TMPDIR": str(self.root), **self._environ}
        network = self._network and [self._network.name, self._network.here, self._network.away]
        asked = json.dumps({"nodes": self._nodes, "client": self._client, "jobs": self._jobs, "network": network})
        command = [sys.executable, __file__, asked]
        if os.getuid() == 0:
            hide = 'mount -t tmpfs tmpfs "$0" && exec "$@"'
            command = ["unshare", "--mount", "sh", "-c", hide, str(self.sockets), *command]
        for _ in range(ATTEMPTS):
            with (self.root / "stderr").open("wb") as stderr:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    env=environ,
                    start_new_session=True,
                )
            assert self.process.stdout
            line = self.process.stdout.readline()
            if line:
                break
            self.process.stdin.close()  # type: ignore[union-attr]
            self.process.stdout.close()
            self.process.wait()
        else:
            raise AssertionError(f"Ray did not start:\n{(self.root / 'stderr').read_text()[-4000:]}")
        said = json.loads(line)
        self.address: str = said["address"]
        self.raylets: list[int] = said["raylets"]  # process ids, in the order of the nodes
        self.ids: list[str] = said["ids"]  # Ray's names of the nodes
        self.gcs: int = said["gcs"]
        self.url: str = said["url"]
        self.dashboard: tuple[str, int] = tuple(said["dashboard"])
        return self

    def whole(self) -> RayCluster:
        """This, started anew if a test has broken it."""
        if self.broken:
            self.remove()
            if self._network is not None:
                self._network.make()
            self._make_folders()
            self.start()
            self.broken = False
        return self

    def options(self, **more: Any) -> dict[str, Any]:
        """Of a backend whose files go with the cluster's."""
        return {"address": self.address, "cache": str(self.cache), "home": str(self.home), **more}

    def processes(self) -> set[int]:
        """All of it, what runs in it included."""
        return {self.process.pid, *limits.descendants(self.process.pid)}

    def workers(self) -> set[int]:
        """The programs of flowfn's workers in it."""
        return {pid for pid in self.processes() if b"flowfn_runtime" in _command(pid)}

    def commands(self) -> bytes:
        """The command lines of all of it."""
        return b"".join(map(_command, self.processes()))

    def remove(self) -> None:
        """Safe to repeat."""
        if self.process.returncode is not None:
            return
        left = self.processes()
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            pass
        self.process.stdout.close()
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.wait()
        shutil.rmtree(self.root, ignore_errors=True)


@contextmanager
def running(**options: Any) -> Iterator[RayCluster]:
    """A cluster, and the environment of those who use it."""
    import engines
    import pytest

    engines.need(why_not())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRON.items():
            patch.setenv(name, value)
        made = RayCluster(**options)
        try:
            yield made.start()
        finally:
            made.remove()


def raylet_of(pid: int) -> int:
    """The raylet under which the process of a worker is, as Ray says in its environment."""
    for variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
        if variable.startswith(b"RAY_RAYLET_PID="):
            return int(variable.partition(b"=")[2])
    return 0


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def main() -> None:
    """Make a cluster, and keep it."""
    import ray._private.ray_constants as constants
    from ray.cluster_utils import Cluster

    asked = json.loads(sys.argv[1])
    limits.set_subreaper()
    common = {
        "num_cpus": CPUS,
        "memory": 8 << 30,
        "object_store_memory": 1 << 28,
        "include_dashboard": False,
        "dashboard_agent_listen_port": 0,
        "include_log_monitor": False,  # processes that nobody here asks anything of
        "no_monitor": True,
    }
    head = {**common, "_system_config": {"prestart_worker_first_driver": False, "enable_worker_prestart": False}}
    if asked["jobs"]:
        head |= {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": _free_port()}
    if asked["client"]:
        head["ray_client_server_port"] = _free_port()
    network = asked["network"]
    if network:
        head["node_ip_address"] = network[1]
    try:
        cluster = Cluster(shutdown_at_exit=False)  # which is done here, and is no matter for threads

        def add(node: dict[str, Any]) -> Any:
            if node.pop("away", False):
                _enter(network[0])
                node["node_ip_address"] = network[2]
            return cluster.add_node(**{**common, **node})

        first, *others = asked["nodes"]
        nodes = [cluster.add_node(**{**head, **first})]
        for node in others:
            with concurrent.futures.ThreadPoolExecutor(1) as thread:
                nodes.append(thread.submit(add, node).result())
        if asked["client"]:
            [server] = nodes[0].all_processes[constants.PROCESS_TYPE_RAY_CLIENT_SERVER]
            _await_listener((network[1] if network else "127.0.0.1", head["ray_client_server_port"]), server.process)
    except BaseException:
        _kill_all()
        raise
    said = {
        "dashboard": (head.get("dashboard_host"), head.get("dashboard_port")),
        "address": cluster.address,
        "url": f"ray://{network[1] if network else '127.0.0.1'}:{head.get('ray_client_server_port')}",
        "gcs": nodes[0].all_processes[constants.PROCESS_TYPE_GCS_SERVER][0].process.pid,
        "raylets": [node.all_processes[constants.PROCESS_TYPE_RAYLET][0].process.pid for node in nodes],
        "ids": [node.node_id for node in nodes],
    }
    os.write(1, json.dumps(said).encode() + b"\n")
    os.dup2(2, 1)
    sys.stdin.read()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _kill_all()
    os._exit(0)


def _enter(network: str) -> None:
    """Have this thread, and what it starts, in the network."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{network}") as place:
        if libc.setns(place.fileno(), 0x40000000):
            raise OSError(ctypes.get_errno(), f"can't enter the network {network}")


def _kill_all() -> None:
    for pid in limits.descendants(os.getpid()):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _free_port() -> int:
    import random
    import socket

    while True:
        port = random.choice(PORTS)
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return port


def _await_listener(where: tuple[str, int], process: subprocess.Popen[bytes]) -> None:
    """Return when the process listens; Ray does not wait for its client server."""
    import socket

    while True:
        try:
            socket.create_connection(where).close()
            return
        except ConnectionRefusedError:
            assert process.poll() is None, "Ray's client server ended early"
            time.sleep(0.05)


def wait_until(holds: Any, what: str) -> None:
    """Return when it holds; fail if it does not for long."""
    deadline = time.monotonic() + START_S
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


if __name__ == "__main__":
    main()
