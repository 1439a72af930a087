"""Tasks in containers: what is left when something is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import engines
import podman
import pytest

import flowfn as flow
from flowfn.backends.container import ContainerBackend
from flowfn.client import Flow
from flowfn.task import Task
from flowfn.testing import Meeting
from flowfn_runtime import taskdir

WAIT_S = 60.0


@pytest.fixture
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ContainerBackend]:
    engines.need(podman.why_not())
    podman.ready()
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    made = podman.backend()
    yield made
    with Flow() as client:
        for task in client.list_tasks(limit=None):
            task.cancel().wait(WAIT_S)
    made.close()


def make_work(meeting: Meeting) -> Callable[[], None]:
    meet = meeting.meet

    def work() -> None:
        print("begun", flush=True)
        meet().recv(1)

    return work


def container_of(task: Task) -> str:
    return f"flowfn-{task.task_id}-0"


def test_a_container_that_is_killed_from_outside(backend: ContainerBackend, meeting: Meeting) -> None:
    task = flow.function(make_work(meeting), backend=backend).submit()
    met = meeting.next()
    assert container_of(task) in podman.containers()
    podman.run("kill", container_of(task))
    assert task.wait(WAIT_S).status == "failed"
    assert (task.reason, task.exit_code, task.backend) == ("killed by SIGKILL", 137, "container")
    met.wait_for_end()
    assert container_of(task) not in podman.containers()
    assert task.logs() == "begun\n"
    with pytest.raises(flow.WorkerLost):
        task.result()


def test_a_supervisor_that_is_killed(backend: ContainerBackend, meeting: Meeting) -> None:
    task = flow.function(make_work(meeting), backend=backend).submit()
    met = meeting.next()
    os.kill(int(Path(taskdir.task_dir(task.task_id), "pid").read_text()), signal.SIGKILL)
    assert task.wait(WAIT_S).status == "failed"
    met.wait_for_end()
    podman.wait_until_gone(container_of(task))
    assert task.reason == "its supervisor was killed"


def test_what_ignores_sigterm(backend: ContainerBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOW_GRACE_S", "0.5")
    with Flow() as client:
        task = client.submit("trap '' TERM; echo up; while :; do sleep 1; done", backend=backend)
    assert next(task.logs(follow=True)) == "up\n"
    assert task.cancel("enough").wait(WAIT_S).reason == "enough"
    assert container_of(task) not in podman.containers()


def test_variables_are_in_no_record_of_the_engine(backend: ContainerBackend) -> None:
    secret = 'it\'s "very" $SECRET\nof two lines'
    with Flow() as client:
        task = client.submit('printf %s "$TOKEN"; sleep 300', env={"TOKEN": secret}, backend=backend)
    lines = task.logs(follow=True)
    assert next(lines) == 'it\'s "very" $SECRET\n'
    assert "SECRET" not in podman.run("inspect", container_of(task))
    task.cancel().wait(WAIT_S)
    assert task.logs() == secret
