"""What happens when something dies, fills up or is asked for at the wrong moment: real processes, real kills."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flowfn.client import Flow
from flowfn.task import Task
from flowfn_runtime import limits, taskdb, taskdir, tasksql
from flowfn_runtime.data import volumes
from flowfn_runtime.errors import NameConflict, TaskError, TaskFailed, TaskNotFound, ValidationError

Completed = Callable[[Task], str]


def supervisor_of(task: Task) -> int:
    return int(Path(taskdir.task_dir(task.task_id), "pid").read_text())


def first_line(task: Task) -> str:
    return next(iter(task.logs(follow=True))).rstrip("\n")


def gone(pid: int) -> None:
    """Wait until a process is gone (or a zombie that nobody reaps)."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    import select

    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(20_000), f"process {pid} goes on"
    os.close(pidfd)


def kill_supervisor(task: Task) -> list[int]:
    """kill -9; returns the processes that were below it, which are gone as well then."""
    pid = supervisor_of(task)
    below = limits.descendants(pid)
    os.kill(pid, signal.SIGKILL)
    gone(pid)
    for other in below:
        gone(other)
    return below


# -- kills


def test_a_killed_supervisor_reads_as_a_failed_task_and_leaves_nothing(client: Flow, completed: Completed) -> None:
    task = client.submit("setsid sleep 300 & echo up; sleep 300", mounts="volume://kept")
    waiting = client.submit("echo next", mounts="volume://kept")
    assert first_line(task) == "up"
    below = kill_supervisor(task)
    assert len(below) >= 4
    assert (task.status, task.reason, task.exit_code) == ("failed", "its supervisor was killed", None)
    assert task.logs() == "up\n"
    # The volume is free, and whoever waited for it goes on.
    assert completed(waiting) == "next\n"
    assert not volumes.in_use(volumes.get("kept"))
    assert not os.path.exists(os.path.join(taskdir.task_dir(task.task_id), "scratch"))
    assert client.list_tasks(status="running") == []


def test_a_killed_supervisor_of_a_waiting_task(client: Flow, completed: Completed) -> None:
    first = client.submit("echo up; sleep 300", mounts="volume://kept")
    assert first_line(first) == "up"
    second = client.submit("echo never", mounts="volume://kept")
    third = client.submit("echo third", mounts="volume://kept")
    pid = Path(taskdir.task_dir(second.task_id), "pid")
    while not pid.exists() or not pid.read_text():
        os.sched_yield()
    kill_supervisor(second)
    assert second.status == "failed" and third.status == "pending"
    first.cancel().wait()
    assert completed(third) == "third\n"
    assert second.logs() == ""


def test_a_killed_command_fails_the_task(client: Flow) -> None:
    task = client.submit("echo $$; kill -9 $$")
    task.wait(30)
    assert (task.status, task.exit_code, task.reason) == ("failed", 137, "killed by SIGKILL")
    with pytest.raises(TaskFailed) as caught:
        task.result()
    assert caught.value.exit_code == 137


