"""Cases: calls made durable, and commands, as tasks that outlive who submitted them."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import flowfn as flow
from flowfn.client import Flow
from flowfn.task import Task
from flowfn_runtime.errors import TaskNotFound

from .base import WAIT_S, Contract, make_where_am_i, needs

# Another process, which has nothing but the task's id.
_FETCH = """
import pickle, sys
from flowfn.task import Task
task = Task.get(sys.argv[1])
try:
    value = task.result(60)
except BaseException as error:
    value = type(error).__name__, str(error)
sys.stdout.buffer.write(pickle.dumps((value, task.logs(), task.status)))
"""


class Tasks(Contract):
    @pytest.fixture
    def clean_up(self) -> Iterator[None]:
        """Ends what a case leaves."""
        yield
        with Flow() as client:
            for task in client.list_tasks(limit=None):
                if not task.cancel("the test is over").is_terminal:
                    task.wait(WAIT_S)

    @pytest.fixture
    def submit(self, clean_up: None) -> Callable[..., Task]:
        def submit(function: Callable[..., Any], *args: Any, **options: Any) -> Task:
            task: Task = self.function(function, **options).submit(*args)
            return task

        return submit

    def fetch(self, task: Task) -> Any:
        """Its result (an exception as its type's name and text), logs and status, in a process that is new."""
        import pickle

        done = subprocess.run([sys.executable, "-c", _FETCH, task.task_id], stdout=subprocess.PIPE, timeout=4 * WAIT_S)
        return pickle.loads(done.stdout)

    def test_tasks_are_refused_clearly_or_run(self, submit: Callable[..., Task]) -> None:
        if "tasks" in self.unsupported:
            with pytest.raises(flow.FlowError, match="task"):
                submit(lambda: 1)
            return
        task = submit(lambda: 1)
        assert task.result(WAIT_S) == 1
        assert (task.status, task.exit_code) == ("completed", 0)
        assert task.created_at <= (task.started_at or 0) + 5 <= (task.ended_at or 0) + 5

    @needs("tasks")
    def test_a_task_runs_elsewhere_and_is_listed(self, submit: Callable[..., Task]) -> None:
        where = make_where_am_i()
        task = submit(where)
        assert task.result(WAIT_S) != where()
        with Flow() as client:
            listed = {other.task_id: other.to_dict()["backend"] for other in client.list_tasks()}
        assert listed[task.task_id] == task.backend
        assert Task.get(task.name).task_id == task.task_id

    @needs("tasks")
    def test_the_result_of_a_task_comes_any_number_of_times(self, submit: Callable[..., Task]) -> None:
        task = submit(lambda data: (len(data), data[::-1]), b"ab" * 3_000_000)
        expected = (6_000_000, b"ba" * 3_000_000)
        assert task.result(WAIT_S) == expected
        assert Task.get(task.task_id).result() == expected
        assert self.fetch(task)[0] == expected

    @needs("tasks")
    def test_a_tasks_exception_keeps_its_type(self, submit: Callable[..., Task]) -> None:
        def fail(key: str) -> None:
            raise KeyError(key)

        task = submit(fail, "lost")
        for _ in range(2):
            with pytest.raises(KeyError, match="lost"):
                task.result(WAIT_S)
        assert (task.status, task.exit_code) == ("failed", 1)
        assert "KeyError: 'lost'" in task.logs(stderr=True)
        assert self.fetch(task)[::2] == (("KeyError", "'lost'"), "failed")

    @needs("tasks")
    def test_a_task_exits_with_what_sys_exit_says(self, submit: Callable[..., Task]) -> None:
        def leave(code: int) -> None:
            import sys

            print("leaving")
            sys.exit(code)

        task = submit(leave, 7)
        with pytest.raises(flow.RemoteError, match="SystemExit: 7"):  # the caller's program is not to end by it
            task.result(WAIT_S)
        assert (task.status, task.exit_code, task.logs()) == ("failed", 7, "leaving\n")

    @needs("tasks")
    def test_a_task_whose_process_is_killed(self, submit: Callable[..., Task]) -> None:
        def die() -> None:
            import os

            os.kill(os.getpid(), 9)

        task = submit(die)
        with pytest.raises(flow.WorkerLost):
            task.result(WAIT_S)
        assert (task.status, task.exit_code) == ("failed", 137)

    @needs("tasks")
    def test_logs_of_a_task(self, submit: Callable[..., Task]) -> None:
        def speak() -> None:
            import sys

            for n in range(200):
                print("out", n)
            print("err", file=sys.stderr)
            print("no newline", end="")

        task = submit(speak).wait(WAIT_S)
        lines = [f"out {n}\n" for n in range(200)] + ["no newline"]
        assert task.logs(tail=None) == "".join(lines)
        assert task.logs(tail=3) == "".join(lines[-3:])
        assert task.logs(stderr=True) == "err\n"
        assert list(task.logs(follow=True, tail=None)) == lines
        assert list(task.logs(follow=True, tail=2)) == lines[-2:]

    @needs("tasks")
    def test_following_a_task_that_runs(self, submit: Callable[..., Task], meeting: Any) -> None:
        meet = meeting.meet

        def speak() -> str:
            print("first", flush=True)
            meet().recv(1)
            print("second", flush=True)
            return "done"

        task = submit(speak)
        lines = task.logs(follow=True)
        assert next(lines) == "first\n"
        assert (task.status, task.logs()) == ("running", "first\n")
        with pytest.raises(TimeoutError):
            task.wait(0.1)
        meeting.next().let_go()
        assert list(lines) == ["second\n"]
        assert task.result(WAIT_S) == "done"

    @needs("tasks")
    def test_cancelling_a_task_ends_its_processes(self, submit: Callable[..., Task], meeting: Any) -> None:
        meet = meeting.meet

        def busy() -> None:
            import subprocess
            import sys

            meet()
            program = "import socket, sys; s = socket.create_connection(eval(sys.argv[1])); s.send(b'x\\n'); s.recv(1)"
            connection = meet("parent")
            where = connection.getpeername()[:2]
            subprocess.Popen([sys.executable, "-c", program, repr(where)], start_new_session=True)
            connection.recv(1)

        task = submit(busy)
        met = [meeting.next() for _ in range(3)]
        assert {"parent", "x"} <= {one.said for one in met}
        task.cancel("seen enough")
        assert task.wait(WAIT_S).status == "cancelled"
        assert task.reason == "seen enough"
        with pytest.raises(flow.CallCancelled, match="seen enough"):
            task.result()
        for one in met:
            if one.said:
                one.wait_for_end()
        assert task.cancel("again").reason == "seen enough"

    @needs("tasks")
    def test_a_task_outlives_a_client_that_is_killed(self, clean_up: None, meeting: Any) -> None:
        meet = meeting.meet

        def work() -> str:
            connection = meet("begun")
            connection.recv(1)
            print("on my own")
            return "done"

        function = self.function(work)
        read, write = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
            child = os.fork()
        if not child:  # the client
            try:
                os.write(write, function.submit().task_id.encode())
            finally:
                os.kill(os.getpid(), 9)
        os.close(write)
        _, status = os.waitpid(child, 0)
        with os.fdopen(read) as pipe:
            task = Task.get(pipe.read())
        assert os.WTERMSIG(status) == 9
        met = meeting.next()
        assert task.status == "running"
        met.let_go()
        assert self.fetch(task) == ("done", "on my own\n", "completed")

    @needs("tasks", "timeout")
    def test_a_task_that_takes_too_long(self, submit: Callable[..., Task], meeting: Any) -> None:
        meet = meeting.meet

        def busy() -> None:
            meet().recv(1)

        task = submit(busy, timeout=1.5)
        with pytest.raises(flow.FunctionTimeout):
            task.result(WAIT_S)
        assert task.status == "failed"
        meeting.next().wait_for_end()

    @needs("tasks")
    def test_a_task_is_tried_again(self, submit: Callable[..., Task], meeting: Any) -> None:
        meet = meeting.meet

        def fail() -> str:
            if meet().recv(1) == b"!":
                raise OSError("failed")
            return "at last"

        task = submit(fail, retries=flow.Retries(3, initial_delay=0.01))
        meeting.next().let_go()
        meeting.next()._socket.sendall(b"?")
        assert task.result(WAIT_S) == "at last"
        assert task.to_dict()["attempts"] == 2

    @needs("tasks", "memory")
    def test_a_task_that_takes_too_much_memory(self, submit: Callable[..., Task]) -> None:
        def grow() -> None:
            kept = []
            while True:
                kept.append(b"x" * (16 << 20))

        task = submit(grow, memory="300MiB")
        with pytest.raises(flow.OutOfMemory):
            task.result(WAIT_S)
        assert task.status == "failed"

    @needs("tasks", "gpu")
    def test_a_task_with_gpus(self, submit: Callable[..., Task], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FLOW_GPUS", self.gpus)

        def visible() -> str:
            import os

            return os.environ["CUDA_VISIBLE_DEVICES"]

        assert len(submit(visible, gpu="a100:2").result(WAIT_S).split(",")) == 2
        assert len(submit(visible, gpu="h100").result(WAIT_S).split(",")) == 1
        with pytest.raises(flow.ResourceUnavailable):
            submit(visible, gpu="a100:64")

    @needs("tasks", "mounts")
    def test_a_task_with_a_mount(self, submit: Callable[..., Task], scratch: Path) -> None:
        if "shared-files" in self.unsupported:
            pytest.skip("the file of this case is on this machine")
        (scratch / "data.txt").write_text("staged")

        def read() -> str:
            with open("/data/data.txt") as file:
                return file.read()

        assert submit(read, mounts={"/data": str(scratch)}).result(WAIT_S) == "staged"

    @needs("tasks", "volumes")
    def test_tasks_share_a_volume(self, submit: Callable[..., Task]) -> None:
        def write() -> None:
            with open("/kept/file", "w") as file:
                file.write("of the first")

        def read() -> str:
            with open("/kept/file") as file:
                return file.read()

        mounts = {"/kept": "volume://contract-tasks"}
        submit(write, mounts=mounts)
        assert submit(read, mounts=mounts).result(WAIT_S) == "of the first"

    @needs("tasks")
    def test_a_tasks_secret_is_shown_nowhere(self, submit: Callable[..., Task], meeting: Any) -> None:
        meet = meeting.meet
        secret = f"secret-{os.urandom(8).hex()}"

        def work() -> bool:
            import os

            meet().recv(1)
            return os.environ["TOKEN"].startswith("secret-") and os.environ["PLAIN"] == "plain"

        task = submit(work, secrets={"TOKEN": secret}, env={"PLAIN": "plain"})
        met = meeting.next()
        assert secret not in repr(task) + str(task.to_dict())
        for place in self.places():
            for parent, _names, files in os.walk(place):
                for name in files:
                    path = os.path.join(parent, name)
                    if not os.path.isfile(path) or secret.encode() not in Path(path).read_bytes():
                        continue
                    assert not os.stat(path).st_mode & 0o077, f"{path} holds the secret, and others can read it"
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    assert secret.encode() not in (entry / "cmdline").read_bytes()
                except OSError:
                    continue
        met.let_go()
        assert task.result(WAIT_S) is True
        assert secret not in task.logs() + task.logs(stderr=True)

    def places(self) -> list[str]:
        """Directories of this machine where flowfn keeps things, here and for the backend."""
        return [os.environ[name] for name in ("FLOW_HOME", "FLOW_CACHE") if name in os.environ]

    @needs("tasks")
    def test_nothing_of_a_task_is_left_when_it_is_forgotten(self, submit: Callable[..., Task]) -> None:
        def work() -> str:
            print("said")
            return "value-of-the-task"

        submit(work).wait(WAIT_S)  # what is opened to ask for tasks stays open
        before = self.left_over()  # type: ignore[attr-defined]
        task = submit(work)
        assert task.result(WAIT_S) == "value-of-the-task"
        with Flow() as client:
            client.delete_tasks(task)
        assert self.left_since(before) == set()  # type: ignore[attr-defined]
        with pytest.raises(TaskNotFound):
            Task.get(task.task_id)
        for place in self.places():
            found = [path for path in Path(place).rglob("*") if task.task_id in path.name]
            assert found == []

    @needs("tasks")
    def test_a_module_of_the_project_goes_with_a_task(
        self, submit: Callable[..., Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        root = tmp_path / "project"
        root.mkdir()
        (root / "contract_task_module.py").write_text("def scale(x):\n    return 10 * x\n")
        monkeypatch.syspath_prepend(root)
        import importlib

        module = importlib.import_module("contract_task_module")
        try:
            assert submit(module.scale, 4).result(WAIT_S) == 40
        finally:
            sys.modules.pop("contract_task_module", None)

    @needs("tasks", "commands", commands={"command": "true"})
    def test_a_command(self, clean_up: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        root = tmp_path / "project"
        root.mkdir()
        (root / "words.txt").write_text("of the project\n")
        monkeypatch.chdir(root)
        with Flow() as client:
            task = client.submit("cat words.txt; echo $LEVEL >&2; exit 3", env={"LEVEL": "7"}, backend=self._backend)
            assert task.wait(WAIT_S).status == "failed"
        assert (task.exit_code, task.logs(), task.logs(stderr=True)) == (3, "of the project\n", "7\n")
        with pytest.raises(flow.TaskFailed):
            task.result()

    @needs("tasks", "commands", "nodes", nodes={"command": "true", "num_instances": 2})
    def test_a_command_on_several_nodes(self, clean_up: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        words = 'echo "$FLOW_NODE_RANK $PET_NODE_RANK of $FLOW_NODE_COUNT $PET_NNODES, $MASTER_ADDR:$MASTER_PORT"'
        with Flow() as client:
            task = client.submit(words, num_instances=2, backend=self._backend)
            assert task.wait(2 * WAIT_S).status == "completed", (task, task.logs(stderr=True))
        first, second = (task.logs(node=node).strip().split(", ") for node in (0, 1))
        assert (first[0], second[0]) == ("0 0 of 2 2", "1 1 of 2 2")
        assert first[1] == second[1] and ":" in first[1]

    @needs("tasks", "commands", "ports", ports={"command": "true", "ports": [8000]})
    def test_a_port_of_a_task(self, clean_up: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import socket
        import urllib.request

        monkeypatch.chdir(tmp_path)
        (tmp_path / "page.txt").write_text("served")
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        # It says that it listens before anybody asks.
        program = (
            f"import http.server as h; s = h.ThreadingHTTPServer(('', {port}), h.SimpleHTTPRequestHandler); "
            "print('up', flush=True); s.serve_forever()"
        )
        with Flow() as client:
            task = client.submit(["python3", "-c", program], ports=[port], backend=self._backend)
            assert next(task.logs(follow=True)) == "up\n"
            with urllib.request.urlopen(f"{task.endpoint(port)}/page.txt", timeout=WAIT_S) as page:
                assert page.read() == b"served"
            assert task.cancel().wait(WAIT_S).status == "cancelled"
