"""A real Ray from programs of their own: what is lost when parts of it are killed, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engines
import pytest
import ray_cluster
from ray_cluster import RayCluster, wait_until

import flowfn as flow
from flowfn import places

NODES: list[dict[str, Any]] = [{"num_cpus": 2}, *({"num_cpus": 2, "resources": {"away": 2}} for _ in range(2))]

# A client is a program of its own: Ray ends the process of a driver that has lost its cluster.
PRELUDE = """
import os, signal, sys, time
import flowfn as flow
from flowfn.backends.ray import RayBackend

backend = RayBackend(**{options!r})

def say(text):
    print("says:", text, flush=True)  # Ray prints as well
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory of 24 MiB, where this is root."""
    place = tmp_path_factory.mktemp("small")
    if os.getuid() != 0:
        yield place
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.fixture(scope="module")
def started(small: Path) -> Iterator[RayCluster]:  # a cluster sees what was mounted before it
    with ray_cluster.running(nodes=NODES, client=True) as made:
        yield made


@pytest.fixture
def cluster(started: RayCluster) -> RayCluster:
    return started.whole()


class Client:
    """A program that uses the cluster; what it says is read line by line."""

    def __init__(
        self, script: str, cluster: RayCluster, where: Path, *, elsewhere: bool = False, **options: Any
    ) -> None:
        where.mkdir(exist_ok=True)
        text = PRELUDE.format(options=cluster.options(**options)) + textwrap.dedent(script)
        (where / "client.py").write_text(text)
        self.process = subprocess.Popen(
            [sys.executable, "client.py"],
            cwd=where,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **({"XDG_RUNTIME_DIR": str(cluster.sockets)} if elsewhere else {})},
            text=True,
        )

    def line(self) -> str:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("says: "):
                return line[len("says: ") :].rstrip("\n")
        return ""

    def tell(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def expect(self, line: str) -> None:
        said = self.line()
        if said != line:
            self.process.kill()
            pytest.fail(f"it said {said!r} in place of {line!r}:\n{self.process.communicate()[1][-4000:]}")

    def end(self) -> tuple[int, str]:
        """Its exit status, and what it has said on standard error."""
        _, said = self.process.communicate(timeout=120)
        return self.process.returncode, said


def test_no_cluster_at_the_address() -> None:
    engines.need(ray_cluster.why_not())
    with pytest.raises(flow.BackendUnavailable, match="no Ray cluster"):
        flow.function(backend="ray://127.0.0.1:1")(abs).remote(-1)


def test_a_cluster_without_a_jobs_server(cluster: RayCluster) -> None:
    from flowfn.backends.ray import RayBackend

    backend = RayBackend(**cluster.options())
    try:
        with pytest.raises(flow.BackendUnavailable, match="Jobs server"):
            flow.function(backend=backend)(len).submit()
    finally:
        places.close_all()


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "relayed"])
def test_rays_client_leads_there(cluster: RayCluster, tmp_path: Path, direct: bool) -> None:
    """`ray://`: a process that is no part of the cluster."""
    script = """
    double = flow.function(backend=backend)(lambda x: 2 * x)
    assert list(double.map(range(500))) == [2 * n for n in range(500)]
    data = os.urandom(1 << 22)
    assert flow.function(backend=backend)(lambda data: data).remote(data) == data
    say("all there")
    flow.shutdown()
    """
    client = Client(script, cluster, tmp_path / "client", address=None, url=cluster.url, direct=direct)
    client.expect("all there")
    assert client.end()[0] == 0
    wait_until(lambda: not cluster.workers(), "workers are left")


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "relayed"])
def test_a_client_that_is_killed(cluster: RayCluster, tmp_path: Path, direct: bool) -> None:
    script = """
    @flow.function(backend=backend)
    def f():
        import subprocess
        import time
        subprocess.Popen(["sleep", "616"])
        time.sleep(616)

    @flow.function(backend=backend)
    def ready():
        return "ready"

    f.spawn(); f.spawn()
    say(ready.remote())
    while True:
        time.sleep(1)
    """
    client = Client(script, cluster, tmp_path / "client", direct=direct)
    client.expect("ready")
    wait_until(lambda: b"sleep\x00616" in cluster.commands(), "nothing runs")
    client.process.kill()
    client.end()
    wait_until(lambda: not cluster.workers(), "workers are left")
    wait_until(lambda: b"sleep\x00616" not in cluster.commands(), "more is left")


def test_a_full_disk(cluster: RayCluster, small: Path, tmp_path: Path) -> None:
    engines.need(None if os.getuid() == 0 else "a small disk takes root")
    script = f"""
    filler = {str(small / "filler")!r}
    with open(filler, "wb") as file:
        file.write(bytes((24 << 20) - (64 << 10)))
    f = flow.function(backend=backend)(lambda: 1)
    try:
        f.remote()
    except flow.BackendUnavailable as error:
        print(error, file=sys.stderr)
        say("No space left" in str(error) or "is full" in str(error))
    os.unlink(filler)
    say(f.remote())
    flow.shutdown()
    """
    client = Client(script, cluster, tmp_path / "client", cache=str(small))
    client.expect("True")
    client.expect("1")
    assert client.end()[0] == 0


def test_the_ray_process_of_a_worker_is_killed(cluster: RayCluster, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    script = f"""
    @flow.function(backend=backend)
    def f():
        import os, time
        number = len(os.listdir({str(marks)!r}))
        open(f"{marks}/{{number}}", "w").write(str(os.getpid()))
        while number == 0:
            time.sleep(0.1)
        return number

    say(f.remote())
    flow.shutdown()
    """
    client = Client(script, cluster, tmp_path / "client")
    wait_until(lambda: (marks / "0").exists() and (marks / "0").read_text(), "the call did not begin")
    worker = int((marks / "0").read_text())
    [task] = [pid for pid in cluster.processes() if ray_cluster._command(pid).startswith(b"ray::lodge")]
    os.kill(task, signal.SIGKILL)
    client.expect("1")
    assert client.end()[0] == 0
    wait_until(lambda: not Path(f"/proc/{worker}").exists(), "the worker outlived Ray's process")
    wait_until(lambda: not cluster.workers(), "workers are left")


def test_a_node_that_is_drained(cluster: RayCluster, tmp_path: Path) -> None:
    """What runs there goes on; what is new goes elsewhere."""
    cluster.broken = True
    script = f"""
    def raylet(hold=False):
        import os
        found = os.environ["RAY_RAYLET_PID"]
        if hold:
            with open({str(tmp_path / "begun")!r}, "w") as file:
                file.write(found)
            with open({str(tmp_path / "go on")!r}):
                pass
        return int(found)

    where = flow.function(backend=backend, cpu=1)(raylet)
    running = where.spawn(True)
    say("started")
    with open({str(tmp_path / "drained")!r}):
        pass
    there = [where.options(env={{"N": str(n)}}).remote() for n in range(2)]
    say(there)
    os.close(os.open({str(tmp_path / "go on")!r}, os.O_WRONLY))
    say(running.result())
    flow.shutdown()
    """
    for name in ("begun", "drained", "go on"):
        os.mkfifo(tmp_path / name)
    client = Client(script, cluster, tmp_path / "client", resources={"away": 1})
    client.expect("started")
    drained = cluster.raylets.index(int((tmp_path / "begun").read_text()))
    asked = ["--node-id", cluster.ids[drained], "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test"]
    program = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster.address, *asked]
    subprocess.run([*program, "--deadline-remaining-seconds", "600"], check=True, capture_output=True)
    (tmp_path / "drained").write_text("")
    other = cluster.raylets[3 - drained]
    client.expect(str([other, other]))
    client.expect(str(cluster.raylets[drained]))
    assert client.end()[0] == 0


SPREAD = """
items = range(60)

