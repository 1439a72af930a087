"""Tasks as jobs of a real Ray: what happens to them from outside, and what clients are told."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import ray_cluster
from ray_cluster import RayCluster, wait_until

import flowfn as flow
from flowfn import places
from flowfn.backends.ray_tasks import judge
from flowfn.backends.ray_turns import FAIL, GO, WAIT, Turn, decide
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
    with ray_cluster.running(jobs=True, client=True) as made:
        yield made
        places.close_all()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


@pytest.fixture
def cluster(started: RayCluster, project: Path) -> Iterator[RayCluster]:
    if started.broken:
        places.close_all()
    yield started.whole()
    if started.broken:
        return
    with Flow() as client:
        for task in client.list_tasks(status=["pending", "running"], limit=None):
            task.cancel().wait(WAIT_S)


def submit(cluster: RayCluster, function: Callable[..., Any], address: str | None = None, **options: Any) -> Task:
    from flowfn.backends.ray import RayBackend

    backend = RayBackend(**cluster.options(address=address or cluster.address))
    task: Task = flow.function(backend=backend, **options)(function).submit()
    return task


def RayBackend(**options: Any) -> flow.Backend:
    """Imported late: Ray may be missing."""
    from flowfn.backends import ray

    return ray.RayBackend(**options)


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


def left_on_nodes(cluster: RayCluster, task: Task) -> list[Path]:
    return [path for path in (cluster.home / "ray-jobs").iterdir() if path.name.startswith(task.task_id)]


def test_a_client_that_is_killed(cluster: RayCluster, project: Path) -> None:
    (project / "client.py").write_text(SUBMITS.format(options=cluster.options()))
    client = subprocess.run([sys.executable, "client.py"], stdout=subprocess.PIPE, text=True, timeout=WAIT_S)
    assert client.returncode == -signal.SIGKILL
    task = Task.get(client.stdout.strip())
    assert isinstance(task.result(WAIT_S), int) and task.logs() == "begun\n"
    assert left_on_nodes(cluster, task) == []


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
    data = os.urandom(1 << 20) * 64
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
        with pytest.raises(flow.ResourceUnavailable, match="there are no 4 nodes in the Ray cluster that have a CPU"):
            client.submit("true", num_instances=4, backend=backend)
        with pytest.raises(flow.ResourceUnavailable, match=r"there are no 2 nodes .* gpu=h100"):
            client.submit("true", num_instances=2, instance_type="h100", backend=backend)
        with pytest.raises(flow.BackendUnavailable, match="no Ray cluster can be had at 127"):
            client.submit("true", backend=RayBackend(address="127.0.0.1:1"))
        assert client.list_tasks() == []


@pytest.mark.parametrize("refused", [3, None])
def test_a_jobs_server_that_does_not_answer(
    cluster: RayCluster, refused: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a moment it is given one, and then an error; after which nobody waits again until it has answered."""
    from flowfn.backends import ray_server

    monkeypatch.setattr(ray_server, "PAUSES_S", (0.05,) * 4)
    came = 0

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal came
        came += 1
        if refused is None or came <= refused:
            writer.close()
            await writer.wait_closed()
            return
        there, to = await asyncio.open_connection(*cluster.dashboard)

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while data := await source.read(1 << 16):
                sink.write(data)
            sink.close()

        await asyncio.gather(pump(reader, to), pump(there, writer))

    async def ask() -> None:
        nonlocal came
        async with await asyncio.start_server(pass_on, "127.0.0.1", 0) as between:
            host, port = between.sockets[0].getsockname()
            server = ray_server.Server(lambda: f"{host}:{port}")
            if refused is not None:
                assert (await server.ask("get_version")).isdigit()
                return
            for times in (5, 1):
                came = 0
                with pytest.raises(ConnectionError, match="does not answer on the cluster's head"):
                    await server.ask("get_version")
                assert came == times

    async def run() -> None:
        await ask()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)  # connections are closed before the loop ends

    asyncio.run(run())


