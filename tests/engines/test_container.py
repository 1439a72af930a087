"""What is special to workers in containers: images, what the engine limits, what goes wrong, and who ends when."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import engines
import podman
import pytest
from test_environments import another_python

import flowfn as flow
from flowfn.backends import registry
from flowfn.backends.container import ContainerBackend, bind, gpu_options
from flowfn.backends.container_images import last_step, place
from flowfn_runtime import paths

ROOT = Path(__file__).parents[2]
VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"
Make = Callable[..., ContainerBackend]


@pytest.fixture
def made() -> Iterator[Make]:
    """Makes backends that are closed at the end."""
    engines.need(podman.why_not())
    podman.ready()
    backends: list[ContainerBackend] = []

    def make(**options: Any) -> ContainerBackend:
        backends.append(podman.backend(**options))
        return backends[-1]

    yield make
    flow.shutdown()
    for backend in backends:
        backend.close()


# where it runs


def test_a_container_has_files_processes_and_a_name_of_its_own(made: Make) -> None:
    @flow.function(backend=made())
    def f() -> tuple[str, list[str], str]:
        import os

        processes = sorted(name for name in os.listdir("/proc") if name.isdigit())
        return os.uname().nodename, processes, open("/etc/debian_version").read()

    name, processes, _ = f.remote()
    assert name in podman.containers()
    assert processes[0] == "1" and str(os.getpid()) not in processes


def test_big_arguments_and_results_go_through_shared_memory(made: Make) -> None:
    def there(data: bytearray) -> tuple[bool, bytearray]:
        with open("/proc/self/maps") as maps:
            return "memfd:flowfn" in maps.read(), data

    f = flow.function(backend=made())(there)
    data = bytearray(os.urandom(1 << 20) * 8)
    meeting = f"{paths.cache()}/containers"
    hidden = made(run_options=[f"--mount=type=tmpfs,destination={meeting},notmpcopyup"])
    for shared, other in (
        (True, f),
        (False, f.options(memory="1GiB")),  # where nobody could tell who is charged for it
        (False, f.options(backend=hidden)),  # where the worker can't come for it
    ):
        assert other.remote(data) == (shared, data)
        assert os.listdir(meeting) == []


def test_it_is_configured_by_name(made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Path(os.environ["FLOW_HOME"])
    home.mkdir()
    lists = f"engine_options = {json.dumps(podman.OPTIONS)}\nnetwork = 'host'\n"
    (home / "config.toml").write_text(f'[backends.box]\ntype = "container"\nimage = "{podman.BASE}"\n{lists}')
    assert flow.function(backend="box")(lambda: os.uname().nodename).remote().startswith("flowfn-")
    flow.shutdown()
    registry.close_all()


def test_shared_directories_and_whose_files_are_written(made: Make, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()

    @flow.function(backend=made(share=[tmp_path / "shared"]))
    def write(path: str) -> bool:
        import os

        with open(path, "w") as file:
            file.write("from the container")
        return os.path.exists(os.path.dirname(os.path.dirname(path)) + "/beside")

    (tmp_path / "beside").touch()
    assert write.remote(str(tmp_path / "shared" / "new.txt")) is False
    new = tmp_path / "shared" / "new.txt"
    assert new.read_text() == "from the container"
    assert (new.stat().st_uid, new.stat().st_gid) == (os.getuid(), os.getgid())


def test_secrets_are_not_shown_by_the_engine(made: Make) -> None:
    backend = made()
    f = flow.function(backend=backend, secrets={"TOKEN": "s3cr3t"})(lambda: (os.environ["TOKEN"], os.uname().nodename))
    value, name = f.remote()
    assert value == "s3cr3t"
    assert "s3cr3t" not in podman.run("inspect", name)


# limits


def test_the_engine_limits_memory_and_cores(made: Make) -> None:
    backend = made()
    if not {"memory", "cpuset"} <= backend.engine.facts().limits:
        pytest.skip("this kernel gives the engine no cgroups to limit with")

    def limits() -> tuple[int, str]:
        def read(*paths: str) -> str:
            return next(open(path).read().strip() for path in paths if os.path.exists(path))

        import os

        memory = read("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
        return int(memory), read("/sys/fs/cgroup/cpuset.cpus.effective", "/sys/fs/cgroup/cpuset/cpuset.cpus")

    memory, cores = flow.function(backend=backend, memory="200MiB", cpu=1)(limits).remote()
    assert 200 << 20 <= memory <= 300 << 20
    assert cores.isdecimal()
    free = flow.function(backend=made(engine_limits=False), memory="200MiB", cpu=1)
    memory, _ = free(limits).remote()
    assert memory > 300 << 20
    assert len(free(lambda: os.sched_getaffinity(0)).remote()) == 1


def test_memory_that_fills_faster_than_anybody_looks(
    made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's kill is told from others, and leaves nothing in the working directory."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    @flow.function(backend=made(), memory="150MiB", retries=None)
    def fill() -> int:
        import mmap

        kept = mmap.mmap(-1, 1 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
        return len(kept)

    with pytest.raises(flow.OutOfMemory, match="150 MiB"):
        fill.remote()
    assert os.listdir() == []


# images


def test_an_image_is_built_once(made: Make, capfd: pytest.CaptureFixture[str]) -> None:
    image = (
        flow.Image.python(VERSION)
        .env(MADE_BY="us, 'quoted'")
        .run("echo $MADE_BY > /made", f"echo {os.getpid()} > /by")
        .pip_install("six==1.16.0")
    )

    def f() -> tuple[str, str, str, str]:
        import os

        import six  # type: ignore[import-untyped]

        return open("/made").read().strip(), open("/by").read().strip(), os.environ["MADE_BY"], six.__version__

    told = "us, 'quoted'"
    assert flow.function(backend=made(), image=image)(f).remote() == (told, str(os.getpid()), told, "1.16.0")
    assert "pip install" in capfd.readouterr().err
    assert flow.function(backend=made(), image=image)(f).remote()[1] == str(os.getpid())
    assert "pip install" not in capfd.readouterr().err


def test_a_step_that_fails_is_named(made: Make, capfd: pytest.CaptureFixture[str]) -> None:
    image = flow.Image.python(VERSION).run("true").env(A="1").run("echo what was wrong >&2; exit 3").run("true")
    f = flow.function(backend=made(), image=image)(lambda: 1)
    with pytest.raises(flow.BackendError, match=r"step 3 of 4, run\('echo what") as caught:
        f.remote()
    assert "what was wrong" in str(caught.value).partition("\n")[2]
    assert "what was wrong" in capfd.readouterr().err


def test_a_package_that_is_not_there(made: Make) -> None:
    image = flow.Image.python(VERSION).apt_install("no-such-package-as-this")
    with pytest.raises(flow.BackendError, match=r"step 1 of 1, apt_install.*no-such-package"):
        flow.function(backend=made(), image=image)(lambda: 1).remote()


def test_a_dockerfile_with_its_context(made: Make, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(f"FROM {podman.BASE}\nCOPY table.txt /table.txt\n")
    table = tmp_path / "table.txt"
    (tmp_path / "requirements.txt").write_text("# none\n")

    def f() -> tuple[str, str]:
        return open("/table.txt").read(), open("/more").read()

    for text in ("one", "two"):  # what has changed is built anew
        table.write_text(text)
        image = flow.Image.from_dockerfile(tmp_path / "Dockerfile").run("cp /table.txt /more")
        assert flow.function(backend=made(), image=image)(f).remote()[0] == text


def test_the_same_by_its_name(made: Make) -> None:
    backend = made(image="localhost/not-this-one:1")
    for image in (podman.BASE, flow.Image.from_registry(podman.BASE)):
        assert flow.function(backend=backend, image=image)(lambda: 5).remote() == 5


def test_an_image_that_is_not_there(made: Make) -> None:
    f = flow.function(backend=made())(lambda: 1)
    with pytest.raises(flow.BackendUnavailable, match=r"127\.0\.0\.1:9/nothing:1 can't be pulled.*refused"):
        f.options(image="127.0.0.1:9/nothing:1").remote()
    with pytest.raises(flow.BackendUnavailable, match="no image localhost/no-such-image:1 on this host"):
        f.options(image=flow.Image.from_registry("localhost/no-such-image:1").run("true")).remote()


def test_what_was_found_out_is_not_asked_again_until_it_is_wrong(made: Make, tmp_path: Path) -> None:
    """A program after the first has the engine do nothing but run a container, as long as that works."""
    engine, asked = tmp_path / "podman", tmp_path / "asked"
    verb = f"[ $a = info ] || [ $a = image ] || [ $a = run ] && echo $a >> {asked}"
    engine.write_text(f'#!/bin/sh\nfor a; do case $a in -*) ;; *) {verb}; break;; esac; done\nexec podman "$@"\n')
    engine.chmod(0o755)
    image = f"localhost/flowfn-test-gone-{os.getpid()}:1"
    podman.run("tag", podman.BASE, image)

    def verbs() -> list[str]:
        f = flow.function(backend=made(engine=str(engine), image=image))(lambda: 7)
        asked.write_text("")
        try:
            assert f.remote() == 7
        finally:
            f.spec.backend.close()
        return asked.read_text().split()

    try:
        assert verbs() == ["info", "image", "run"]
        assert verbs() == ["run"]
    finally:
        podman.run("untag", image, image)  # this name alone
    with pytest.raises(flow.BackendUnavailable):
        verbs()
    assert asked.read_text().split()[:3] == ["run", "info", "image"]


def test_an_image_without_python_or_without_anything(made: Make, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(f"FROM {podman.BASE}\nRUN rm /usr/bin/python3*\n")
    f = flow.function(backend=made())(lambda: 1)
    with pytest.raises(flow.BackendUnavailable, match="has no Python"):
        f.options(image=flow.Image.from_dockerfile(tmp_path / "Dockerfile")).remote()
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY empty /empty\n")
    (tmp_path / "empty").touch()
    with pytest.raises(flow.BackendUnavailable, match="has no /bin/sh"):
        f.options(image=flow.Image.from_dockerfile(tmp_path / "Dockerfile")).remote()


def test_where_nobody_says_why_the_warnings_of_the_engine_are_told(made: Make) -> None:
    f = flow.function(backend=made(python="/bin/false", engine_options=[*podman.OPTIONS, "--log-level=info"]))
    with pytest.raises(flow.BackendUnavailable, match=r"status 1:\ntime=.*level=info"):
        f(lambda: 1).remote()


def test_another_python_and_images_that_are_none(made: Make) -> None:
    f = flow.function(backend=made())(lambda: 1)
    other = f"{sys.version_info[0]}.{sys.version_info[1] + 1}"
    with pytest.raises(flow.VersionMismatch, match="the image has Python"):
        f.options(image=flow.Image.python(other)).remote()
    with pytest.raises(flow.ConfigError, match="no image for containers"):
        f.options(image={"name": "tag"}).remote()


def test_where_a_build_failed() -> None:
    image = flow.Image.python("3.12").run("true").env(A="b").run("one", "two")
    text = image.containerfile("base")
    legacy = "STEP 1/5: FROM base\nSTEP 4/5: RUN one\nSTEP 5/5: RUN two\nsome words\nError: exit status 1\n"
    assert last_step(legacy) == ("RUN two", "some words\nError: exit status 1")
    assert place(image, text, "RUN two") == "step 3 of 3, run('one', 'two')"
    assert place(image, text, "RUN true") == "step 1 of 3, run('true')"
    buildkit = "#6 [3/4] RUN one\n#6 ERROR: process\n------\n > [3/4] RUN one:\n0.1 oh no\n------\n"
    assert last_step(buildkit)[0] == "RUN one" and place(image, text, "RUN one") == "step 3 of 3, run('one', 'two')"
    assert place(image, text, "FROM base") is None


# the engine


def test_no_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for engine, said in ((None, "neither podman nor docker"), ("docker", "no docker")):
        with pytest.raises(flow.BackendUnavailable, match=said) as caught:
            flow.function(backend=ContainerBackend(engine=engine))(lambda: 1).remote()
        assert "install" in (caught.value.hint or "")


@pytest.mark.parametrize("engine", ["podman", "docker"])
def test_an_engine_whose_service_is_down(engine: str, tmp_path: Path) -> None:
    if shutil.which(engine) is None:
        engines.need(f"there is no {engine} (apt-get install podman docker.io)")
    options = {"podman": ["--remote", f"--url=unix://{tmp_path}/none"], "docker": [f"--host=unix://{tmp_path}/none"]}
    backend = ContainerBackend(engine=engine, engine_options=options[engine])
    with pytest.raises(flow.BackendUnavailable, match="service is not running") as caught:
        flow.function(backend=backend)(lambda: 1).remote()
    assert f"start {engine}" in (caught.value.hint or "")


def test_gpus_that_the_engine_can_not_hand_over(made: Make) -> None:
    f = flow.function(backend=made(run_options=gpu_options(["GPU-1234"], docker=False)))(lambda: 1)
    with pytest.raises(flow.ResourceUnavailable, match="can't hand GPUs") as caught:
        f.remote()
    assert "nvidia-ctk cdi generate" in (caught.value.hint or "")


def test_options_of_run() -> None:
    assert gpu_options([], docker=True) == []
    assert gpu_options(["GPU-1", "GPU-2"], docker=True) == ["--gpus", '"device=GPU-1,GPU-2"']
    assert gpu_options(["GPU-1"], docker=False) == ["--device=nvidia.com/gpu=GPU-1"]
    assert bind("/a", "/b", True) == "--mount=type=bind,source=/a,target=/b,readonly"
    assert bind("/a,b", "/b", False) == '--mount=type=bind,"source=/a,b",target=/b'


@pytest.mark.parametrize(
    "options",
    [{"url": "container://"}, {"url": "container://-x"}, {"url": "container://a", "image": "b"}, {"share": "/a"}],
)
def test_options_that_can_not_be(options: dict[str, Any]) -> None:
    with pytest.raises(flow.ConfigError):
        ContainerBackend(**options)


# ends


def test_a_container_killed_from_outside_is_a_lost_worker(made: Make, tmp_path: Path) -> None:
    @flow.function(backend=made(share=[tmp_path]), retries=None)
    def wait(fifo: str) -> None:
        import os
        import time

        with open(fifo, "w") as file:
            file.write(os.uname().nodename)
        time.sleep(1000)

    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    future = wait.spawn(str(fifo))
    future.add_done_callback(lambda _: fifo.write_text(""))
    killed = 0
    while name := fifo.read_text():  # the first losses are made good for
        podman.run("kill", name)
        killed += 1
    with pytest.raises(flow.WorkerLost, match="SIGKILL"):
        future.result()
    assert killed >= 1


@pytest.mark.parametrize("who", ["client", "engine"])
def test_who_is_killed_leaves_no_container(made: Make, tmp_path: Path, who: str) -> None:
    client, name = podman.client_of(tmp_path, "podman", podman.OPTIONS)
    try:
        assert name in podman.containers()
        if who == "client":
            client.kill()
        else:
            os.kill(_runner(client.pid, name), signal.SIGKILL)
        podman.wait_until_gone(name)
    finally:
        client.kill()
        client.wait()
    for left in podman.containers():  # what the client started anew before it was killed
        podman.wait_until_gone(left)


def _runner(client: int, name: str) -> int:
    """The `podman run` of a container."""
    from flowfn_runtime.limits import descendants

    for pid in descendants(client):
        if f"--name={name}".encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
            return pid
    raise AssertionError(f"{name} has no podman run")


def test_a_program_of_another_python_ends_in_silence(made: Make, tmp_path: Path) -> None:
    made()
    _, python = another_python()  # 3.12 if it is there, which starts no threads at its end
    (tmp_path / "config.toml").write_text(
        f'[backends.box]\ntype = "container"\nimage = "{podman.BASE}"\nnetwork = "host"\nengine = "podman"\n'
        f"engine_options = {json.dumps(podman.OPTIONS)}\nshare = ['{Path(python).parents[1]}']\npython = '{python}'\n"
    )
    program = "import flowfn as flow; print(flow.function(backend='box')(lambda: 7).remote())"
    environ = {**os.environ, "FLOW_HOME": str(tmp_path), "PYTHONPATH": f"{ROOT}:{ROOT}/runtime"}
    ended = subprocess.run([python, "-c", program], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("7\n", "")


def test_the_containers_end_with_the_backend(made: Make) -> None:
    backend = made()
    name = flow.function(backend=backend)(lambda: os.uname().nodename).remote()
    flow.shutdown()
    backend.close()
    assert name not in podman.containers()


# the runtime image


@pytest.fixture(scope="module")
def runtime_image() -> str:
    engines.need(podman.why_not())
    base = podman.ready()
    words = ["build", "--quiet", "--format=docker", f"--build-arg=BASE={base}", "--tag=localhost/flowfn-runtime:test"]
    podman.run(*words, *podman.BUILD, f"--file={ROOT}/runtime/Dockerfile", str(ROOT))
    return "localhost/flowfn-runtime:test"


def test_the_runtime_image(runtime_image: str, made: Make) -> None:
    config = json.loads(podman.run("image", "inspect", runtime_image))[0]
    assert config["User"] == "flow"
    assert config["Labels"]["org.opencontainers.image.title"] == "flowfn runtime"
    size = config["Size"] - json.loads(podman.run("image", "inspect", podman.BASE))[0]["Size"]
    assert size < 150 << 20

    def f() -> tuple[str, str]:
        import sys

        import s3fs

        return sys.prefix, s3fs.__file__

    prefix, file = flow.function(backend=made(image=runtime_image))(f).remote()
    assert prefix == "/opt/flowfn" and file.startswith(prefix)


def test_its_health_check_and_its_user(runtime_image: str) -> None:
    check = json.loads(podman.run("image", "inspect", runtime_image))[0]["Healthcheck"]["Test"]
    assert check[0] == "CMD"
    words = [
        "run",
        "--rm",
        "--no-healthcheck",
        "--network=none",
        "--ulimit=nofile=1024:4096",
        "--ulimit=nproc=4096:4096",
    ]
    podman.run(*words, f"--entrypoint={check[1]}", runtime_image, *check[2:])
    assert podman.run(*words, "--entrypoint=id", runtime_image, "-un").strip() == "flow"
    full = [*words, "--read-only", "--read-only-tmpfs=false"]  # nowhere to write to
    sick = subprocess.run(
        ["podman", *podman.OPTIONS, *full, f"--entrypoint={check[1]}", runtime_image, *check[2:]], capture_output=True
    )
    assert sick.returncode == 1 and b"Read-only file system" in sick.stderr