@flow.function(backend=backend, max_workers=6, cpu=1)
def work(n):
    import os, time
    with open(f"{folder}/{{n}}-{{os.getpid()}}", "w") as file:
        file.write(str(os.getppid()))
    time.sleep(0.1)
    while n >= 12 and not os.path.exists("{folder}-go"):
        time.sleep(0.01)
    return n * n

results = []
for value in work.map(items):
    results.append(value)
    if len(results) == 12:
        say("under way")
assert results == [n * n for n in items], results
say("all there")
flow.shutdown()
"""


def nodes_at_work(cluster: RayCluster) -> set[int]:
    """The raylets of nodes that have workers of flowfn's."""
    return {ray_cluster.raylet_of(pid) for pid in cluster.workers()} & set(cluster.raylets)


def test_a_node_that_is_killed_in_the_middle_of_a_map(cluster: RayCluster, tmp_path: Path) -> None:
    cluster.broken = True
    folder = tmp_path / "ran"
    folder.mkdir()
    client = Client(SPREAD.format(folder=folder), cluster, tmp_path / "client", spread=True)
    client.expect("under way")
    wait_until(lambda: len(nodes_at_work(cluster)) >= 2, "the workers are not spread over the nodes")
    os.kill(max(nodes_at_work(cluster) & set(cluster.raylets[1:])), signal.SIGKILL)
    Path(f"{folder}-go").touch()
    client.expect("all there")
    status, said = client.end()
    assert status == 0, said
    # What had a result is not run again; only what ran on the node at that moment is.
    ran = [int(path.name.partition("-")[0]) for path in folder.iterdir()]
    assert set(ran) == set(range(60)) and len(ran) <= 60 + 2 * 2
    wait_until(lambda: not cluster.workers(), "workers are left")


def test_a_head_that_is_killed(cluster: RayCluster, tmp_path: Path) -> None:
    script = """
    @flow.function(backend=backend)
    def f(seconds):
        import time
        time.sleep(seconds)
        return seconds

    f.remote(0)
    say("ready")
    try:
        f.remote(600)
    except flow.FlowError as error:
        say("clear: " + type(error).__name__)
        os._exit(0)  # Ray does not end well without its head
    """
    cluster.broken = True
    client = Client(script, cluster, tmp_path / "client")
    client.expect("ready")
    os.kill(cluster.gcs, signal.SIGKILL)
    os.kill(cluster.raylets[0], signal.SIGKILL)
    client.expect("clear: BackendUnavailable")
    client.end()
    wait_until(lambda: not cluster.workers(), "workers are left")
