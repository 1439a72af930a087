"""What is special to workers over SSH: what travels, what goes wrong with connections, and who ends when."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sshd import Sshd, login_processes, wait_for_end, wait_until_gone

import flowfn as flow
from flowfn.backends import registry
from flowfn.backends.ssh import SshBackend

Start = Callable[..., Sshd]


@pytest.fixture
def backend(ssh_server: Sshd) -> Iterator[SshBackend]:
    backend = SshBackend(ssh_server.url, config=str(ssh_server.config))
    yield backend
    flow.shutdown()
    backend.close()


@pytest.fixture
def made() -> Iterator[Callable[..., SshBackend]]:
    """Makes backends that are closed at the end."""
    backends: list[SshBackend] = []

    def make(server: Sshd, *others: Sshd, **options: Any) -> SshBackend:
        hosts = [server.url, *(other.url for other in others)]
        backends.append(SshBackend(hosts=hosts, config=str(server.config), **options))
        return backends[-1]

    yield make
    flow.shutdown()
    for backend in backends:
        backend.close()


def run(program: str, folder: Path, **environ: str) -> str:
    """What a program of the user's prints, in a project of its own."""
    folder.mkdir(exist_ok=True)
    (folder / "program.py").write_text(textwrap.dedent(program))
    command = [sys.executable, "program.py"]
    ended = subprocess.run(
        command, cwd=folder, env={**os.environ, **environ}, capture_output=True, text=True, timeout=100
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def configured(server: Sshd, home: Path) -> dict[str, str]:
    """The environment of a program whose backend "box" is that server."""
    home.mkdir(exist_ok=True)
    (home / "config.toml").write_text(
        f'backend = "box"\n[backends.box]\ntype = "ssh"\nhosts = ["{server.url}"]\nconfig = "{server.config}"\n'
    )
    return {"FLOW_HOME": str(home)}


# what travels


def test_a_project_goes_along(ssh_server: Sshd, tmp_path: Path) -> None:
    project = tmp_path / "project"
    (project / "package").mkdir(parents=True)
    (project / ".flowignore").write_text("left-out.txt\n")
    (project / "left-out.txt").write_text("secret")
    (project / "table.txt").write_text("1 2 3")
    (project / "package" / "__init__.py").write_text("")
    (project / "package" / "sums.py").write_text(
        "import flowfn as flow\n"
        "@flow.function\n"
        "def total(path):\n"
        "    import os\n"
        "    return sum(map(int, open(path).read().split())), __file__, os.path.exists('left-out.txt')\n"
    )
    program = "from package.sums import total; print(*total.remote('table.txt'), sep='\\n')"
    environ = configured(ssh_server, tmp_path / "home")
    total, file, left_out = run(program, project, **environ).splitlines()
    assert (total, left_out) == ("6", "False")
    assert file.startswith(str(ssh_server.root / "cache"))
    # A change is seen by the next worker.
    (project / "table.txt").write_text("4 5 6")
    assert run(program, project, **environ).splitlines()[0] == "15"


def test_only_changed_files_travel(ssh_server: Sshd, tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    unchanged = project / "unchanged.bin"
    unchanged.write_bytes(os.urandom(1 << 20))
    program = "import flowfn as flow\nf = flow.function(lambda: 1)\nprint(f.remote())\n"
    environ = configured(ssh_server, tmp_path / "home")
    run(program, project, **environ)
    blobs = ssh_server.root / "cache" / "projects" / "blobs"
    before = {path: path.stat().st_ino for path in blobs.rglob("*") if path.is_file()}
    (project / "new.txt").write_text("new")
    run(program, project, **environ)
    after = {path: path.stat().st_ino for path in blobs.rglob("*") if path.is_file()}
    assert before.items() <= after.items()
    assert [path.read_text() for path in after.keys() - before.keys()] == ["new"]


def test_the_client_is_there_for_functions_that_call_functions(backend: SshBackend) -> None:
    @flow.function
    def inner(x: int) -> tuple[int, int]:
        import os

        return x + 1, os.getpid()

    @flow.function(backend=backend)
    def outer(x: int) -> tuple[int, int, int]:
        import os

        value, pid = inner.remote(x)
        return value, pid, os.getpid()

    value, inner_pid, outer_pid = outer.remote(1)
    assert value == 2
    assert inner_pid != outer_pid


def test_secrets_are_on_no_command_line(backend: SshBackend) -> None:
    @flow.function(backend=backend, secrets={"TOKEN": "very-secret-value"}, env={"PLAIN": "another-value"})
    def f() -> tuple[str, str, list[str]]:
        import os
        import pathlib

        lines = []
        for entry in pathlib.Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    lines.append((entry / "cmdline").read_text(errors="replace"))
                except OSError:
                    continue
        return os.environ["TOKEN"], os.environ["PLAIN"], lines

    token, plain, lines = f.remote()
    assert (token, plain) == ("very-secret-value", "another-value")
    assert lines
    assert not any("very-secret" in line or "another-value" in line for line in lines)


def test_variables_that_count_at_the_start(backend: SshBackend) -> None:
    @flow.function(backend=backend, env={"PYTHONHASHSEED": "7"})
    def f() -> int:
        return hash("x")

    at_home = subprocess.run(
        ["/usr/bin/env", "PYTHONHASHSEED=7", sys.executable, "-c", "print(hash('x'))"], capture_output=True, text=True
    )
    assert f.remote() == int(at_home.stdout)


def test_mounts_are_the_hosts(backend: SshBackend, ssh_server: Sshd) -> None:
    (ssh_server.files / "table.txt").write_text("42")

    @flow.function(backend=backend, mounts={"/table": f"file://{ssh_server.files}", "/kept": "volume://over-ssh"})
    def f(text: str) -> tuple[str, list[str]]:
        import os

        with open("/kept/word", "a") as file:
            file.write(text)
        return open("/table/table.txt").read(), [open("/kept/word").read(), *sorted(os.listdir("/table"))]

    assert f.remote("one ") == ("42", ["one ", "table.txt"])
    assert f.remote("two") == ("42", ["one two", "table.txt"])
    assert list((ssh_server.root / "home").rglob("word"))


def test_a_bucket_is_staged_by_the_host(backend: SshBackend, ssh_server: Sshd, s3: Any) -> None:
    s3.put("in/a.txt", b"from the bucket")

    @flow.function(backend=backend, mounts={"/data": f"{s3.url}/in"}, env=s3.env)
    def f() -> str:
        return open("/data/a.txt").read()

    assert f.remote() == "from the bucket"


def test_what_staging_raises_is_the_calls_error(backend: SshBackend) -> None:
    @flow.function(backend=backend, mounts={"/data": "/no/such/directory"})
    def f() -> None: ...

    with pytest.raises(flow.DataNotFound, match="/no/such/directory"):
        f.remote()


# images


def test_an_environment_is_made_once(backend: SshBackend, ssh_server: Sshd) -> None:
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    image = flow.Image.python(version).env(MADE_BY="us").run("echo $MADE_BY $RANDOM >> $VIRTUAL_ENV/runs")

    @flow.function(backend=backend, image=image)
    def f() -> tuple[str, str, str]:
        import os
        import sys

        return sys.prefix, os.environ["MADE_BY"], open(f"{sys.prefix}/runs").read()

    prefix, made_by, runs = f.remote()
    assert prefix.startswith(str(ssh_server.root / "cache" / "environments"))
    assert (made_by, runs.split()[0]) == ("us", "us")
    assert f.options(max_workers=2).remote() == (prefix, made_by, runs)  # another worker, the same environment


def test_a_step_that_fails_is_named(backend: SshBackend, capfd: pytest.CaptureFixture[str]) -> None:
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    image = flow.Image.python(version).run("true").run("echo what was wrong >&2; exit 3")
    f = flow.function(backend=backend, image=image)(lambda: 1)
    with pytest.raises(flow.BackendError, match=r"step 2 of 2, run\(.*status 3\nwhat was wrong"):
        f.remote()
    assert "what was wrong" in capfd.readouterr().err


def test_images_of_another_python_or_of_containers_are_refused(backend: SshBackend) -> None:
    f = flow.function(backend=backend)(lambda: 1)
    other = f"{sys.version_info[0]}.{sys.version_info[1] + 1}"
    with pytest.raises(flow.VersionMismatch, match="the image has Python"):
        f.options(image=flow.Image.python(other)).remote()
    for image in ("docker.io/library/python:3.12", flow.Image.from_registry("python:3.12")):
        with pytest.raises(flow.ConfigError, match="no containers"):
            f.options(image=image).remote()


# connections


def test_one_connection_has_many_workers(ssh_servers: Start, made: Callable[..., SshBackend]) -> None:
    server = ssh_servers()
    f = flow.function(backend=made(server), max_workers=6)(lambda x: os.getpid())
    assert len(set(f.map(range(500)))) >= 1
    assert server.log().count("Accepted publickey") == 1


@pytest.mark.parametrize("sessions", [1, 2, 4])
def test_a_server_that_allows_few_sessions(ssh_servers: Start, made: Callable[..., SshBackend], sessions: int) -> None:
    server = ssh_servers(settings=f"MaxSessions {sessions}")

    @flow.function(backend=made(server), max_workers=5)
    def meet(place: str, count: int) -> int:
        import os
        import time

        open(f"{place}/{os.getpid()}", "w").close()
        while len(os.listdir(place)) < count:
            time.sleep(0.01)
        return os.getpid()

    calls = [meet.spawn(str(server.files), 5) for _ in range(5)]
    assert len({call.result(timeout=60) for call in calls}) == 5


def test_login_shells_that_talk(ssh_servers: Start, made: Callable[..., SshBackend]) -> None:
    server = ssh_servers(settings='ForceCommand echo "welcome to this machine"; eval "$SSH_ORIGINAL_COMMAND"')
    assert flow.function(backend=made(server))(lambda: 7).remote() == 7


def test_an_unknown_host_key_is_refused(ssh_servers: Start, made: Callable[..., SshBackend]) -> None:
    server = ssh_servers()
    server.known.write_text("")
    with pytest.raises(flow.BackendUnavailable, match="is not known here") as caught:
        flow.function(backend=made(server))(lambda: 1).remote()
    assert f"ssh -F {server.config} -p {server.port}" in str(caught.value)  # as it is configured
    assert server.known.read_text() == ""


def test_a_changed_host_key_is_refused(ssh_servers: Start, made: Callable[..., SshBackend]) -> None:
    server = ssh_servers()
    server.trust((server.root / "key.pub").read_text())
    with pytest.raises(flow.BackendUnavailable, match="another one than before") as caught:
        flow.function(backend=made(server))(lambda: 1).remote()
    assert f"ssh-keygen -R '[{server.address}]:{server.port}'" in str(caught.value)


def test_a_key_that_is_not_let_in(ssh_servers: Start, made: Callable[..., SshBackend]) -> None:
    server = ssh_servers()
    (server.root / "authorized").write_text("")
    with pytest.raises(flow.BackendUnavailable, match=r"does not let this user in \(publickey") as caught:
        flow.function(backend=made(server))(lambda: 1).remote()
    assert "ssh-add" in str(caught.value)


def test_nobody_listens(ssh_servers: Start, made: Callable[..., SshBackend]) -> None:
    server = ssh_servers()
    server.stop()
    with pytest.raises(flow.BackendUnavailable, match="refuses connections"):
        flow.function(backend=made(server))(lambda: 1).remote()


def test_no_such_configuration_file(ssh_server: Sshd) -> None:
    backend = SshBackend(ssh_server.url, config="/nowhere/config")
    with pytest.raises(flow.BackendUnavailable, match=r"can't read its configuration file /nowhere/config"):
        flow.function(backend=backend)(lambda: 1).remote()


def test_no_such_host() -> None:
    f = flow.function(backend="ssh://no-such-host.invalid")(lambda: 1)
    with pytest.raises(flow.BackendUnavailable, match="can't be resolved"):
        f.remote()


@pytest.mark.parametrize("address", ["ssh://", "ssh://-oProxyCommand=x", "ssh://a:b", "ssh://-l@host", "ssh://h/path"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(flow.ConfigError, match="no SSH address"):
        registry.get(address)


def test_no_python(ssh_servers: Start, made: Callable[..., SshBackend]) -> None:
    server = ssh_servers(PATH="/nonexistent")
    with pytest.raises(flow.BackendUnavailable, match="has no Python") as caught:
        flow.function(backend=made(server))(lambda: 1).remote()
    assert "uv" in str(caught.value)


def test_a_python_that_is_not_there(ssh_servers: Start, made: Callable[..., SshBackend]) -> None:
    backend = made(ssh_servers(), python="/opt/nowhere/python3")
    with pytest.raises(flow.BackendUnavailable, match=r"can't start .*/opt/nowhere/python3.*\n.*python=") as caught:
        flow.function(backend=backend)(lambda: 1).remote()
    assert "/opt/nowhere/python3" in caught.value.message.splitlines()[0]  # which is what `flow backends` shows


def test_another_python(ssh_servers: Start, made: Callable[..., SshBackend]) -> None:
    server = ssh_servers()
    other = server.files / "python3"
    # A real interpreter that says of itself what another version would.
    other.write_text(
        f"#!/bin/sh\nexec {server.interpreter()} -c "
        "'import sys; del sys.argv[1]; sys.version_info = (3, 9, 2); exec(sys.argv.pop(1))' \"$@\"\n"
    )
    other.chmod(0o755)
    with pytest.raises(flow.VersionMismatch, match=r"3\.9\.2") as caught:
        flow.function(backend=made(server, python=str(other)))(lambda: 1).remote()
    assert f"{sys.version_info[0]}.{sys.version_info[1]}" in str(caught.value)


def test_a_cache_that_can_not_be_written(ssh_servers: Start, made: Callable[..., SshBackend]) -> None:
    server = ssh_servers()
    with pytest.raises(flow.BackendUnavailable, match="can't be put in place") as caught:
        flow.function(backend=made(server, cache="/proc/flowfn"))(lambda: 1).remote()
    assert "cache=" in str(caught.value)


# ends


def test_a_lost_connection_is_a_lost_worker(ssh_servers: Start, made: Callable[..., SshBackend]) -> None:
    server = ssh_servers()

    @flow.function(backend=made(server))
    def wait(place: str) -> None:
        import time

        open(place, "w").close()
        time.sleep(1000)

    future = wait.spawn(f"{server.files}/running")
    server.wait_for(server.files / "running")
    workers = login_processes(server)
    server.crash()
    with pytest.raises((flow.WorkerLost, flow.BackendUnavailable)):
        future.result(timeout=60)
    wait_for_end(workers)


def test_calls_go_on_over_a_new_connection(ssh_servers: Start, made: Callable[..., SshBackend]) -> None:
    server = ssh_servers()
    pid = flow.function(backend=made(server))(lambda: os.getpid())
    first = pid.remote()
    workers = login_processes(server)
    server.crash()
    wait_for_end(workers)
    server.start()
    assert pid.remote() != first


def test_a_killed_client_leaves_nothing(ssh_servers: Start, tmp_path: Path) -> None:
    server = ssh_servers()
    (tmp_path / "program.py").write_text(
        "import flowfn as flow\n"
        "@flow.function\n"
        "def work(i):\n"
        "    import subprocess, time\n"
        "    subprocess.Popen(['setsid', 'sleep', '1000'])\n"
        f"    open('{server.files}/%d' % i, 'w').close()\n"
        "    time.sleep(1000)\n"
        "futures = [work.options(max_workers=3).spawn(i) for i in range(3)]\n"
        "futures[0].result()\n"
    )
    environ = {**os.environ, **configured(server, tmp_path / "home")}
    client = subprocess.Popen([sys.executable, "program.py"], cwd=tmp_path, env=environ)
    for name in "012":
        server.wait_for(server.files / name)
    client.kill()
    client.wait()
    wait_until_gone(server)
    assert not list((server.root / "cache" / "keepers").iterdir())


def test_a_killed_keeper_takes_the_workers_along(ssh_servers: Start, made: Callable[..., SshBackend]) -> None:
    server = ssh_servers()
    pid = flow.function(backend=made(server))(lambda: os.getpid())
    first = pid.remote()
    workers = login_processes(server)
    (keeper,) = (path.name.partition("-")[0] for path in (server.root / "cache" / "keepers").iterdir())
    os.kill(int(keeper), signal.SIGKILL)
    wait_for_end(workers)
    assert pid.remote() != first


def test_a_full_disk_there(ssh_servers: Start, made: Callable[..., SshBackend], tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("a small filesystem takes root")
    server = ssh_servers()
    project = tmp_path / "project"
    project.mkdir()
    (project / "large.bin").write_bytes(os.urandom(4 << 20))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m,mode=777", "tmpfs", server.root / "cache"], check=True)
    try:
        program = """
            import flowfn as flow
            try:
                flow.function(lambda: 1).remote()
            except flow.FlowError as error:
                print(error)
            """
        assert "is full" in run(program, project, **configured(server, tmp_path / "home"))
    finally:
        server.stop()
        subprocess.run(["umount", "--lazy", server.root / "cache"], check=True)


def test_the_sessions_end_with_the_backend(ssh_servers: Start, made: Callable[..., SshBackend]) -> None:
    server = ssh_servers()
    backend = made(server)
    assert flow.function(backend=backend)(lambda: 1).remote() == 1
    flow.shutdown()
    backend.close()
    wait_until_gone(server)


# several machines


def test_work_is_spread_over_machines(ssh_servers: Start, made: Callable[..., SshBackend]) -> None:
    one, two = ssh_servers(hostname="gpu-one", subnet=1), ssh_servers(hostname="gpu-two", subnet=2)
    two.trust_also(one)

    @flow.function(backend=made(two, one), max_workers=4)
    def where(place: str) -> str:
        import os
        import time

        open(f"{place}/{os.getpid()}-{os.uname().nodename}", "w").close()
        while len(os.listdir(place)) < 4:
            time.sleep(0.01)
        return os.uname().nodename

    place = two.root / "shared"
    place.mkdir()
    place.chmod(0o777)
    futures = [where.spawn(str(place)) for _ in range(4)]
    assert sorted(future.result(timeout=60) for future in futures) == ["gpu-one", "gpu-one", "gpu-two", "gpu-two"]


def test_a_machine_with_the_right_gpu_is_found(ssh_servers: Start, made: Callable[..., SshBackend]) -> None:
    one = ssh_servers(hostname="gpu-one", subnet=1, FLOW_GPUS="a100:2")
    two = ssh_servers(hostname="gpu-two", subnet=2, FLOW_GPUS="h100:1")
    two.trust_also(one)
    backend = made(two, one)

    def where() -> tuple[str, str]:
        import os

        return os.uname().nodename, os.environ["CUDA_VISIBLE_DEVICES"]

    f = flow.function(backend=backend, gpu="a100:2")(where)
    assert f.remote() == ("gpu-one", "0,1")
    assert f.options(gpu="h100").remote() == ("gpu-two", "0")
    with pytest.raises(flow.ResourceUnavailable, match=r"none of the hosts fits.*a100"):
        f.options(gpu="h100:2").remote()


def test_a_machine_that_is_down_does_not_stop_the_others(ssh_servers: Start, made: Callable[..., SshBackend]) -> None:
    one, two = ssh_servers(hostname="gpu-one", subnet=1), ssh_servers()
    two.trust_also(one)
    one.stop()
    backend = made(two, one)
    f = flow.function(backend=backend)(lambda: os.uname().nodename)
    assert f.remote() == os.uname().nodename


def test_a_network_that_comes_back(ssh_servers: Start, made: Callable[..., SshBackend]) -> None:
    server = ssh_servers(hostname="gpu-one", subnet=1)

    @flow.function(backend=made(server))
    def work(place: str) -> str:
        import os
        import time

        open(f"{place}/running", "w").close()
        while not os.path.exists(f"{place}/go"):
            time.sleep(0.01)
        return os.uname().nodename

    future = work.spawn(str(server.files))
    server.wait_for(server.files / "running")
    server.link(up=False)
    (server.files / "go").touch()  # the result is sent into the cut
    server.link(up=True)
    assert future.result(timeout=60) == "gpu-one"


def test_a_network_that_is_gone_for_good(ssh_servers: Start, made: Callable[..., SshBackend]) -> None:
    server = ssh_servers(hostname="gpu-one", subnet=1)

    @flow.function(backend=made(server, silence=6, alive_interval=1, connect_timeout=2))
    def work(place: str) -> None:
        import time

        open(f"{place}/running", "w").close()
        time.sleep(1000)

    future = work.spawn(str(server.files))
    server.wait_for(server.files / "running")
    server.link(up=False)
    # The client gives the machine up, and the machine the client.
    with pytest.raises((flow.WorkerLost, flow.BackendUnavailable)):
        future.result(timeout=60)
    wait_until_gone(server, also_sshd=False)


def test_the_documentation_runs_as_it_stands(ssh_server: Sshd, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "ssh.md").read_text()
    blocks = re.findall(r"```python no-run\n(.*?)```", page, re.DOTALL)
    said = run("\n".join(blocks), tmp_path / "page", **configured(ssh_server, tmp_path / "home"))
    assert said.split("\n") == ["10.0", "[10.0, 5.0, 2.0]", ""]