def test_tasks_survive_the_client(project: Path, client: Flow) -> None:
    code = textwrap.dedent("""
        import os, signal
        from flow import Flow
        task = Flow().submit("echo up; sleep 0.5; echo done")
        print(task.task_id, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    task = client.get_task(done.stdout.strip())
    assert task.wait(30).status == "completed"
    assert task.logs() == "up\ndone\n"


def test_after_a_restart_of_the_host_nothing_reads_as_running(
    project: Path, flow_home: Path, tmp_path: Path, client: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = client.submit("echo up; sleep 300", mounts="volume://kept")
    queued = client.submit("echo never", mounts="volume://kept")
    finished = client.submit("echo done").wait(30)
    assert first_line(running) == "up"
    # What lies on the disk at this moment is all that a restart leaves.
    after = tmp_path / "after"
    try:
        shutil.copytree(flow_home, after)
    except shutil.Error as error:
        assert not [source for source, *_ in error.args[0] if os.path.exists(source)]  # temporary ones that went
    running.cancel()
    queued.cancel()
    with sqlite3.connect(after / "tasks" / "registry.db") as db:
        db.execute("UPDATE tasks SET boot_id = 'the one before'")
    db.close()
    monkeypatch.setenv("FLOW_HOME", str(after))
    states = {task.task_id: (task.status, task.reason) for task in client.list_tasks(limit=None)}
    assert states == {
        running.task_id: ("failed", "the host was restarted"),
        queued.task_id: ("failed", "the host was restarted while it waited, and it has not begun"),
        finished.task_id: ("completed", ""),
    }
    assert client.get_task(running.task_id).logs() == "up\n"
    assert client.submit("echo free", mounts="volume://kept").wait(30).status == "completed"


def test_an_outcome_that_did_not_reach_the_register_is_found(client: Flow, flow_home: Path) -> None:
    task = client.submit("exit 5").wait(30)
    with sqlite3.connect(flow_home / "tasks" / "registry.db") as db:
        db.execute("UPDATE tasks SET state = 'running', exit_code = NULL, ended_at = NULL")
    db.close()
    again = client.get_task(task.task_id)
    assert (again.status, again.exit_code, again.reason) == ("failed", 5, "exit code 5")


def test_no_written_line_is_lost(client: Flow) -> None:
    task = client.submit("echo up; i=0; while :; do echo line $i; i=$((i+1)); done")
    follower = task.logs(follow=True)
    for _ in range(2000):
        next(follower)
    kill_supervisor(task)
    lines = task.logs(tail=None).splitlines()
    assert lines[:3] == ["up", "line 0", "line 1"]
    whole = [line for line in lines[1:] if line.startswith("line ")]
    assert whole == [f"line {number}" for number in range(len(whole))]
    # Who followed it got every line as well, and then its end.
    assert 2000 + len(list(follower)) == len(lines)


# -- cancelling


STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        while True: time.sleep(100)
    os._exit(0)
print("up", flush=True)
while True: time.sleep(100)
"""


def test_cancelling_ends_the_whole_tree(project: Path, client: Flow) -> None:
    (project / "polite.py").write_text(
        "import signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(0)))\n"
        "print('up', flush=True); signal.pause()\n"
    )
    task = client.submit("python polite.py")
    assert first_line(task) == "up"
    below = limits.descendants(supervisor_of(task))
    task.cancel("no longer needed").wait(30)
    assert (task.status, task.reason) == ("cancelled", "no longer needed")
    assert task.logs() == "up\nsaved\n"
    for pid in below:
        gone(pid)


def test_cancelling_ends_what_ignores_it(project: Path, client: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOW_GRACE_S", "0.5")
    (project / "stubborn.py").write_text(STUBBORN)
    task = client.submit("python stubborn.py")
    assert first_line(task) == "up"
    below = limits.descendants(supervisor_of(task))
    assert task.cancel().wait(30).status == "cancelled"
    for pid in below:
        gone(pid)


def test_cancelling_while_it_waits(client: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOW_GPUS", "a100")
    holder = client.submit("echo up; sleep 300", mounts="volume://kept", gpu="a100")
    assert first_line(holder) == "up"
    waiting = [
        client.submit("echo never", mounts="volume://kept"),
        client.submit("echo never", depends_on=[holder]),
        client.submit("echo never", gpu="a100"),
    ]
    assert [task.status for task in waiting] == ["pending"] * 3
    for task in waiting:
        assert task.cancel().wait(30).status == "cancelled"
        assert task.started_at is None and task.logs() == ""
    assert holder.status == "running"
    assert holder.cancel().wait(30).status == "cancelled"
    assert holder.cancel().status == "cancelled"  # once more does nothing


def test_a_task_that_runs_too_long_is_ended(client: Flow) -> None:
    task = client.submit("echo up; sleep 300", max_run_time_hours=0.3 / 3600)
    assert task.wait(30).status == "failed"
    assert "max_run_time_hours" in task.reason


# -- order


def test_dependents_wait_and_fail_with_what_they_depend_on(client: Flow, completed: Completed) -> None:
    good = client.submit("sleep 0.3")
    bad = client.submit("exit 3")
    after_good = client.submit("echo after", depends_on=[good])
    after_bad = client.submit("echo never", depends_on=[good, bad])
    after_that = client.submit("echo never", depends_on=after_bad.name)
    assert completed(after_good) == "after\n"
    assert after_bad.wait(30).status == after_that.wait(30).status == "failed"
    assert bad.task_id in after_bad.reason and after_bad.task_id in after_that.reason
    with pytest.raises(TaskNotFound):
        client.submit("echo", depends_on=["task_none"])


def test_retries_start_the_command_again(client: Flow, completed: Completed) -> None:
    from flowfn.spec import Retries

    flaky = "echo try >> /scratch/tries; wc -l < /scratch/tries; test $(wc -l < /scratch/tries) -eq 3"
    task = client.submit(flaky, volumes=[{"mount_path": "/scratch"}], retries=Retries(3, initial_delay=0.05))
    assert completed(task) == "1\n2\n3\n"
    assert task.to_dict()["attempts"] == 3
    assert "attempt 2 failed (exit code 1)" in task.logs(stderr=True)
    spent = client.submit("echo x; exit 9", retries=Retries(1, initial_delay=0)).wait(30)
    assert (spent.status, spent.exit_code, spent.logs()) == ("failed", 9, "x\nx\n")


def test_gpus_are_handed_on(client: Flow, monkeypatch: pytest.MonkeyPatch, completed: Completed) -> None:
    monkeypatch.setenv("FLOW_GPUS", "a100:2")
    first = client.submit("echo $CUDA_VISIBLE_DEVICES; sleep 0.4", gpu="a100:2")
    assert first_line(first) == "0,1"
    second = client.submit("echo $CUDA_VISIBLE_DEVICES", gpu="a100")
    assert second.status == "pending"
    assert completed(second) == "0\n"
    assert first.ended_at is not None and second.started_at is not None and first.ended_at <= second.started_at


def test_hundreds_of_queued_tasks_run_in_order(client: Flow, project: Path) -> None:
    count = 500
    holder = client.submit("echo up; sleep 300", mounts="volume://queue")
    assert first_line(holder) == "up"
    tasks = [client.submit(f"echo {n} >> /volumes/order", mounts="volume://queue") for n in range(count)]
    assert {task.status for task in tasks} == {"pending"}
    for task in tasks[20:]:
        task.cancel()
    holder.cancel()
    for task in tasks:
        task.wait(60)
    assert [task.status for task in tasks] == ["completed"] * 20 + ["cancelled"] * (count - 20)
    order = Path(volumes.get("queue").path, "order").read_text().split()
    assert order == [str(number) for number in range(20)]


# -- many at once, and what is in their way


def test_many_submitters_at_once(project: Path, client: Flow) -> None:
    code = "import sys; from flow import Flow\nsys.stdin.read(1)\nFlow().submit('echo hi', mounts='volume://one')"
    submitters = [subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) for _ in range(50)]
    for process in submitters:
        assert process.stdin is not None
        process.stdin.close()
    assert [process.wait(60) for process in submitters] == [0] * 50
    tasks = client.list_tasks(limit=None)
    assert len(tasks) == 50
    assert {task.wait(60).status for task in tasks} == {"completed"}
    # They shared a block volume, so none began before the one before it had ended.
    tasks.sort(key=lambda task: task.started_at or 0)
    for before, after in itertools.pairwise(tasks):
        assert before.ended_at <= after.started_at  # type: ignore[operator]


def test_a_register_that_another_process_writes(client: Flow, flow_home: Path) -> None:
    client.submit("true").wait(30)
    code = (
        "import sqlite3, sys, time\n"
        f"db = sqlite3.connect({str(flow_home / 'tasks' / 'registry.db')!r}, isolation_level=None)\n"
        "db.execute('BEGIN EXCLUSIVE'); print('in', flush=True); sys.stdin.read(); db.execute('COMMIT')"
    )
    running = client.submit("echo up; sleep 0.2; echo done")
    assert first_line(running) == "up"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True) as writer:
        assert writer.stdin is not None and writer.stdout is not None
        writer.stdout.readline()
        import threading

        threading.Timer(1.0, writer.stdin.close).start()
        task = client.submit("echo hi")  # waits for its turn
    assert task.wait(30).logs() == "hi\n"
    assert running.wait(30).status == "completed"


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A flowfn home on a file system of 4 MiB of its own."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    monkeypatch.setenv("FLOW_HOME", str(place / "home"))
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk(small_disk: Path, project: Path) -> None:
    client = Flow()
    client.submit("true").wait(30)
    task = client.submit("echo up; sleep 0.5; echo more; exit 6")
    assert first_line(task) == "up"
    with pytest.raises(OSError), open(small_disk / "filler", "wb") as file:
        while True:
            file.write(b"x" * 65536)
            file.flush()
    with pytest.raises(TaskError, match="full") as caught:
        client.submit("true")
    assert "FLOW_HOME" in str(caught.value)
    # How the task ended is known all the same.
    assert task.wait(30).status == "failed"
    assert task.exit_code == 6
    (small_disk / "filler").unlink()
    assert client.submit("true").wait(30).status == "completed"
    assert client.get_task(task.task_id).exit_code == 6
    assert len(client.list_tasks(limit=None)) == 3


def test_a_read_only_home(small_disk: Path, project: Path) -> None:
    client = Flow()
    done = client.submit("echo hi").wait(30)
    gone(supervisor_of(done))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(TaskError, match="not writable"):
        client.submit("true")
    assert [task.task_id for task in client.list_tasks()] == [done.task_id]
    assert client.get_task(done.task_id).logs() == "hi\n"
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)


