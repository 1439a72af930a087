"""Tasks on a Slurm cluster from outside: who may die meanwhile, and what a fresh client finds."""

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
from slurm_cluster import SlurmCluster, find
from sshd import Sshd
from test_slurm import wait_until
from test_slurm_login import options

import flowfn as flow
from flowfn.client import Flow
from flowfn.task import Task
from flowfn.testing import Meeting
from flowfn_runtime.slurmstate import NAME

WAIT_S = 60.0
FLOW = [sys.executable, "-c", "import sys; from flowfn.cli import main; sys.exit(main())"]


@pytest.fixture
def login(
    slurm_cluster: SlurmCluster,
    ssh_servers: Callable[..., Sshd],
    tmp_path: Path,
    flow_home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Sshd]:
    """The login node, configured as the backend `cluster`. This process knows nothing of Slurm itself."""
    server = ssh_servers(**slurm_cluster.environ)
    monkeypatch.delenv("SLURM_CONF")
    project = tmp_path / "project"
    project.mkdir()
    (project / "module.py").write_text("def triple(x):\n    print('tripling', x)\n    return 3 * x\n")
    monkeypatch.chdir(project)
    flow_home.mkdir(exist_ok=True)
    there = {"cache": f"{server.root}/cache", "home": f"{server.root}/home", "python": server.interpreter()}
    said = {"type": "slurm", "login": server.url, "ssh_config": str(server.config), **there}
    lines = [f"{name} = {json.dumps(value)}\n" for name, value in said.items()]
    (flow_home / "config.toml").write_text("[backends.cluster]\n" + "".join(lines))
    yield server
    flow.shutdown()
    for number in slurm_cluster.jobs():
        slurm_cluster.run("scancel", "-Q", number, check=False)
    wait_until(lambda: slurm_cluster.jobs() == [])


def submit(meeting: Meeting, backend: Any = "cluster", **options: Any) -> Task:
    meet = meeting.meet

    def work() -> str:
        import os

        print("begun", flush=True)
        meet(f"{os.environ['SLURM_JOB_ID']} {os.environ['SLURMD_NODENAME']}").recv(1)
        print("let go")
        return "done"

    task: Task = flow.function(work, backend=backend, **options).submit()
    return task


def flow_command(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*FLOW, *words], capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == code, done.stderr
    return done


def replace_sbatch(server: Sshd, script: str) -> None:
    """Have the login node's users get another sbatch, in whose text {sbatch} is the real one."""
    programs = server.files / "programs"
    programs.mkdir(exist_ok=True)
    (programs / "sbatch").write_text(f"#!/bin/sh\n{script.format(sbatch=find('sbatch'), files=server.files)}\n")
    (programs / "sbatch").chmod(0o755)
    server.stop()
    server.environ["PATH"] = f"{programs}:/usr/bin:/bin"
    server.start()


def test_all_commands(login: Sshd, slurm_cluster: SlurmCluster) -> None:
    done = flow_command("run", "--backend", "cluster", "echo out; echo err >&2; cat module.py | wc -l; exit 4", code=4)
    assert done.stdout == "out\n3\n" and "err\n" in done.stderr
    value = flow_command("run", "--backend", "cluster", "module.py::triple", "14")
    assert value.stdout == "tripling 14\n42\n"
    task_id = flow_command("run", "--backend", "cluster", "--detach", "-n", "long", "echo up; sleep 300").stdout.strip()
    (row,) = (row for row in json.loads(flow_command("ps", "--json").stdout) if row["id"] == task_id)
    assert row["backend"] == login.url.replace("ssh://", "slurm://")
    with subprocess.Popen([*FLOW, "logs", "-f", "long"], stdout=subprocess.PIPE, text=True) as following:
        assert following.stdout and following.stdout.readline() == "up\n"
        flow_command("cancel", "long")
        assert following.stdout.read() == ""
    flow_command("wait", "long", code=1)
    assert json.loads(flow_command("status", "long", "--json").stdout)["state"] == "cancelled"
    assert flow_command("result", "module-triple").stdout == "42\n"
    assert flow_command("logs", "module-triple").stdout == "tripling 14\n"
    flow_command("rm", "module-triple", "long")
    assert not any(task_id in path.name for path in (login.root / "home" / "jobs").iterdir())


def test_whose_job_it_is(login: Sshd, slurm_cluster: SlurmCluster) -> None:
    def where() -> tuple[str, int, str]:
        return os.environ["SLURM_JOB_ID"], os.getuid(), os.environ["CUDA_VISIBLE_DEVICES"]

    task = flow.function(where, backend="cluster", gpu="h100").submit()
    number, user, gpus = task.result(WAIT_S)
    assert number.isdigit() and gpus == "0"
    assert user == os.stat(login.files).st_uid
    with pytest.raises(flow.ResourceUnavailable, match="through the login node"):
        task.get_instances()
    with pytest.raises(flow.ResourceUnavailable, match="no node of the cluster"):
        flow.function(where, backend="cluster", gpu="b200").submit()
    with pytest.raises(flow.ResourceUnavailable, match="no such node"):
        flow.function(len, backend=options(login, extra=["--nodelist=n77"])).submit([])
    with Flow() as client:
        assert [other.task_id for other in client.list_tasks()] == [task.task_id]


def test_order(login: Sshd, meeting: Meeting) -> None:
    first = submit(meeting)
    with Flow() as client:
        second = client.submit("echo second", backend="cluster", depends_on=[first])
    met = meeting.next()
    wait_until(lambda: "Dependency" in second.reason)
    met.let_go()
    assert second.wait(WAIT_S).logs() == "second\n"
    assert (first.ended_at or 0) <= (second.started_at or 0)