# Ranks meet, and say below which process of Ray each of them runs.
RANK = """
import os, socket, time
rank, count = int(os.environ["FLOW_NODE_RANK"]), int(os.environ["FLOW_NODE_COUNT"])
where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
assert len(os.environ["FLOW_NODE_IPS"].split(",")) == count
pid = os.getpid()
above = []
while pid > 1:
    pid = int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1])
    above.append(pid)
if rank == 0:
    listener = socket.create_server(where)
    others = [listener.accept()[0] for _ in range(count - 1)]
    met = sorted(other.recv(1) for other in others)
    for other in others:
        other.sendall(b"!")
else:
    while True:
        try:
            link = socket.create_connection(where)
            break
        except ConnectionRefusedError:
            time.sleep(0.1)
    link.sendall(str(rank).encode())
    met = link.recv(1)
print(met, os.environ.get("CUDA_VISIBLE_DEVICES"), *above)
"""


class TestSeveralNodes:
    def test_ranks_meet(self, cluster: RayCluster) -> None:
        with Flow() as client:
            task = client.submit(["python", "-c", RANK], num_instances=3, backend=RayBackend(**cluster.options()))
            assert task.wait(WAIT_S).status == "completed", (task.reason, task.logs(stderr=True))
        said = [task.logs(node=node) for node in range(3)]
        assert [words.partition(" None")[0] for words in said] == ["[b'1', b'2']", "b'!'", "b'!'"]
        raylets = [set(map(int, words.split("None")[1].split())) & set(cluster.raylets) for words in said]
        assert set.union(*raylets) == set(cluster.raylets) and all(len(above) == 1 for above in raylets)
        assert left_on_nodes(cluster, task) == []

    def test_each_has_gpus_of_its_node(self, cluster: RayCluster) -> None:
        words = 'echo "$FLOW_NODE_RANK: $CUDA_VISIBLE_DEVICES"'
        backend = RayBackend(**cluster.options())
        with Flow() as client:
            task = client.submit(words, num_instances=2, instance_type="1", backend=backend).wait(WAIT_S)
        assert task.status == "completed", (task.reason, task.logs(stderr=True))
        said = [task.logs(node=node).strip() for node in (0, 1)]
        assert [words[:3] for words in said] == ["0: ", "1: "] and all(words[3:] in ("0", "1") for words in said)

    def test_one_that_fails_ends_the_others_and_is_tried_again(self, cluster: RayCluster, meeting: Meeting) -> None:
        where, port = meeting._listener.getsockname()
        program = f"""
import os, socket
link = socket.create_connection(({where!r}, {port}))
link.sendall(os.environ["FLOW_NODE_RANK"].encode() + b"\\n")
os._exit(link.recv(1)[0])
"""
        with Flow() as client:
            task = client.submit(
                ["python", "-c", program], num_instances=2, retries=1, backend=RayBackend(**cluster.options())
            )
            for _ in range(2):
                met = sorted((meeting.next(), meeting.next()), key=lambda one: one.said)
                assert [one.said for one in met] == ["0", "1"]
                met[1]._socket.sendall(b"\3")
                met[0].wait_for_end()
            assert task.wait(WAIT_S).status == "failed"
        assert (task.reason, task.exit_code) == ("node 1 exit code 3", 3)
        assert "attempt 1 failed (node 1 exit code 3)" in task.logs(stderr=True)
        assert left_on_nodes(cluster, task) == []

    def test_a_node_that_is_lost(self, cluster: RayCluster) -> None:
        with Flow() as client:
            task = client.submit("echo up; sleep 613", num_instances=2, backend=RayBackend(**cluster.options()))
            assert next(iter(task.logs(follow=True, node=1))) == "up\n"
            actors = [pid for pid in cluster.processes() if ray_cluster._command(pid).startswith(b"ray::Node")]
            assert len(actors) == 2
            os.kill(actors[0], signal.SIGKILL)
            assert task.wait(WAIT_S).status == "failed"
        said = [task.logs(node=node, stderr=True) for node in (0, 1)]
        assert "killed by SIGKILL" in task.reason and sum("is lost: " in words for words in said) == 1
        assert b"sleep\x00613" not in cluster.commands()

    def test_it_is_cancelled_while_it_waits_for_room(self, cluster: RayCluster, meeting: Meeting) -> None:
        first = submit(cluster, make_work(meeting), gpu="h100")
        met = meeting.next()
        with Flow() as client:
            backend = RayBackend(**cluster.options())
            task = client.submit("true", num_instances=2, instance_type="1", backend=backend)
            wait_until(lambda: task.refresh().reason == "it waits for room on 2 nodes", "it does not wait")
            assert task.cancel("not needed").wait(WAIT_S).reason == "not needed"
            assert (task.status, task.started_at) == ("cancelled", None)
        met.let_go()
        assert first.result(WAIT_S) == "done"

    def test_it_is_cancelled(self, cluster: RayCluster) -> None:
        with Flow() as client:
            task = client.submit("echo up; sleep 611", num_instances=2, backend=RayBackend(**cluster.options()))
            assert next(iter(task.logs(follow=True))) == "up\n"
            assert task.cancel("enough").wait(WAIT_S).status == "cancelled"
        assert task.reason == "enough"
        assert b"sleep\x00611" not in cluster.commands()
        assert left_on_nodes(cluster, task) == []

    def test_a_driver_that_is_killed(self, cluster: RayCluster) -> None:
        with Flow() as client:
            task = client.submit("echo up; sleep 612", num_instances=2, backend=RayBackend(**cluster.options()))
            assert next(iter(task.logs(follow=True))) == "up\n"
            os.kill(driver_of(cluster, task), signal.SIGKILL)
            assert task.wait(WAIT_S).status == "failed"
        wait_until(lambda: b"sleep\x00612" not in cluster.commands(), "ranks are left")

    def test_a_call(self, cluster: RayCluster, project: Path) -> None:
        (project / "ranks.py").write_text("import os\n\ndef rank():\n    return int(os.environ['FLOW_NODE_RANK'])\n")
        with Flow() as client:
            backend = RayBackend(**cluster.options())
            assert client.invoke("ranks.py", "rank", num_instances=2, backend=backend) == 0


