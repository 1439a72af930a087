"""Nodes of a Ray cluster that are drained, or whose disk is full."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray_cluster import RayCluster
from test_ray_faults import Client, clusters

__all__ = ["clusters"]  # a fixture


def test_a_node_that_is_drained(clusters: Callable[..., RayCluster], tmp_path: Path) -> None:
    """What runs there goes on; what is new goes elsewhere."""
    cluster = clusters([{"num_cpus": 0}, {"num_cpus": 2}, {"num_cpus": 2}])
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
    client = Client(script, cluster, tmp_path / "client")
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


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A directory of 24 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def test_a_full_disk(clusters: Callable[..., RayCluster], small: Path, tmp_path: Path) -> None:
    cluster = clusters([{"num_cpus": 2}])
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