def test_one_task_at_a_time_has_a_volume(login: Sshd, meeting: Meeting) -> None:
    with Flow() as client:
        client.submit("true", backend="cluster", mounts={"/kept": "volume://kept"}).wait(WAIT_S)
        first = submit(meeting, mounts={"/kept": "volume://kept"})
        met = meeting.next()
        (volume,) = (path.name for path in (login.root / "home" / "volumes").iterdir() if path.is_dir())
        second = client.submit("echo second", backend="cluster", mounts={"/kept": f"volume://{volume}"})
    wait_until(lambda: "Dependency" in second.reason)
    met.let_go()
    assert second.wait(WAIT_S).logs() == "second\n"
    assert (first.ended_at or 0) <= (second.started_at or 0)


def test_a_client_that_is_killed_after_it_submitted(login: Sshd, meeting: Meeting, tmp_path: Path) -> None:
    port = meeting._listener.getsockname()[1]
    program = f"""
        import sys
        import flowfn as flow
        def work():
            import socket
            connection = socket.create_connection(("127.0.0.1", {port}))
            connection.sendall(b"here\\n")
            print("begun", flush=True)
            connection.recv(1)
            return "done"
        task = flow.function(work, backend="cluster").submit()
        print(task.task_id, flush=True)
        task.result()
    """
    (tmp_path / "project" / "program.py").write_text(textwrap.dedent(program))
    with subprocess.Popen([sys.executable, "program.py"], stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout
        task_id = client.stdout.readline().strip()
        met = meeting.next()
        client.send_signal(signal.SIGKILL)
    assert json.loads(flow_command("ps", "--json").stdout)[0]["state"] == "running"
    met.let_go()
    flow_command("wait", task_id)
    assert flow_command("result", task_id).stdout == "done\n"
    assert flow_command("logs", task_id).stdout == "begun\n"


def test_a_client_that_is_killed_while_it_submits(login: Sshd, slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    program = 'import flowfn as flow\nflow.function(len, backend="cluster").submit(b"x" * (100 << 20))\n'
    (tmp_path / "project" / "program.py").write_text(program)
    client = subprocess.Popen([sys.executable, "program.py"])
    with Flow() as flow_client:
        while not (tasks := flow_client.list_tasks()):
            assert client.poll() is None
        client.send_signal(signal.SIGKILL)
        client.wait()
        task = tasks[0].wait(WAIT_S)
    # It came as far as it came; nobody is left waiting.
    if task.status == "failed":
        assert "its submission was interrupted" in task.reason
    else:
        assert task.result() == 100 << 20


def test_a_connection_that_is_cut(login: Sshd, meeting: Meeting) -> None:
    task = submit(meeting)
    met = meeting.next()
    lines = task.logs(follow=True)
    assert next(lines) == "begun\n" and task.wait_started(WAIT_S).status == "running"
    ended: list[Task] = []
    waiting = threading.Thread(target=lambda: ended.append(task.wait(WAIT_S)))
    waiting.start()
    login.crash()
    other = Task.get(task.task_id)
    assert other.status == "running" and "when slurm://" in other.reason and "answered last" in other.reason
    met.let_go()
    met.wait_for_end()
    login.start()
    waiting.join()
    assert ended and ended[0].status == "completed" and ended[0].reason == ""
    assert list(lines) == ["let go\n"]
    assert task.result() == "done"


def test_a_connection_that_is_cut_while_slurm_takes_the_job(login: Sshd, slurm_cluster: SlurmCluster) -> None:
    # What asks sbatch on the login node is killed once it has been asked, before it could say so.
    replace_sbatch(login, '{sbatch} "$@" || exit; mkdir {files}/killed 2>&- && kill -9 $PPID')
    task = flow.function(len, backend="cluster").submit([1, 2])
    assert task.result(WAIT_S) == 2
    assert (login.files / "killed").is_dir()
    jobs = slurm_cluster.run("squeue", "-h", "-t", "all", f"--name={NAME}{task.task_id}", "-o", "%A").split()
    assert len(jobs) == 1


def test_a_connection_that_is_cut_before_slurm_was_asked(login: Sshd, slurm_cluster: SlurmCluster) -> None:
    replace_sbatch(login, "kill -9 $PPID")
    with pytest.raises(flow.BackendUnavailable) as caught:
        flow.function(len, backend="cluster").submit([])
    assert caught.value.uncertain
    with Flow() as client:
        (task,) = client.list_tasks()
    assert task.status == "pending" and task.reason == "it is being submitted"
    (mark,) = (login.root / "home" / "jobs").glob(f"{task.task_id}/submitted")
    os.utime(mark, (0, 0))  # as if that was long ago
    assert task.status == "failed" and "who submitted it was interrupted" in task.reason
    assert slurm_cluster.jobs() == []


def test_the_supervisor(login: Sshd, meeting: Meeting) -> None:
    task = submit(meeting)
    met = meeting.next()
    os.kill(int((login.root / "home" / "jobs" / task.task_id / "pid").read_text()), signal.SIGKILL)
    assert task.wait(WAIT_S).status == "failed" and "Slurm job" in task.reason
    met.wait_for_end()
    assert task.logs() == "begun\n"


def test_a_login_node_without_slurm(ssh_servers: Callable[..., Sshd], login: Sshd) -> None:
    other = ssh_servers()
    other.stop()
    programs = other.files / "programs"
    programs.mkdir()
    for name in ("sh", "python3"):
        (programs / name).symlink_to(f"/usr/bin/{name}")
    other.environ["PATH"] = str(programs)
    other.start()
    with pytest.raises(flow.BackendUnavailable, match="there is no sinfo"):
        flow.function(len, backend=options(other)).submit([])
    with Flow() as client:
        assert client.list_tasks() == []