class TestOrder:
    def test_what_completes_and_what_fails(self, cluster: RayCluster, meeting: Meeting) -> None:
        backend = RayBackend(**cluster.options())
        first = submit(cluster, make_work(meeting), name="first")
        with Flow() as client:
            second = client.submit("echo second", depends_on=[first], backend=backend)
            third = client.submit("exit 4", depends_on=[first, second], name="third", backend=backend)
            never = client.submit("echo never", depends_on=[third], backend=backend)
            met = meeting.next()
            wait_until(lambda: second.refresh().reason == f"it waits for {first.task_id}", second.reason)
            assert (second.status, third.status, never.status) == ("pending", "pending", "pending")
            met.let_go()
            assert never.wait(WAIT_S).status == "failed"
        assert never.reason == f"it depends on {third.name} ({third.task_id}), which failed"
        assert (second.status, second.logs(), third.exit_code) == ("completed", "second\n", 4)
        assert first.ended_at <= second.started_at and second.ended_at <= third.started_at

    def test_what_waits_is_cancelled(self, cluster: RayCluster, meeting: Meeting) -> None:
        first = submit(cluster, make_work(meeting))
        with Flow() as client:
            backend = RayBackend(**cluster.options())
            second = client.submit("echo second", depends_on=[first], name="second", backend=backend)
            third = client.submit("echo third", depends_on=[second], backend=backend)
            assert second.cancel("not needed").wait(WAIT_S).reason == "not needed"
            assert third.wait(WAIT_S).status == "failed"
            assert third.reason == f"it depends on {second.name} ({second.task_id}), which was cancelled"
        meeting.next().let_go()
        assert first.result(WAIT_S) == "done"

    def test_one_at_a_time_has_a_volume(self, cluster: RayCluster, meeting: Meeting) -> None:
        mounts = {"/kept": "volume://turns"}
        tasks = [submit(cluster, make_work(meeting), mounts=mounts) for _ in range(3)]
        shared = submit(cluster, make_work(meeting), mounts={"/kept": "volume://others"})
        met = {meeting.next(), meeting.next()}
        assert [task.refresh().status for task in (*tasks, shared)] == ["running", "pending", "pending", "running"]
        assert tasks[1].reason == f"it waits for a volume that {tasks[0].task_id} has"
        assert tasks[2].reason == "it waits for a volume; 2 tasks are before it"
        os.kill(driver_of(cluster, tasks[0]), signal.SIGKILL)  # and says nothing of it
        for _ in range(2):
            meeting.next().let_go()
        assert [task.wait(WAIT_S).status for task in tasks] == ["failed", "completed", "completed"]
        assert shared.status == "running"
        for one in met:
            one.let_go()
        assert shared.result(WAIT_S) == "done"

    def test_a_keeper_that_is_killed_meanwhile(self, cluster: RayCluster, meeting: Meeting) -> None:
        first = submit(cluster, make_work(meeting))
        met = meeting.next()
        with Flow() as client:
            second = client.submit("echo second", depends_on=[first], backend=RayBackend(**cluster.options()))
            [keeper] = [pid for pid in cluster.processes() if ray_cluster._command(pid).startswith(b"ray::Keeper")]
            os.kill(keeper, signal.SIGKILL)
            met.let_go()
            assert second.wait(WAIT_S).logs() == "second\n"


