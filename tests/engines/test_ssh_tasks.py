"""Tasks on SSH hosts: who may die meanwhile, what is said while a host can't be reached, and the commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sshd import Sshd, wait_for_end

import flowfn as flow
from flowfn.backends.ssh import SshBackend
from flowfn.client import Flow
from flowfn.task import Task
from flowfn.testing import Meeting

WAIT_S = 60.0
FLOW = [sys.executable, "-c", "import sys; from flowfn.cli import main; sys.exit(main())"]
Start = Callable[..., Sshd]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "project"
    root.mkdir()
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def made(project: Path) -> Iterator[Callable[..., SshBackend]]:
    """Makes backends; what their tasks leave is ended."""
    backends: list[SshBackend] = []

    def make(*servers: Sshd, **options: Any) -> SshBackend:
        hosts = [server.url for server in servers]
        backends.append(SshBackend(hosts=hosts, config=str(servers[0].config), **options))
        return backends[-1]

    yield make
    flow.shutdown()
    for backend in backends:
        backend.close()


def make_work(meeting: Meeting) -> Callable[[], str]:
    meet = meeting.meet

    def work() -> str:
        print("begun", flush=True)
        meet(str(__import__("os").getpid())).recv(1)
        print("let go")
        return "done"

    return work


def directory(server: Sshd, task: Task) -> Path:
    return server.root / "home" / "tasks" / f"{task.task_id}r"


def logins(server: Sshd) -> int:
    return server.log().count("Accepted publickey")


class TestLosing:
    def test_the_server_while_a_task_runs(
        self, ssh_servers: Start, made: Callable[..., SshBackend], meeting: Meeting
    ) -> None:
        server = ssh_servers()
        task = flow.function(make_work(meeting), backend=made(server)).submit()  # type: ignore[call-overload]
        met = meeting.next()
        lines = task.logs(follow=True)
        assert next(lines) == "begun\n"
        task.wait_started(WAIT_S)  # it has begun before the host's register says so, and that is what is known then
        ended: list[Task] = []
        # Not in any time: a host that does not answer is asked again after ever longer pauses.
        waiting = threading.Thread(target=lambda: ended.append(task.wait()), daemon=True)
        waiting.start()
        server.crash()
        other = Task.get(task.task_id)
        assert other.status == "running"
        assert "when ssh://" in other.reason and "answered last" in other.reason
        assert json.loads(flow_command("ps", "--json").stdout)[0]["state"] == "running"
        met.let_go()
        met.wait_for_end()
        server.start()
        waiting.join(4 * WAIT_S)
        assert ended and ended[0].status == "completed" and ended[0].reason == ""
        assert list(lines) == ["let go\n"]
        assert task.result() == "done"

    def test_a_client_that_is_killed_while_it_submits(
        self, ssh_server: Sshd, project: Path, flow_home: Path, made: Callable[..., SshBackend]
    ) -> None:
        (project / "program.py").write_text(
            textwrap.dedent(
                f"""
                import flowfn as flow
                from flowfn.backends.ssh import SshBackend
                backend = SshBackend({ssh_server.url!r}, config={str(ssh_server.config)!r})
                flow.function(len, backend=backend).submit(b"x" * (100 << 20))
                """
            )
        )
        made(ssh_server)
        client = subprocess.Popen([sys.executable, "program.py"], cwd=project)
        with Flow() as flow_client:
            while not (tasks := flow_client.list_tasks()):
                assert client.poll() is None
            assert tasks[0].status == "pending"
            client.send_signal(signal.SIGKILL)
            client.wait()
            task = tasks[0].wait(WAIT_S)
        # It came as far as it came; nobody is left waiting.
        if task.status == "failed":
            assert "its submission was interrupted" in task.reason
        else:
            assert task.result() == 100 << 20

    def test_the_supervisor(self, ssh_server: Sshd, made: Callable[..., SshBackend], meeting: Meeting) -> None:
        task = flow.function(make_work(meeting), backend=made(ssh_server)).submit()  # type: ignore[call-overload]
        met = meeting.next()
        os.kill(int((directory(ssh_server, task) / "pid").read_text()), signal.SIGKILL)
        assert task.wait(WAIT_S).status == "failed"
        assert task.reason == "its supervisor was killed"
        met.wait_for_end()
        with pytest.raises(flow.FlowError, match="its supervisor was killed"):
            task.result()
        assert task.logs() == "begun\n"

    def test_a_host_that_was_never_there(self, ssh_servers: Start, made: Callable[..., SshBackend]) -> None:
        server = ssh_servers()
        server.crash()
        with pytest.raises(flow.BackendUnavailable, match="no SSH server listens"):
            flow.function(len, backend=made(server)).submit([])
        with Flow() as client:
            assert client.list_tasks() == []


class TestHosts:
    def test_without_sandboxes(
        self, ssh_servers: Start, made: Callable[..., SshBackend], meeting: Meeting, tmp_path: Path
    ) -> None:
        """Where no sandbox can be made and none is needed, the task runs as it is, and all of it ends."""
        server = ssh_servers()
        programs = server.root / "programs"
        programs.mkdir()
        for folder in ("/bin", "/usr/bin"):
            for name in os.listdir(folder):
                if name != "bwrap" and not (programs / name).is_symlink():
                    (programs / name).symlink_to(f"{folder}/{name}")
        server.crash()
        server.environ["PATH"] = str(programs)
        server.start()
        backend = made(server)
        task = flow.function(make_work(meeting), backend=backend).submit()  # type: ignore[call-overload]
        met = meeting.next()
        pid = int(met.said)  # as the host sees it: there is no namespace
        assert str(directory(server, task)) in os.readlink(f"/proc/{pid}/cwd")
        os.kill(int((directory(server, task) / "pid").read_text()), signal.SIGKILL)
        assert task.wait(WAIT_S).reason == "its supervisor was killed"
        met.wait_for_end()
        with Flow() as client:
            busy = client.submit("setsid sleep 300 & echo $!; sleep 300", backend=backend)
            other = int(next(busy.logs(follow=True)))
            assert busy.cancel("enough").wait(WAIT_S).reason == "enough"
        wait_for_end([other])
        with pytest.raises(flow.SandboxError, match="bwrap"):
            flow.function(len, backend=backend, mounts={"/data": str(tmp_path)}).submit([])

    def test_several_hosts_share_the_tasks(
        self, ssh_server: Sshd, ssh_servers: Start, made: Callable[..., SshBackend], meeting: Meeting
    ) -> None:
        other = ssh_servers(FLOW_GPUS="b200:1")
        ssh_server.trust_also(other)
        backend = made(ssh_server, other)
        work = flow.function(make_work(meeting), backend=backend)  # type: ignore[call-overload]
        tasks = [work.submit() for _ in range(4)]
        assert sorted(task.backend for task in tasks) == sorted([f"ssh://{s.url[6:]}" for s in (ssh_server, other)] * 2)
        on_gpu = flow.function(lambda: 5, backend=backend, gpu="b200").submit()
        assert on_gpu.result(WAIT_S) == 5 and on_gpu.backend == other.url
        for _ in tasks:
            meeting.next().let_go()
        assert [task.result(WAIT_S) for task in tasks] == ["done"] * 4
        with pytest.raises(flow.ResourceUnavailable, match="none of the hosts"):
            flow.function(len, backend=backend, gpu="a100:7").submit([])

    def test_order(self, ssh_server: Sshd, made: Callable[..., SshBackend], meeting: Meeting) -> None:
        backend = made(ssh_server)
        first = flow.function(make_work(meeting), backend=backend).submit()  # type: ignore[call-overload]
        with Flow() as client:
            second = client.submit("echo second", backend=backend, depends_on=[first])
            here = client.submit("sleep 300")
            with pytest.raises(flow.ValidationError, match="is on local"):
                client.submit("echo never", backend=backend, depends_on=[here])
            here.cancel().wait(WAIT_S)
        assert second.status == "pending"
        meeting.next().let_go()
        assert second.wait(WAIT_S).logs() == "second\n"
        assert (first.ended_at or 0) <= (second.started_at or 0)


def flow_command(*words: str, code: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*FLOW, *words], capture_output=True, text=True, timeout=WAIT_S, **options)
    assert done.returncode == code, done.stderr
    return done


class TestCommand:
    @pytest.fixture(autouse=True)
    def configured(self, ssh_server: Sshd, flow_home: Path, project: Path) -> None:
        flow_home.mkdir()
        (flow_home / "config.toml").write_text(
            f'[backends.box]\ntype = "ssh"\nurl = "{ssh_server.url}"\nconfig = "{ssh_server.config}"\n'
        )
        (project / "module.py").write_text("def triple(x):\n    print('tripling', x)\n    return 3 * x\n")

    def test_run_and_all_others(self, ssh_server: Sshd) -> None:
        done = flow_command("run", "--backend", "box", "echo out; echo err >&2; cat module.py | wc -l; exit 4", code=4)
        assert done.stdout == "out\n3\n" and "err\n" in done.stderr
        value = flow_command("run", "--backend", "box", "module.py::triple", "14")
        assert value.stdout == "tripling 14\n42\n"
        task_id = flow_command("run", "--backend", "box", "--detach", "-n", "long", "echo up; sleep 300").stdout.strip()
        listed = json.loads(flow_command("ps", "--json").stdout)
        assert next((row["id"], row["backend"]) for row in listed) == (task_id, ssh_server.url)
        assert ssh_server.url in flow_command("ps").stdout and ssh_server.url in flow_command("status", "long").stdout
        with subprocess.Popen([*FLOW, "logs", "-f", "long"], stdout=subprocess.PIPE, text=True) as following:
            assert following.stdout and following.stdout.readline() == "up\n"
            flow_command("cancel", "long")
            assert following.stdout.read() == ""
        assert json.loads(flow_command("status", "long", "--json").stdout)["state"] == "cancelled"
        flow_command("wait", "long", code=1)
        assert "only tasks of this host can be entered" in flow_command("shell", "long", code=1).stderr
        assert "is on this host" in flow_command("dev", "--backend", "box", code=2).stderr
        assert flow_command("result", "module-triple").stdout == "42\n"
        flow_command("rm", "module-triple", "long")
        assert not any(task_id in path.name for path in (ssh_server.root / "home" / "tasks").iterdir())

    def test_one_question_for_all_tasks(self, ssh_server: Sshd) -> None:
        with Flow() as client:
            tasks = [client.submit("sleep 300", backend="box") for _ in range(4)]
            client.submit("true", backend="box").wait(WAIT_S)
        before = logins(ssh_server)
        assert len(json.loads(flow_command("ps", "--json").stdout)) == 5
        assert logins(ssh_server) == before + 1
        for task in tasks:
            task.cancel()
        for task in tasks:
            task.wait(WAIT_S)
        before = logins(ssh_server)
        assert {row["state"] for row in json.loads(flow_command("ps", "--json").stdout)} == {"cancelled", "completed"}
        assert logins(ssh_server) == before
