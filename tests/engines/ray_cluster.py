"""A real Ray for tests: nodes of this machine, made by Ray's own utility, with files and ports of their own.

As a program it makes the cluster, says in a line of JSON what there is, and stays until its standard input ends.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
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


class RayCluster:
    """Three nodes: the head has two a100, another one an h100, the last no GPU. `address` is where drivers connect."""

    def __init__(self, nodes: list[dict[str, Any]] = NODES, *, client: bool = False, jobs: bool = False) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="ray-test-", dir="/tmp"))  # short enough for Ray's sockets
        self.cache = self.root / "cache"
        self.home = self.root / "home"
        self._nodes = nodes
        self._client = client  # whether there is a server for ray:// addresses
        self._jobs = jobs  # whether there is a Jobs server, which is part of the dashboard

    def start(self) -> RayCluster:
        environ = {**os.environ, **ENVIRON, "RAY_TMPDIR": str(self.root)}
        asked = json.dumps({"nodes": self._nodes, "client": self._client, "jobs": self._jobs})
        for _ in range(ATTEMPTS):
            with (self.root / "stderr").open("wb") as stderr:
                self.process = subprocess.Popen(
                    [sys.executable, __file__, asked],
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

    def remove(self) -> None:
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
    }
    head = {**common, "_system_config": {"prestart_worker_first_driver": False, "enable_worker_prestart": False}}
    if asked["jobs"]:
        head |= {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": _free_port()}
    if asked["client"]:
        head["ray_client_server_port"] = _free_port()
    try:
        cluster = Cluster()
        nodes = [
            cluster.add_node(**{**(head if not number else common), **node})
            for number, node in enumerate(asked["nodes"])
        ]
        if asked["client"]:
            [server] = nodes[0].all_processes[constants.PROCESS_TYPE_RAY_CLIENT_SERVER]
            _await_listener(head["ray_client_server_port"], server.process)
    except BaseException:
        _kill_all()
        raise
    said = {
        "address": cluster.address,
        "url": f"ray://127.0.0.1:{head.get('ray_client_server_port')}",
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


def _await_listener(port: int, process: subprocess.Popen[bytes]) -> None:
    """Return when the process listens; Ray does not wait for its client server."""
    import socket

    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
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
