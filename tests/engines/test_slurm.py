"""The slurm backend on a real Slurm: what jobs ask for, what is refused, the queue, and every way to lose a worker."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import SlurmCluster

import flowfn as flow
from flowfn.backends import registry, slurm, slurm_queue
from flowfn.testing import Meeting
from flowfn.testing.base import Met

WAIT_S = 60.0


@pytest.fixture
def cluster(slurm_cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    yield slurm_cluster
    flow.shutdown()
    assert slurm_cluster.jobs() == [], "jobs are left"


@pytest.fixture
def filled(cluster: SlurmCluster) -> Iterator[Callable[[str, str], None]]:
    """Fills a node of a partition with somebody's job, which ends with the test."""
    others: list[subprocess.Popen[bytes]] = []

    def fill(node: str, partition: str) -> None:
        command = ["srun", "-p", partition, "-w", node, "--exclusive", "--mem=0", "sh", "-c", "echo; exec cat"]
        job = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        others.append(job)
        assert job.stdout and job.stdout.readline() == b"\n"

    yield fill
    for job in others:
        job.terminate()
        job.wait()
        assert job.stdin and job.stdout
        job.stdin.close()
        job.stdout.close()
    flow.shutdown()


def wait_until(happened: Callable[[], bool]) -> None:
    """Asks Slurm again and again: it tells nobody by itself."""
    deadline = time.monotonic() + WAIT_S
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"


def job_number() -> str:
    return os.environ["SLURM_JOB_ID"]


def make(function: Callable[..., Any], backend: Any, **options: Any) -> Any:
    return flow.function(backend=backend, **options)(function)