# -- small print


def test_a_task_a_second_costs_the_client_nothing(client: Flow) -> None:
    client.submit("true").wait(30)
    before = len(os.listdir("/proc/self/fd")), limits.descendants(os.getpid())
    for _ in range(10):
        client.submit("true").wait(30)
    # No supervisor is a child of ours, which we would have to reap.
    assert (len(os.listdir("/proc/self/fd")), limits.descendants(os.getpid())) == before


def test_names(client: Flow) -> None:
    task = client.submit("echo up; sleep 300", name="train", unique_name=False)
    assert client.get_task("train").task_id == client.get_task(task.task_id[:9]).task_id == task.task_id
    with pytest.raises(NameConflict, match=task.task_id):
        client.submit("true", name="train", unique_name=False)
    numbered = client.submit("true", name="other")
    assert numbered.name.startswith("other-") and client.get_task("other") == numbered
    task.cancel().wait(30)
    client.submit("true", name="train", unique_name=False).wait(30)
    with pytest.raises(TaskNotFound, match="traim") as caught:
        client.get_task("traim")
    assert "train" in (caught.value.hint or "")


def test_waiting_with_a_limit(client: Flow) -> None:
    task = client.submit("echo up; sleep 300")
    with pytest.raises(TimeoutError):
        task.wait(0.05)
    with pytest.raises(TimeoutError):
        task.result(timeout=0)
    assert task.cancel().wait(20).is_terminal


