"""What Docker does otherwise than Podman: images, limits, and who ends when somebody is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import podman
import pytest
from docker_daemon import Docker

import flowfn as flow
from flowfn.backends.container import ContainerBackend, gpu_options

VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"
Make = Callable[..., ContainerBackend]


@pytest.fixture
def made(docker: Docker) -> Iterator[Make]:
    """Makes backends that are closed at the end."""
    backends: list[ContainerBackend] = []

    def make(**options: Any) -> ContainerBackend:
        backends.append(docker.backend(**options))
        return backends[-1]

    yield make
    flow.shutdown()
    for backend in backends:
        backend.close()


def test_the_container_is_dockers(docker: Docker, made: Make) -> None:
    name = flow.function(backend=made())(lambda: os.uname().nodename).remote()
    assert name in docker.containers()


def test_mounts_are_binds_that_only_volumes_can_be_written_to(made: Make, tmp_path: Path) -> None:
    (tmp_path / "table.txt").write_text("42")

    @flow.function(backend=made(), mounts={"/table": f"file://{tmp_path}", "/kept": "volume://of-docker"})
    def f() -> tuple[str, bool, str]:
        import os

        with open("/kept/word", "w") as file:
            file.write("kept")
        try:
            open("/table/new", "w")
        except OSError as error:
            return open("/table/table.txt").read(), os.path.ismount("/kept"), str(error.strerror)
        raise AssertionError("data could be written to")

    assert f.remote() == ("42", True, "Read-only file system")


def test_the_engine_limits_memory_and_cores(docker: Docker, made: Make) -> None:
    backend = made()
    if not {"memory", "cpuset"} <= backend.engine.facts().limits:
        pytest.skip("this kernel gives the engine no cgroups to limit with")
    name = flow.function(backend=backend, memory="200MiB", cpu=1)(lambda: os.uname().nodename).remote()
    host = json.loads(docker.run("inspect", name))[0]["HostConfig"]
    assert 200 << 20 <= host["Memory"] <= 300 << 20
    assert host["CpusetCpus"].isdecimal() and host["NanoCpus"] == 10**9


def test_memory_that_fills_faster_than_anybody_looks(made: Make) -> None:
    @flow.function(backend=made(), memory="150MiB", retries=None)
    def fill() -> int:
        import mmap

        kept = mmap.mmap(-1, 1 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
        return len(kept)

    with pytest.raises(flow.OutOfMemory, match="150 MiB"):
        fill.remote()


def test_an_image_is_built_in_layers(made: Make, capfd: pytest.CaptureFixture[str]) -> None:
    image = flow.Image.python(VERSION).env(MADE_BY="us, 'quoted'").run("echo $MADE_BY > /made", "true")
    f = flow.function(backend=made(), image=image)(lambda: open("/made").read().strip())
    assert f.remote() == "us, 'quoted'"
    broken = f.options(image=image.run("echo what was wrong >&2; exit 3"))
    with pytest.raises(flow.BackendError, match=r"step 3 of 3, run\('echo what") as caught:
        broken.remote()
    assert "what was wrong" in str(caught.value).partition("\n")[2]
    assert "what was wrong" in capfd.readouterr().err


def test_gpus_that_the_engine_can_not_hand_over(made: Make) -> None:
    f = flow.function(backend=made(run_options=gpu_options(["GPU-1234"], docker=True)))(lambda: 1)
    with pytest.raises(flow.ResourceUnavailable, match="can't hand GPUs") as caught:
        f.remote()
    assert "nvidia-container-toolkit" in (caught.value.hint or "")


def stuck(fifo: str) -> Callable[[str], None]:
    def wait(fifo: str) -> None:
        import os
        import time

        subprocess.Popen(["setsid", "sleep", "1000"])
        with open(fifo, "w") as file:
            file.write(os.uname().nodename)
        time.sleep(1000)

    return wait


def test_a_container_killed_from_outside_is_a_lost_worker(docker: Docker, made: Make, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    future = flow.function(backend=made(share=[tmp_path]), retries=None)(stuck(str(fifo))).spawn(str(fifo))
    future.add_done_callback(lambda _: fifo.write_text(""))
    killed = 0
    while name := fifo.read_text():  # the first losses are made good for
        docker.run("kill", name)
        killed += 1
    with pytest.raises(flow.WorkerLost, match="SIGKILL"):
        future.result()
    assert killed >= 1


def test_a_killed_client_leaves_no_container(docker: Docker, tmp_path: Path) -> None:
    client, name = podman.client_of(tmp_path, "docker", docker.options)
    assert name in docker.containers()
    client.kill()
    client.wait()
    docker.wait_until_gone(name)


def test_a_daemon_that_dies(docker: Docker, made: Make, tmp_path: Path) -> None:
    """Its containers are lost workers; when it is back, so are calls."""
    backend = made(share=[tmp_path])

    def generate(fifo: str) -> Any:  # whose loss is never tried again
        import os
        import time

        yield os.uname().nodename
        time.sleep(1000)

    stream = flow.function(backend=backend)(generate).remote(str(tmp_path))
    name = next(stream)
    docker.kill()
    try:
        with pytest.raises((flow.WorkerLost, flow.BackendUnavailable)):
            next(stream)
        with pytest.raises(flow.BackendUnavailable, match="service is not running") as caught:
            flow.function(backend=made())(lambda: 1).remote()
        assert "start docker" in (caught.value.hint or "")
    finally:
        docker.start()
    docker.wait_until_gone(name)
    assert flow.function(backend=backend)(lambda: 5).remote() == 5