class TestAsking:
    def test_for_all_that_a_function_needs(self, cluster: SlurmCluster) -> None:
        options = cluster.options(time="30m", extra="--comment=flowfn-test")
        number = make(
            lambda: __import__("os").environ["SLURM_JOB_ID"], options, gpu="a100:2", cpu=1.5, memory="1500MiB"
        )
        said = cluster.run("squeue", "-h", "-j", number.remote(), "-o", "%P|%C|%m|%b|%l|%N|%k")
        assert said.strip() == "main|2|1500M|gres:gpu:a100:2|30:00|n1|flowfn-test"

    def test_for_a_partition(self, cluster: SlurmCluster) -> None:
        def node() -> tuple[str, str]:
            return os.environ["SLURM_JOB_PARTITION"], os.environ["SLURMD_NODENAME"]

        assert make(node, cluster.options(partition="cpu")).remote() == ("cpu", "n3")

    def test_by_name_and_by_configuration(
        self, cluster: SlurmCluster, flow_home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        flow_home.mkdir(exist_ok=True)
        (flow_home / "config.toml").write_text('[backends.cluster]\ntype = "slurm"\npartition = "cpu"\n')
        node = make(lambda: __import__("os").environ["SLURMD_NODENAME"], "cluster")
        assert node.remote() == "n3"
        monkeypatch.setenv("FLOW_BACKEND", "slurm")
        assert flow.function(lambda: __import__("os").environ["SLURM_JOB_PARTITION"]).remote() == "main"

    def test_the_same_options_share_workers(self, cluster: SlurmCluster) -> None:
        first = make(job_number, cluster.options(partition="cpu"), max_workers=1).remote()
        assert make(job_number, cluster.options(partition="cpu"), max_workers=1).remote() == first
        assert make(job_number, cluster.options(partition="main"), max_workers=1).remote() != first
        assert registry.get(cluster.options()) is registry.get(cluster.options())

    def test_volumes_lie_in_the_home_that_was_chosen(self, cluster: SlurmCluster, tmp_path: Path) -> None:
        chosen = cluster.options(home=str(tmp_path / "there"))
        make(lambda: open("/kept/note", "w").close(), chosen, mounts={"/kept": "volume://kept"}).remote()
        assert len(list(tmp_path.glob("there/volumes/*/data/note"))) == 1

    def test_within_another_job(self, cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> None:
        """What Slurm says of the job that this process runs in is not meant for the workers' jobs."""
        monkeypatch.setenv("SLURM_JOB_ID", "4711")
        monkeypatch.setenv("SLURM_NTASKS", "4")
        monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
        assert make(job_number, cluster.options(), max_workers=1).remote() not in ("4711", None)

    def test_whatever_the_user_has_set_for_runs_of_their_own(
        self, cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in {"LABELIO": "1", "NTASKS": "3", "STDOUTMODE": "none", "NNODES": "2"}.items():
            monkeypatch.setenv(f"SLURM_{name}", value)
        assert make(abs, cluster.options(), max_workers=1).remote(-4) == 4

    def test_a_map_is_a_few_jobs(self, cluster: SlurmCluster) -> None:
        jobs = set(make(lambda n: __import__("os").environ["SLURM_JOB_ID"], cluster.options()).map(range(2_000)))
        assert 1 <= len(jobs) <= 3

    def test_the_terminal_and_the_label_name_the_job(self, cluster: SlurmCluster) -> None:
        def dies() -> None:
            os._exit(3)

        with pytest.raises(flow.WorkerLost, match=r"slurm job \d+ on n\d pid \d+.*status 3"):
            make(dies, cluster.options()).remote()


ALLOCATED = """
import os
import flowfn as flow

def where():
    import os
    return os.environ["SLURM_JOB_ID"], os.environ.get("CUDA_VISIBLE_DEVICES"), len(os.sched_getaffinity(0)), os.getpid()

if __name__ == "__main__":
    own = os.environ["SLURM_JOB_ID"]
    here = flow.function(where, backend=OPTIONS, gpu=1, memory="300MiB")
    def gather(n):
        import os, time
        open(PLACE + f"/{n}", "w").close()
        while len(os.listdir(PLACE)) < 2:
            time.sleep(0.01)
        return where()
    two = [*flow.function(gather, backend=OPTIONS, gpu=1, max_workers=2).map(range(2))]
    print({job for job, *_ in two} == {own}, sorted(gpu for _, gpu, *_ in two), len({pid for *_, pid in two}))
    print(flow.function(where, backend=OPTIONS).remote()[0] == own)
    print(here.remote()[0] == own)  # when one of the others has made room
    print(flow.function(where, backend=OPTIONS, memory="9GiB").remote()[0] == own)  # more than the job has
    print(flow.function(where, backend=APART).remote()[0] == own)
    try:
        flow.function(where, backend=ONLY, memory="9GiB").remote()
    except flow.ResourceUnavailable as error:
        print(error)
"""


class TestAllocations:
    def test_a_job_that_is_there_is_used(self, cluster: SlurmCluster, tmp_path: Path) -> None:
        (tmp_path / "meeting").mkdir()
        options = cluster.options()
        given = f"workers=3, cache={options.cache!r}, home={options.home!r}"
        text = ALLOCATED.replace("OPTIONS", f"flow.Slurm({given})").replace("PLACE", f"'{tmp_path}/meeting'")
        text = text.replace("APART", f"flow.Slurm({given}, allocation=False)").replace(
            "ONLY", f"flow.Slurm({given}, allocation=True)"
        )
        (tmp_path / "client").mkdir()
        program = tmp_path / "client" / "client.py"
        program.write_text(text)
        salloc = ["salloc", "--quiet", "-n1", "-c4", "--mem=2000", "--gres=gpu:a100:2"]
        done = subprocess.run([*salloc, sys.executable, str(program)], capture_output=True, text=True, timeout=100)
        lines = done.stdout.splitlines()
        assert lines[:5] == ["True ['0', '1'] 2", "True", "True", "False", "False"], done.stderr
        assert "this job (1 node of 4 cores, 1.95 GiB, a100:2)" in lines[5]

    def test_there_is_none(self, cluster: SlurmCluster) -> None:
        with pytest.raises(flow.ConfigError, match="in no Slurm job"):
            make(abs, cluster.options(allocation=True)).remote(-1)


class TestRefusing:
    def refused(self, cluster: SlurmCluster, backend: Any = None, **options: Any) -> str:
        with pytest.raises(flow.ResourceUnavailable) as caught:
            make(abs, backend or cluster.options(), **options).remote(-1)
        return str(caught.value)

    def test_a_partition_that_is_not_there(self, cluster: SlurmCluster) -> None:
        text = self.refused(cluster, cluster.options(partition="nowhere"))
        assert "'nowhere'" in text and "main (" in text and "cpu (" in text

    def test_gpus_that_are_not_there(self, cluster: SlurmCluster) -> None:
        for gpu in ("b200", "h100:2", "a100-80gb"):
            text = self.refused(cluster, gpu=gpu)
            assert gpu in text and "a100:2" in text and "h100:1" in text

    def test_more_than_a_node_has(self, cluster: SlurmCluster) -> None:
        assert "memory=64GiB" in self.refused(cluster, memory="64GiB", max_workers=1)
        assert "cpu=17" in self.refused(cluster, cpu=17, max_workers=1)

    def test_an_account_that_may_not(self, cluster: SlurmCluster) -> None:
        text = self.refused(cluster, cluster.options(partition="physics", account="chemistry"))
        assert "chemistry" in text and "physics" in text

    def test_features_options_and_nodes_that_are_not_there(self, cluster: SlurmCluster) -> None:
        assert "constraint=" in self.refused(cluster, cluster.options(constraint="nvlink"))
        assert "--nodelist=n9" in self.refused(cluster, cluster.options(extra=["--nodelist=n9"]))
        assert "--no-such-option" in self.refused(cluster, cluster.options(extra=["--no-such-option"]))
        assert "reservation=" in self.refused(cluster, cluster.options(reservation="mine"))

    def test_more_time_than_the_partition_allows(self, cluster: SlurmCluster) -> None:
        text = self.refused(cluster, cluster.options(partition="cpu", time="2h"))
        assert "time" in text.lower() and "cpu (" in text

    def test_where_slurm_is_not_installed(self, cluster: SlurmCluster) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", str(cluster.root))
            with pytest.raises(flow.BackendUnavailable, match="there is no sinfo") as caught:
                make(abs, cluster.options()).remote(-1)
        assert caught.value.hint and "slurm-client" in caught.value.hint

    def test_where_no_controller_answers(
        self, cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lines = cluster.conf.read_text().splitlines()
        other = [line if not line.startswith("SlurmctldPort") else "SlurmctldPort=1" for line in lines]
        (tmp_path / "slurm.conf").write_text("\n".join([*other, "SlurmctldTimeout=1", ""]))
        monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
        with pytest.raises(flow.BackendUnavailable, match="controller can't be reached"):
            make(abs, cluster.options()).remote(-1)

    def test_a_python_that_is_not_there(self, cluster: SlurmCluster) -> None:
        with pytest.raises(flow.BackendUnavailable, match="/no/python"):
            make(abs, cluster.options(python="/no/python")).remote(-1)

    def test_containers(self, cluster: SlurmCluster) -> None:
        with pytest.raises(flow.ConfigError, match="no containers"):
            make(abs, cluster.options(), image="docker.io/library/python:3.12").remote(-1)


class TestQueue:
    def test_a_job_waits_for_its_turn(
        self, cluster: SlurmCluster, filled: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        filled("n3", "urgent")
        future = make(job_number, cluster.options(partition="cpu"), max_workers=1).spawn()
        backend: Any = registry.get(cluster.options(partition="cpu"))
        wait_until(lambda: bool(cluster.jobs()) and any(connection.reason for connection in list(backend._live)))
        (connection,) = backend._live
        assert future.status == "pending" and connection.reason in ("Resources", "Priority")
        assert not backend.has_room(flow.function(abs).spec)
        cluster.run("scancel", "--partition=urgent")
        assert future.result(timeout=WAIT_S) == connection.job

    def test_one_that_waits_too_long(self, cluster: SlurmCluster, filled: Callable[[str, str], None]) -> None:
        filled("n3", "urgent")
        with pytest.raises(
            flow.ResourceUnavailable, match=r"waited longer than 1 s in the queue: (Resources|Priority)"
        ):
            make(abs, cluster.options(partition="cpu", wait="1s")).remote(-1)
        assert len(cluster.jobs()) == 1

    def test_one_that_is_cancelled_there(self, cluster: SlurmCluster, filled: Callable[[str, str], None]) -> None:
        filled("n3", "urgent")
        future = make(abs, cluster.options(partition="cpu"), max_workers=1).spawn(-1)
        wait_until(lambda: len(cluster.jobs()) == 2)
        cluster.run("scancel", "--partition=cpu")
        with pytest.raises(flow.BackendUnavailable, match="was cancelled from outside"):
            future.result(timeout=WAIT_S)

    def test_one_that_no_call_wants_any_more(
        self, cluster: SlurmCluster, filled: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(slurm, "UNWANTED_S", 0.0)
        filled("n3", "urgent")
        function = make(abs, cluster.options(partition="cpu"), max_workers=1)
        future = function.spawn(-1)
        wait_until(lambda: len(cluster.jobs()) == 2)
        assert future.cancel()
        wait_until(lambda: len(cluster.jobs()) == 1)
        future = function.spawn(-5)
        wait_until(lambda: len(cluster.jobs()) == 2)
        cluster.run("scancel", "--partition=urgent")
        assert future.result(timeout=WAIT_S) == 5

    def test_one_that_nobody_wants_keeps_none_from_making_room(self, cluster: SlurmCluster) -> None:
        options = cluster.options(partition="cpu")
        kept = make(job_number, options, memory="9GiB", env={"SHAPE": "kept"})
        first = kept.remote()
        unwanted = make(job_number, options, memory="9GiB", env={"SHAPE": "unwanted"}).spawn()
        wait_until(lambda: set(cluster.jobs()) - {first} != set())  # by then the first may have made room for it
        unwanted.cancel()
        assert make(job_number, options, memory="9GiB", env={"SHAPE": "wanted"}).remote()

    def test_shutting_down_while_one_waits(self, cluster: SlurmCluster, filled: Callable[[str, str], None]) -> None:
        filled("n3", "urgent")
        future = make(abs, cluster.options(partition="cpu"), max_workers=1).spawn(-1)
        wait_until(lambda: len(cluster.jobs()) == 2)
        flow.shutdown()
        assert len(cluster.jobs()) == 1
        assert isinstance(
            future.exception(timeout=WAIT_S) if not future.cancelled() else flow.FlowError(), flow.FlowError
        )

    def test_a_terminal_shows_why(
        self, cluster: SlurmCluster, filled: Callable[[str, str], None], tmp_path: Path
    ) -> None:
        filled("n3", "urgent")
        script = _script(tmp_path, "import flowfn as flow\nflow.function(abs, backend=OPTIONS).remote(-1)\n", cluster)
        ours, theirs = pty.openpty()
        client = subprocess.Popen([sys.executable, script], stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs)
        os.close(theirs)
        try:
            seen = b""
            while b"waits in Slurm's queue: " not in seen:
                seen += os.read(ours, 4096)
        finally:
            client.kill()
            client.wait()
            os.close(ours)
        wait_until(lambda: len(cluster.jobs()) == 1)

    def test_idle_workers_of_other_shapes_make_room(self, cluster: SlurmCluster) -> None:
        """For cores and memory too, not only for GPUs."""
        options = cluster.options(partition="cpu")
        one, other = (make(job_number, options, memory="9GiB", env={"SHAPE": shape}) for shape in ("one", "other"))
        seen = [one.remote(), other.remote(), one.remote()]
        assert len(set(seen)) == 3


class TestLosing:
    """What Slurm does to jobs is not the function's fault: it is tried again, whatever its retries are."""

    @pytest.fixture
    def waiting(self, meeting: Meeting) -> Callable[..., Any]:
        """A function that waits to be let go, and says in which job it is; a generator, if need be."""
        meet = meeting.meet

        def wait() -> str:
            import os

            number = os.environ["SLURM_JOB_ID"]
            meet(number).recv(1)
            return number

        return wait

    @pytest.fixture
    def generating(self, meeting: Meeting) -> Callable[..., Any]:
        """A generator that is stuck after its first value: its loss is never tried again, so that it is seen."""
        meet = meeting.meet

        def generate() -> Any:
            import os

            yield os.environ["SLURM_JOB_ID"]
            meet().recv(1)

        return generate

    def test_a_job_that_is_cancelled_from_outside(
        self, cluster: SlurmCluster, waiting: Callable[..., Any], meeting: Meeting
    ) -> None:
        future = make(waiting, cluster.options(), max_workers=1).spawn()
        first = meeting.next()
        cluster.run("scancel", first.said)
        first.wait_for_end()
        second = meeting.next()
        assert second.said != first.said
        second.let_go()
        assert future.result(timeout=WAIT_S) == second.said

    def test_one_that_is_cancelled_every_time(
        self, cluster: SlurmCluster, waiting: Callable[..., Any], meeting: Meeting
    ) -> None:
        future = make(waiting, cluster.options(), max_workers=1, retries=None, name="doomed").spawn()
        for _ in range(3):
            cluster.run("scancel", meeting.next().said)
        error = future.exception(timeout=WAIT_S)
        assert isinstance(error, flow.WorkerLost)
        assert "was cancelled from outside" in str(error) and "tried 3 times" in str(error)

    def test_several_jobs_at_once_in_a_map(self, cluster: SlurmCluster, meeting: Meeting) -> None:
        meet = meeting.meet

        def item(n: int) -> int:
            import os

            if n < 3:
                meet(os.environ["SLURM_JOB_ID"]).recv(1)
            return n

        results = make(item, cluster.options()).map(range(200), order_outputs=False)
        seen: list[int] = []
        first = [meeting.next() for _ in range(3)]
        assert len({met.said for met in first}) == 3
        cluster.run("scancel", *(met.said for met in first))
        for _ in range(3):
            meeting.next().let_go()
        seen += results
        assert sorted(seen) == list(range(200))

    def test_one_that_is_preempted(
        self,
        cluster: SlurmCluster,
        generating: Callable[..., Any],
        filled: Callable[[str, str], None],
        meeting: Meeting,
    ) -> None:
        stream = make(generating, cluster.options(partition="cpu")).remote()
        number = next(stream)
        meeting.next()
        filled("n3", "urgent")
        with pytest.raises(flow.WorkerLost, match=f"Slurm job {number} was preempted"):
            next(stream)

    def test_one_whose_worker_is_killed(
        self, cluster: SlurmCluster, generating: Callable[..., Any], meeting: Meeting
    ) -> None:
        stream = make(generating, cluster.options()).remote()
        next(stream)
        meeting.next()
        (pid,) = [pid for name in ("n1", "n2", "n3") for pid in cluster.workers(name)]
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(flow.WorkerLost, match="SIGKILL"):
            next(stream)

    def test_a_node_that_dies(self, cluster: SlurmCluster, generating: Callable[..., Any], meeting: Meeting) -> None:
        options = cluster.options(partition="cpu")
        stream = make(generating, options).remote()
        next(stream)
        met = meeting.next()
        cluster.kill_node("n3")
        try:
            met.wait_for_end()
            with pytest.raises(
                flow.WorkerLost, match=r"Slurm job \d+ (lost its node|was cancelled)|connection was lost"
            ):
                next(stream)
        finally:
            cluster.start_node("n3")
            wait_until(lambda: cluster.states()["n3"] == "idle")
        assert make(abs, options).remote(-3) == 3

    def test_the_step_daemon_of_a_worker_is_killed(
        self, cluster: SlurmCluster, generating: Callable[..., Any], meeting: Meeting
    ) -> None:
        """Slurm itself does not see it, and srun would wait for ever."""
        stream = make(generating, cluster.options()).remote()
        number = next(stream)
        met = meeting.next()
        (worker,) = [pid for name in ("n1", "n2", "n3") for pid in cluster.workers(name)]
        os.kill(cluster.step_daemon(worker), signal.SIGKILL)
        met.wait_for_end()
        with pytest.raises(flow.WorkerLost, match=f"Slurm job {number} (did not answer|was cancelled)"):
            next(stream)

    def test_a_daemon_that_dies_takes_no_worker_along(
        self, cluster: SlurmCluster, waiting: Callable[..., Any], meeting: Meeting
    ) -> None:
        future = make(waiting, cluster.options(partition="cpu")).spawn()
        met = meeting.next()
        daemon = cluster.daemons.pop("n3")
        daemon.kill()
        daemon.wait()
        cluster.start_node("n3")
        met.let_go()
        assert future.result(timeout=WAIT_S) == met.said

    def test_a_controller_that_dies_takes_no_worker_along(
        self, cluster: SlurmCluster, waiting: Callable[..., Any], meeting: Meeting
    ) -> None:
        function = make(waiting, cluster.options(partition="cpu"), max_workers=1)
        first, second = function.spawn(), function.spawn()
        met = meeting.next()
        cluster.kill_controller()
        met.let_go()
        assert first.result(timeout=WAIT_S) == met.said
        met = meeting.next()
        met.let_go()
        assert second.result(timeout=WAIT_S) == met.said
        cluster.start_controller()
        assert make(abs, cluster.options(), env={"ANOTHER": "worker"}).remote(-3) == 3
        flow.shutdown()
        # A controller writes down what it knows every few seconds: what ended just before still runs for this one.
        cluster.run("scancel", "--user", str(os.getuid()))
        wait_until(lambda: cluster.jobs() == [])

    def test_a_node_that_is_drained(self, cluster: SlurmCluster, waiting: Callable[..., Any], meeting: Meeting) -> None:
        """What runs there goes on; what is new goes elsewhere."""
        future = make(waiting, cluster.options(partition="cpu")).spawn()
        met = meeting.next()
        cluster.run("scontrol", "update", "nodename=n3", "state=drain", "reason=test")
        try:
            met.let_go()
            assert future.result(timeout=WAIT_S) == met.said
            node = make(lambda: __import__("os").environ["SLURMD_NODENAME"], cluster.options(), memory="9GiB")
            assert {node.options(env={"N": str(n)}).remote() for n in range(2)} <= {"n1", "n2"}
        finally:
            cluster.run("scontrol", "update", "nodename=n3", "state=resume")

    def test_the_runtime_that_is_killed_while_it_starts(self, cluster: SlurmCluster, tmp_path: Path) -> None:
        """The job ends before a worker is there: that is an error, with what was said."""
        broken = tmp_path / "python"
        broken.write_text("#!/bin/sh\necho the interpreter is broken >&2\nexit 3\n")
        broken.chmod(0o755)
        with pytest.raises(flow.BackendUnavailable, match="the interpreter is broken"):
            make(abs, cluster.options(python=str(broken))).remote(-1)


CLIENT = """
import os, sys
import flowfn as flow

meet = MEET

def wait(n):
    import os, socket
    connection = socket.create_connection(meet)
    connection.sendall(f"{os.environ['SLURM_JOB_ID']}\\n".encode())
    connection.recv(1)

running = flow.function(wait, backend=OPTIONS, max_workers=2)
futures = [running.spawn(n) for n in range(3)]
print("started", flush=True)
input()
waiting = flow.function(wait, backend=OPTIONS, memory="15GiB").spawn(0)
waiting.result()
"""


def _script(tmp_path: Path, text: str, cluster: SlurmCluster, meeting: Meeting | None = None) -> str:
    """A client's program, in a project of its own."""
    options = cluster.options(partition="cpu")
    shown = f"flow.Slurm(partition='cpu', workers=3, cache={options.cache!r}, home={options.home!r})"
    meet = repr(meeting._listener.getsockname()[:2]) if meeting else ""
    place = tmp_path / "client"
    place.mkdir()
    (place / "client.py").write_text(textwrap.dedent(text).replace("OPTIONS", shown).replace("MEET", meet))
    return str(place / "client.py")


class TestClients:
    def started(self, script: str, meeting: Meeting) -> tuple[Any, list[Met]]:
        """A client's program, and its two calls that run."""
        client = subprocess.Popen(
            [sys.executable, script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            bufsize=0,
        )
        assert client.stdout and client.stdout.readline() == b"started\n"
        return client, [meeting.next(), meeting.next()]

    @pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    def test_one_that_is_killed_leaves_no_job(
        self, cluster: SlurmCluster, meeting: Meeting, tmp_path: Path, how: signal.Signals
    ) -> None:
        client, met = self.started(_script(tmp_path, CLIENT, cluster, meeting), meeting)
        client.stdin.write(b"\n")
        client.stdin.close()
        wait_until(lambda: len(cluster.jobs()) == 3)  # two run, and one waits
        os.kill(client.pid, how)
        client.wait()
        client.stdout.close()
        for one in met:
            one.wait_for_end()
        wait_until(lambda: cluster.jobs() == [])

    def test_one_whose_whole_session_is_killed(self, cluster: SlurmCluster, meeting: Meeting, tmp_path: Path) -> None:
        """As when a terminal or a login session is closed."""
        client, met = self.started(_script(tmp_path, CLIENT, cluster, meeting), meeting)
        client.stdin.close()
        os.killpg(client.pid, signal.SIGKILL)
        client.wait()
        client.stdout.close()
        for one in met:
            one.wait_for_end()
        wait_until(lambda: cluster.jobs() == [])

    def test_a_forked_child_leaves_the_parents_workers_alone(self, cluster: SlurmCluster) -> None:
        function = make(job_number, cluster.options(), max_workers=1)
        before = function.remote()
        pid = os.fork()
        if pid == 0:
            os._exit(0 if function.remote() != before else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert function.remote() == before
        wait_until(lambda: len(cluster.jobs()) == 1)


def test_one_look_at_the_queue_serves_all_who_ask(cluster: SlurmCluster, tmp_path: Path) -> None:
    """However many workers are lost at a time."""
    import threading

    real = subprocess.run(["which", "squeue"], capture_output=True, text=True, check=True).stdout.strip()
    counted = tmp_path / "bin"
    counted.mkdir()
    (counted / "squeue").write_text(f'#!/bin/sh\necho >> {tmp_path}/calls\nsleep 0.2\nexec {real} "$@"\n')
    (counted / "squeue").chmod(0o755)
    queue = slurm_queue.Queue()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{counted}:{os.environ['PATH']}")
        threads = [threading.Thread(target=queue.job, args=("flowfn-x-1",)) for _ in range(30)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert 1 <= (tmp_path / "calls").read_text().count("\n") <= 3


def test_the_cluster_is_asked_ahead_and_once(
    cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = subprocess.run(["which", "sinfo"], capture_output=True, text=True, check=True).stdout.strip()
    counted = tmp_path / "bin"
    counted.mkdir()
    (counted / "sinfo").write_text(f'#!/bin/sh\necho >> {tmp_path}/calls\nexec {real} "$@"\n')
    (counted / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{counted}:{os.environ['PATH']}")
    assert make(abs, cluster.options()).remote(-1) == 1
    assert (tmp_path / "calls").read_text() == "\n"
    flow.shutdown()
    queue = slurm_queue.Queue()
    queue.look_ahead()
    asking = queue._ahead
    assert asking is not None
    queue.close()  # before anybody wanted to know
    assert asking.returncode is not None
    assert {node.name for node in queue.nodes()} == {"n1", "n2", "n3"}


def test_the_documentation_runs_as_it_stands(cluster: SlurmCluster, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "slurm.md").read_text()
    blocks = re.findall(r"```python no-run\n(.*?)```", page, re.DOTALL)
    (tmp_path / "page").mkdir()
    program = tmp_path / "page" / "page.py"
    program.write_text("\n".join(blocks))
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["10.0", "[10.0, 5.0, 3.3333333333333335]", "2.0", ""]