def test_parts_of_the_cluster_that_are_lost(cluster: RayCluster, meeting: Meeting) -> None:
    """A node, and then all of it."""
    cluster.broken = True
    on_node = submit(cluster, make_work(meeting), gpu="h100")
    on_head = submit(cluster, make_work(meeting), cluster.url, gpu="a100")  # by Ray's client
    met = [meeting.next(), meeting.next()]
    os.kill(cluster.raylets[1], signal.SIGKILL)
    with pytest.raises(flow.TaskFailed, match="its Ray job ended without a word"):
        on_node.result(2 * WAIT_S)
    assert on_node.logs() == "begun\n"  # it was kept elsewhere
    assert on_head.status == "running"
    cluster.remove()
    assert on_head.refresh().status == "running"  # nobody can say otherwise
    assert "this is what was known when ray answered last; now: " in on_head.reason
    for one in met:
        one.wait_for_end()


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


class TestTurns:
    TURNS: ClassVar[dict[str, Turn]] = {
        "a": Turn(1, "one", volumes=("v",)),
        "b": Turn(2, "two", volumes=("v", "w")),
        "c": Turn(3, "three", ("a",), ("w",)),
    }

    @pytest.mark.parametrize(
        ("task", "ended", "what", "why"),
        [
            ("a", {}, GO, ""),
            ("b", {}, WAIT, "it waits for a volume that a has"),
            ("b", {"a": "failed"}, GO, ""),
            ("c", {}, WAIT, "it waits for a"),
            ("c", {"a": "completed"}, WAIT, "it waits for a volume that b has"),
            ("c", {"a": "completed", "b": "cancelled"}, GO, ""),
            ("c", {"a": "failed"}, FAIL, "it depends on one (a), which failed"),
            ("c", {"a": "cancelled"}, FAIL, "it depends on one (a), which was cancelled"),
        ],
    )
    def test_whose_it_is(self, task: str, ended: dict[str, str], what: str, why: str) -> None:
        assert decide(task, self.TURNS, ended) == (what, why)

    def test_a_task_that_is_not_known(self) -> None:
        assert decide("d", {"d": Turn(1, "four", ("gone",))}, {})[0] == FAIL
