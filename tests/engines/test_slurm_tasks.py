"""Tasks as Slurm jobs: the queue, what happens to jobs from outside, and daemons that die."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import SlurmCluster, find

import flowfn as flow
from flowfn.backends.slurm import SlurmBackend
from flowfn.client import Flow
from flowfn.task import Task
from flowfn.testing import Meeting
from flowfn_runtime.slurmsays import Job
from flowfn_runtime.slurmstate import NAME, judge

WAIT_S = 60.0


@pytest.fixture
def cluster(slurm_cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    yield slurm_cluster
    with Flow() as client:
        for task in client.list_tasks(status=["pending", "running"], limit=None):
            task.cancel().wait(WAIT_S)
    wait_until(lambda: slurm_cluster.jobs() == [])


@pytest.fixture
def backend(cluster: SlurmCluster) -> SlurmBackend:
    return SlurmBackend(cluster.options())


def wait_until(happened: Callable[[], bool]) -> None:
    """Asks Slurm again and again: it tells nobody by itself."""
    deadline = time.monotonic() + 2 * WAIT_S
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def batch_of(cluster: SlurmCluster, task: Task) -> list[Path]:
    """The processes of a task's batch script on its node: the supervisor, and Slurm's own above it."""
    pid = (directory(cluster, task) / "pid").read_text()
    return [Path(f"/proc/{pid}"), Path(f"/proc/{Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[1]}")]


def start_again(cluster: SlurmCluster, number: str, batch: list[Path]) -> None:
    """Have a job run that was requeued; by itself it waits for two minutes, until nothing of it is left for sure."""

    def runs() -> bool:
        cluster.run("scontrol", "update", f"jobid={number}", "StartTime=now", check=False)
        return "RUNNING" in cluster.run("squeue", "-h", "-j", number, "-o", "%T")

    wait_until(lambda: not any(path.exists() for path in batch))
    wait_until(runs)


def make_work(meeting: Meeting) -> Callable[[], str]:
    meet = meeting.meet

    def work() -> str:
        import os

        print("begun", flush=True)
        told = meet(f"{os.environ['SLURM_JOB_ID']} {os.environ['SLURMD_NODENAME']}").recv(1)
        return "done" if told else "alone"

    return work


def submit(meeting: Meeting, backend: Any, **options: Any) -> Task:
    task: Task = flow.function(make_work(meeting), backend=backend, **options).submit()
    return task


def opens(pid: int, path: Path) -> bool:
    try:
        return any(entry.samefile(path) for entry in Path(f"/proc/{pid}/fd").iterdir())
    except FileNotFoundError:  # of what it has closed meanwhile
        return False


def directory(cluster: SlurmCluster, task: Task) -> Path:
    return cluster.root / "home" / "jobs" / task.task_id


class TestQueue:
    def test_why_a_task_waits(self, cluster: SlurmCluster, meeting: Meeting) -> None:
        backend = SlurmBackend(cluster.options(partition="cpu", extra=["--exclusive"]))
        first, second = submit(meeting, backend), submit(meeting, backend)
        met = meeting.next()
        wait_until(lambda: "Resources" in second.reason)
        assert second.status == "pending" and "waits in the queue" in second.reason
        third = submit(meeting, backend)
        assert third.cancel("not needed").wait(WAIT_S).status == "cancelled"
        assert third.reason == "not needed" and third.started_at is None
        met.let_go()
        meeting.next().let_go()
        assert [first.result(WAIT_S), second.result(WAIT_S)] == ["done", "done"]

    def test_what_slurm_refuses(self, cluster: SlurmCluster) -> None:
        with pytest.raises(flow.ResourceUnavailable, match="no such node"):
            flow.function(len, backend=cluster.options(extra=["--nodelist=n77"])).submit([])
        with pytest.raises(flow.ResourceUnavailable, match="no node of the cluster"):
            flow.function(len, backend=cluster.options(), gpu="b200").submit([])
        with Flow() as client:
            assert client.list_tasks() == []

    def test_a_job_that_would_wait_for_ever(self, cluster: SlurmCluster) -> None:
        task = flow.function(len, backend=cluster.options(partition="physics")).submit([])
        wait_until(lambda: "and would for ever: " in task.reason)
        assert task.status == "pending"
        task.cancel().wait(WAIT_S)

    def test_order(self, cluster: SlurmCluster, backend: SlurmBackend, meeting: Meeting) -> None:
        first = submit(meeting, backend)
        with Flow() as client:
            second = client.submit("echo second", backend=backend, depends_on=[first])
        met = meeting.next()
        wait_until(lambda: "Dependency" in second.reason)
        met.let_go()
        assert second.wait(WAIT_S).logs() == "second\n"

    def test_one_task_at_a_time_has_a_volume(
        self, cluster: SlurmCluster, backend: SlurmBackend, meeting: Meeting
    ) -> None:
        first = submit(meeting, backend, mounts={"/kept": "volume://kept"})
        met = meeting.next()
        (volume,) = (path.name for path in (cluster.root / "home" / "volumes").iterdir() if path.is_dir())
        by_id = submit(meeting, backend, mounts={"/kept": f"volume://{volume}"})
        by_name = submit(meeting, backend, mounts={"/kept": "volume://kept"})
        wait_until(lambda: "Dependency" in by_id.reason and "Dependency" in by_name.reason)
        met.let_go()
        second = meeting.next()
        assert first.wait(WAIT_S).status == "completed" and by_name.status == "pending"
        second.let_go()
        meeting.next().let_go()
        assert [by_id.result(WAIT_S), by_name.result(WAIT_S)] == ["done", "done"]

    def test_one_question_for_all_tasks(
        self, cluster: SlurmCluster, backend: SlurmBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with Flow() as client:
            tasks = [client.submit("sleep 300", backend=backend) for _ in range(4)]
            programs, asked = tmp_path / "programs", tmp_path / "asked"
            programs.mkdir()
            for name in ("squeue", "sacct", "scontrol"):
                (programs / name).write_text(f'#!/bin/sh\necho {name} >>{asked}\nexec {find(name)} "$@"\n')
                (programs / name).chmod(0o755)
            monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
            assert {task.task_id for task in client.list_tasks()} == {task.task_id for task in tasks}
            assert asked.read_text().split() == ["squeue"]
            for task in tasks:
                task.cancel()
            for task in tasks:
                assert task.wait(WAIT_S).status == "cancelled"
            asked.write_text("")
            assert len(client.list_tasks()) == 4
            assert asked.read_text() == ""


class TestFromOutside:
    def test_scancel(self, cluster: SlurmCluster, backend: SlurmBackend, meeting: Meeting) -> None:
        task = submit(meeting, backend)
        met = meeting.next()
        cluster.run("scancel", met.said.split()[0])
        assert task.wait(WAIT_S).status == "cancelled"
        assert "was cancelled from outside" in task.reason
        met.wait_for_end()
        with pytest.raises(flow.CallCancelled, match="from outside"):
            task.result()

    def test_scancel_of_a_job_that_waits(self, cluster: SlurmCluster, meeting: Meeting) -> None:
        backend = SlurmBackend(cluster.options(extra=["--hold"]))
        task = submit(meeting, backend)
        assert task.status == "pending"
        cluster.run("scancel", f"--name={NAME}{task.task_id}")
        assert task.wait(WAIT_S).status == "cancelled" and "from outside" in task.reason

    def test_a_requeued_job_runs_again(self, cluster: SlurmCluster, backend: SlurmBackend, meeting: Meeting) -> None:
        task = submit(meeting, backend)
        met = meeting.next()
        number, batch = met.said.split()[0], batch_of(cluster, task)
        cluster.run("scontrol", "requeue", number)
        met.wait_for_end()
        wait_until(lambda: task.status != "running")
        assert task.status == "pending", task
        start_again(cluster, number, batch)
        meeting.next().let_go()
        assert task.result(WAIT_S) == "done"
        assert task.to_dict()["attempts"] == 2 and task.logs(tail=None) == "begun\nbegun\n"

    def test_a_preempted_job_runs_again_if_the_cluster_requeues(self, cluster: SlurmCluster, meeting: Meeting) -> None:
        words = ("Nodes=n3", "PriorityTier=1", "State=UP", "PreemptMode=REQUEUE", "GraceTime=0")
        cluster.run("scontrol", "create", "PartitionName=again", *words)
        task = submit(meeting, SlurmBackend(cluster.options(partition="again", extra=["--exclusive"])))
        met = meeting.next()
        number, batch = met.said.split()[0], batch_of(cluster, task)
        urgent = ["srun", "-p", "urgent", "--exclusive", "--mem=0", "true"]
        subprocess.run(urgent, env={**os.environ, **cluster.environ}, check=True, timeout=WAIT_S)
        met.wait_for_end()
        wait_until(lambda: task.status != "running")
        assert task.status == "pending", task
        start_again(cluster, number, batch)
        meeting.next().let_go()
        assert task.result(WAIT_S) == "done"

    def test_a_preempted_job_that_the_cluster_cancels(self, cluster: SlurmCluster, meeting: Meeting) -> None:
        task = submit(meeting, SlurmBackend(cluster.options(partition="cpu", extra=["--exclusive"])))
        met = meeting.next()
        urgent = ["srun", "-p", "urgent", "--exclusive", "--mem=0", "true"]
        subprocess.run(urgent, env={**os.environ, **cluster.environ}, check=True, timeout=WAIT_S)
        met.wait_for_end()
        assert task.wait(WAIT_S).status == "failed" and "was preempted" in task.reason

    def test_a_drained_node(self, cluster: SlurmCluster, backend: SlurmBackend, meeting: Meeting) -> None:
        task = submit(meeting, backend)
        met = meeting.next()
        node = met.said.split()[1]
        cluster.run("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")
        try:
            assert task.status == "running"
            met.let_go()
            assert task.result(WAIT_S) == "done"
        finally:
            cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME")


class TestDeaths:
    def test_the_controller(self, cluster: SlurmCluster, backend: SlurmBackend, meeting: Meeting) -> None:
        task, other = submit(meeting, backend), submit(meeting, backend)
        first, second = meeting.next(), meeting.next()
        assert {task.wait_started(WAIT_S).status, other.wait_started(WAIT_S).status} == {"running"}
        cluster.stop_controller()
        try:
            assert task.status == "running" and "when slurm answered last" in task.reason
            with pytest.raises(flow.BackendUnavailable):
                submit(meeting, backend)
            first.let_go()
            first.wait_for_end()
            # Whoever has said how it ended is asked no more, and nobody else.
            wait_until(lambda: sorted([task.status, other.status]) == ["completed", "running"])
        finally:
            cluster.start_controller()
        second.let_go()
        assert [task.result(WAIT_S), other.result(WAIT_S)] == ["done", "done"]

    def test_the_supervisor(self, cluster: SlurmCluster, backend: SlurmBackend, meeting: Meeting) -> None:
        task = submit(meeting, backend)
        met = meeting.next()
        os.kill(int((directory(cluster, task) / "pid").read_text()), signal.SIGKILL)
        assert task.wait(WAIT_S).status == "failed"
        assert "Slurm job" in task.reason
        met.wait_for_end()
        assert not (directory(cluster, task) / "result").exists()

    def test_one_that_slurm_has_lost_sight_of(
        self, cluster: SlurmCluster, backend: SlurmBackend, meeting: Meeting
    ) -> None:
        """It runs on, and its job is run again: the second one waits, and has nothing to do."""
        task = submit(meeting, backend)
        met = meeting.next()
        script = cluster.run("scontrol", "write", "batch_script", met.said.split()[0], "-")
        with subprocess.Popen(["sh", "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as again:
            wait_until(lambda: opens(again.pid, directory(cluster, task) / "lock"))
            met.let_go()
            assert task.result(WAIT_S) == "done"
            assert again.wait(WAIT_S) == 0, again.stderr and again.stderr.read()
        assert (task.logs(tail=None), task.to_dict()["attempts"]) == ("begun\n", 1)

    def test_a_node(self, cluster: SlurmCluster, meeting: Meeting) -> None:
        task = submit(meeting, SlurmBackend(cluster.options(extra=["--no-requeue"])))
        node = meeting.next().said.split()[1]
        cluster.kill_node(node)
        try:
            wait_until(lambda: task.status == "failed")
            assert "lost its node" in task.reason
        finally:
            cluster.start_node(node)
            wait_until(lambda: cluster.states().get(node) == "idle")

    def test_what_is_secret_lies_in_private_files(
        self, cluster: SlurmCluster, backend: SlurmBackend, meeting: Meeting
    ) -> None:
        meet = meeting.meet

        def work() -> str:
            import os

            meet().recv(1)
            return os.environ["TOKEN"]

        task = flow.function(work, backend=backend, secrets={"TOKEN": "very-secret"}).submit()  # type: ignore[call-overload]
        met = meeting.next()
        folder = directory(cluster, task)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        holders = [path for path in folder.iterdir() if path.is_file() and b"very-secret" in path.read_bytes()]
        assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in holders} == {"plan.json": 0o600}
        met.let_go()
        assert task.result(WAIT_S) == "very-secret"
        wait_until(lambda: not (folder / "plan.json").exists())  # a moment after it ended


class TestFollowing:
    def test_lines_come_while_it_runs(self, cluster: SlurmCluster, backend: SlurmBackend, meeting: Meeting) -> None:
        task = submit(meeting, backend)
        lines: list[str] = []
        follower = threading.Thread(target=lambda: lines.extend(task.logs(follow=True)))
        follower.start()
        meeting.next().let_go()
        follower.join(WAIT_S)
        assert lines == ["begun\n"]


@pytest.mark.parametrize(
    ("job", "facts", "state", "words"),
    [
        ("PENDING", {}, "pending", "waits in the queue: Priority"),
        ("CONFIGURING", {}, "pending", ""),
        ("RUNNING", {}, "pending", "starts"),
        ("RUNNING", {"begun": True}, "running", ""),
        ("COMPLETING", {"begun": True}, "running", ""),
        ("CANCELLED", {}, "cancelled", "from outside"),
        ("CANCELLED", {"cancel": "mine"}, "cancelled", "mine"),
        ("COMPLETED", {}, "completed", ""),
        (None, {"submitting": True}, "pending", "being submitted"),
        ("NODE_FAIL", {"begun": True}, "failed", "lost its node"),
        ("TIMEOUT", {}, "failed", "time limit"),
        ("OUT_OF_MEMORY", {}, "failed", "memory limit"),
        ("FAILED", {"job.log": "no Python here"}, "failed", "no Python here"),
        (None, {"taken": "PREEMPTED None"}, "failed", "was preempted"),
        (None, {"taken": "COMPLETING None"}, "cancelled", "from outside"),
        (None, {"state": {"attempts": 1}, "number": "7"}, "failed", "does not know its job any more, and it left no"),
        (None, {"job.log": "no Python", "number": "7"}, "failed", "does not know its job any more, and it left no"),
        (None, {"number": "7"}, "failed", "Slurm job 7 was lost before it began"),
        (None, {"number": ""}, "failed", "who submitted it was interrupted"),
    ],
)
def test_what_slurm_says_becomes_a_state(job: str | None, facts: dict[str, Any], state: str, words: str) -> None:
    found = judge(Job("name", "7", job, "n1", "1G", "Priority") if job else None, facts)
    assert found.state == state and words in found.reason