def test_what_the_supervisor_inherits(client: Flow, completed: Completed) -> None:
    read, write = os.pipe()
    os.set_inheritable(write, True)
    task = client.submit("ls /proc/self/fd; sleep 300")
    first_line(task)
    os.close(write)
    assert os.read(read, 1) == b""  # nobody else holds the other end
    os.close(read)
    assert task.cancel().wait(20).is_terminal


def test_unusual_commands(client: Flow, completed: Completed) -> None:
    assert completed(client.submit(["printf", "%s|", "a b", "$HOME"])) == "a b|$HOME|"
    assert completed(client.submit("\n    if true; then\n      echo a\n    fi\n    ")) == "a\n"
    assert client.submit(["no-such-program"]).wait(20).exit_code not in (0, None)
    wrongs: tuple[str | list[str], ...] = ("", "  ", [], "a\0b")
    for wrong in wrongs:
        with pytest.raises(ValidationError):
            client.submit(wrong)
    assert completed(client.submit("printf '\\xff\\xfe no newline'")) == "�� no newline"
    assert len(completed(client.submit("head -c 300000 /dev/zero | tr '\\0' x"))) == 300000


def test_the_terminal_follows_a_task_that_it_did_not_start(client: Flow) -> None:
    task = client.submit("for i in 1 2 3; do echo out $i; echo err $i >&2; sleep 0.1; done")
    flow = [sys.executable, "-c", "import sys; from flowfn.cli import main; sys.exit(main())"]
    done = subprocess.run([*flow, "logs", "-f", task.task_id], capture_output=True, text=True, timeout=30)
    assert done.stdout == "out 1\nout 2\nout 3\n" and done.stderr == "err 1\nerr 2\nerr 3\n"
    assert task.logs(tail=1) == "out 3\n" and task.logs(tail=2, stderr=True) == "err 2\nerr 3\n"


def test_rows_asked_for_are_rows_read(client: Flow, project: Path) -> None:
    done = client.submit("true").wait(30)
    row = taskdb.get(done.task_id)
    with tasksql.connection("rwc") as db:
        values = taskdb._values(row)
        rows = [(f"task_{n:012x}", *values[1:]) for n in range(10_000)]
        marks = ", ".join("?" * len(values))
        db.execute("BEGIN")
        db.executemany(f"INSERT INTO tasks ({taskdb._COLUMNS}) VALUES (NULL, {marks})", rows)
        db.execute("COMMIT")
        for query in (
            "SELECT * FROM tasks WHERE seq < 99999 AND project = 'default' ORDER BY seq DESC LIMIT 20",
            "SELECT * FROM tasks WHERE seq < 99999 AND project = 'default' AND state IN ('pending', 'running') "
            "ORDER BY seq DESC LIMIT 1000",
            "SELECT * FROM tasks WHERE project = 'default' AND name = 'x' ORDER BY seq DESC LIMIT 1",
            "SELECT * FROM tasks WHERE id >= 'task_0' AND id < 'task_1' AND project = 'default' LIMIT 2",
        ):
            plan = " ".join(step[3] for step in db.execute(f"EXPLAIN QUERY PLAN {query}"))
            assert "USING" in plan and "TEMP B-TREE" not in plan, (query, plan)
    assert [task.task_id for task in client.list_tasks(limit=2)] == ["task_00000000270f", "task_00000000270e"]
