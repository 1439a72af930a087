"""Tasks as jobs of a real Ray: what happens to them from outside, and what clients are told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import engines
import pytest
import ray_cluster
from ray_cluster import RayCluster, wait_until

import flowfn as flow
from flowfn import places
from flowfn.backends.ray_tasks import judge
from flowfn.client import Flow
from flowfn.task import Task
from flowfn.testing import Meeting
from flowfn_runtime.raytask import STOPPED

WAIT_S = 90.0

SUBMITS = """
import os, signal, sys
import flowfn as flow
from flowfn.backends.ray import RayBackend

def work():
    print("begun", flush=True)
    return os.getppid()

task = flow.function(work, backend=RayBackend(**{options!r})).submit()
print(task.task_id, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def started() -> Iterator[RayCluster]:
    with ray_cluster.running(jobs=True) as made:
        yield made
        places.close_all()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


@pytest.fixture
def cluster(started: RayCluster, project: Path) -> Iterator[RayCluster]:
    yield started
    with Flow() as client:
        for task in client.list_tasks(status=["pending", "running"], limit=None):
            task.cancel().wait(WAIT_S)


@pytest.fixture
def meeting() -> Iterator[Meeting]:
    place = Meeting("127.0.0.1")
    yield place
    place.close()


def submit(cluster: RayCluster, function: Callable[..., Any], address: str | None = None, **options: Any) -> Task:
    from flowfn.backends.ray import RayBackend

    backend = RayBackend(**cluster.options(address=address or cluster.address))
    task: Task = flow.function(backend=backend, **options)(function).submit()
    return task


def make_work(meeting: Meeting) -> Callable[[], str]:
    meet = meeting.meet

    def work() -> str:
        import sys

        print("begun", flush=True)
        told = meet(" ".join(sys.argv)).recv(1)
        return "done" if told else "alone"

    return work


def driver_of(cluster: RayCluster, task: Task) -> int:
    """The process that Ray takes for the job."""

    def words(pid: int) -> list[bytes]:
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return []

    [pid] = [pid for pid in cluster.processes() if words(pid)[-2:] == [task.task_id.encode(), b""]]
    return pid


def ray_jobs(cluster: RayCluster, *words: str) -> str:
    """`ray job ...`, as a user says it."""
    command = [os.path.join(os.path.dirname(sys.executable), "ray"), "job", *words]
    env = {**os.environ, "RAY_ADDRESS": cluster.address}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=WAIT_S, check=True)
    return done.stdout + done.stderr


def left_on_nodes(cluster: RayCluster) -> list[Path]:
    return list((cluster.home / "ray-jobs").iterdir())


def test_a_client_that_is_killed(cluster: RayCluster, project: Path) -> None:
    (project / "client.py").write_text(SUBMITS.format(options=cluster.options()))
    client = subprocess.run([sys.executable, "client.py"], stdout=subprocess.PIPE, text=True, timeout=WAIT_S)
    assert client.returncode == -signal.SIGKILL
    task = Task.get(client.stdout.strip())
    assert isinstance(task.result(WAIT_S), int) and task.logs() == "begun\n"
    assert left_on_nodes(cluster) == []


def test_a_driver_that_is_killed(cluster: RayCluster, meeting: Meeting) -> None:
    task = submit(cluster, make_work(meeting))
    met = meeting.next()
    os.kill(driver_of(cluster, task), signal.SIGKILL)
    with pytest.raises(flow.TaskFailed, match=r"its Ray job ended without a word, failed: .*exit code"):
        task.result(WAIT_S)
    met.wait_for_end()
    assert (task.status, task.logs()) == ("failed", "begun\n")


def test_a_supervisor_that_is_killed(cluster: RayCluster, meeting: Meeting) -> None:
    task = submit(cluster, make_work(meeting))
    met = meeting.next()
    os.kill(int((cluster.home / "ray-jobs" / task.task_id / "pid").read_text()), signal.SIGKILL)
    with pytest.raises(flow.TaskFailed, match="its supervisor ended without a word"):
        task.result(WAIT_S)
    met.wait_for_end()


def test_a_keeper_that_is_killed(cluster: RayCluster, meeting: Meeting) -> None:
    task = submit(cluster, make_work(meeting))
    met = meeting.next()
    [keeper] = [pid for pid in cluster.processes() if ray_cluster._command(pid).startswith(b"ray::Keeper")]
    os.kill(keeper, signal.SIGKILL)  # Ray starts it again
    met.let_go()
    task.wait(WAIT_S)
    assert (task.result(), task.logs()) == ("done", "begun\n")


def test_a_job_that_is_stopped_from_outside(cluster: RayCluster, meeting: Meeting) -> None:
    task = submit(cluster, make_work(meeting))
    met = meeting.next()
    ray_jobs(cluster, "stop", "--no-wait", task.task_id)
    assert task.wait(WAIT_S).status == "cancelled"
    assert task.reason == STOPPED
    met.wait_for_end()


def test_a_task_that_waits_for_room_and_is_cancelled(cluster: RayCluster, meeting: Meeting) -> None:
    first = submit(cluster, make_work(meeting), gpu="h100")
    met = meeting.next()
    second = submit(cluster, make_work(meeting), gpu="h100")
    assert (second.status, second.reason.partition(":")[0]) == ("pending", "its Ray job waits")
    assert second.cancel("not needed").wait(WAIT_S).reason == "not needed"
    assert (second.status, second.started_at) == ("cancelled", None)
    met.let_go()
    assert first.result(WAIT_S) == "done"


def test_a_large_result_and_a_large_argument(cluster: RayCluster) -> None:
    data = os.urandom(1 << 20) * 200
    assert submit(cluster, lambda: data[::-1]).result(2 * WAIT_S) == data[::-1]


def test_what_is_listed_and_deleted(cluster: RayCluster, meeting: Meeting) -> None:
    task = submit(cluster, make_work(meeting), env={"TOKEN": "t0p-secret"})
    met = meeting.next()
    with Flow() as client:
        assert [one.backend for one in client.list_tasks() if one.task_id == task.task_id] == ["ray"]
        listed = ray_jobs(cluster, "list")
        assert task.task_id in listed and "t0p-secret" not in listed
        met.let_go()
        assert task.result(WAIT_S) == "done"
        wait_until(lambda: "succeeded" in ray_jobs(cluster, "status", task.task_id).lower(), "the job did not end")
        client.delete_tasks(task)
    assert not [path for path in cluster.root.rglob("*") if task.task_id in path.name and "logs" not in path.parts]


def test_a_task_may_use_its_cluster(cluster: RayCluster) -> None:
    def work() -> tuple[int, str]:
        import ray

        ray.init(logging_level="ERROR")
        return len(ray.nodes()), ray.get_runtime_context().gcs_address

    assert submit(cluster, work).result(WAIT_S) == (3, cluster.address)


def test_what_is_refused(cluster: RayCluster) -> None:
    from flowfn.backends.ray import RayBackend

    backend = RayBackend(**cluster.options())
    with pytest.raises(flow.ResourceUnavailable, match="no node of the Ray cluster has gpu=b200"):
        submit(cluster, len, gpu="b200")
    with Flow() as client:
        with pytest.raises(flow.ValidationError, match="num_instances=2"):
            client.submit("true", num_instances=2, backend=backend)
        first = client.submit("true", backend=backend)
        with pytest.raises(flow.ValidationError, match="depends_on"):
            client.submit("true", depends_on=[first], backend=backend)
        with pytest.raises(flow.BackendUnavailable, match="no Ray cluster can be had at 127"):
            client.submit("true", backend=RayBackend(address="127.0.0.1:1"))
        assert [task.task_id for task in client.list_tasks()] == [first.task_id]


def test_a_cluster_without_a_jobs_server(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engines.need(ray_cluster.why_not())
    for name, value in ray_cluster.ENVIRON.items():
        monkeypatch.setenv(name, value)
    made = RayCluster([{}])
    try:
        with pytest.raises(flow.BackendUnavailable, match="Jobs server"):
            submit(made.start(), len)
    finally:
        places.close_all()
        made.remove()


def test_parts_of_the_cluster_that_are_lost(project: Path, meeting: Meeting, monkeypatch: pytest.MonkeyPatch) -> None:
    engines.need(ray_cluster.why_not())
    for name, value in ray_cluster.ENVIRON.items():
        monkeypatch.setenv(name, value)
    made = RayCluster(ray_cluster.NODES[:2], jobs=True, client=True)
    try:
        made.start()
        on_node = submit(made, make_work(meeting), gpu="h100")
        on_head = submit(made, make_work(meeting), made.url, gpu="a100")  # by Ray's client
        met = [meeting.next(), meeting.next()]
        os.kill(made.raylets[1], signal.SIGKILL)
        with pytest.raises(flow.TaskFailed, match="its Ray job ended without a word"):
            on_node.result(2 * WAIT_S)
        assert on_node.logs() == "begun\n"  # it was kept elsewhere
        assert on_head.status == "running"
        made.remove()
        assert on_head.refresh().status == "running"  # nobody can say otherwise
        assert "this is what was known when ray answered last; now: " in on_head.reason
        for one in met:
            one.wait_for_end()
    finally:
        places.close_all()
        if made.root.exists():
            made.remove()


class TestJudging:
    def test_what_a_task_said_counts(self) -> None:
        outcome = {"state": "completed", "reason": "", "exit_code": 0, "ended_at": 2.0}
        state: Any = judge({"outcome": outcome, "state": {"started_at": 1.0, "attempts": 1}, "unknown": "no answer"})
        assert (state.state, state.started_at, state.ended_at) == ("completed", 1.0, 2.0)

    def test_without_an_answer_nothing_is_guessed(self) -> None:
        assert isinstance(judge({"unknown": "Ray's Jobs server does not answer"}), flow.BackendUnavailable)

    @pytest.mark.parametrize(
        ("job", "cancel", "state", "reason"),
        [
            (("PENDING", "no room"), None, "pending", "its Ray job waits: no room"),
            (("RUNNING", ""), None, "pending", "its Ray job starts"),
            (("STOPPED", ""), None, "cancelled", STOPPED),
            (("STOPPED", ""), "enough", "cancelled", "enough"),
            (("FAILED", "node died"), None, "failed", "its Ray job ended without a word, failed: node died"),
            (None, None, "failed", "Ray does not know its job any more, and it left no word"),
        ],
    )
    def test_what_ray_says_of_its_job(
        self, job: tuple[str, str] | None, cancel: str | None, state: str, reason: str
    ) -> None:
        said = job and {"status": job[0], "message": job[1], "end_time": None}
        judged: Any = judge({"job": said, "cancel": cancel})
        assert (judged.state, judged.reason) == (state, reason)
