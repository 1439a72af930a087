"""Tasks whose jobs Slurm's controller has forgotten: their states are its accounting's to say."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import engines
import pytest
import slurm_cluster as slurm
from slurm_cluster import SlurmCluster
from test_slurm_tasks import directory, make_work, wait_until

import flowfn as flow
from flowfn.client import Flow
from flowfn.testing import Meeting
from flowfn_runtime.slurmstate import NAME, accounts_of, judge


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:
    engines.need(slurm.why_not(accounting=True))
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    cluster = SlurmCluster(accounting=True)
    monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
    try:
        yield cluster.start()
    finally:
        cluster.remove()


def test_what_became_of_forgotten_jobs(cluster: SlurmCluster, meeting: Meeting) -> None:
    away = cluster.options(extra=["--no-requeue", "--nodelist=n2"])
    with Flow() as client:
        lost = flow.function(make_work(meeting), backend=away).submit()  # type: ignore[call-overload]
        here = cluster.options(extra=["--nodelist=n3"])
        killed = flow.function(make_work(meeting), backend=here).submit()  # type: ignore[call-overload]
        completed = client.submit("true", backend=here)
        failed = client.submit("exit 3", backend=here)
        waits = client.submit("true", backend=cluster.options(extra=["--hold"]))
        never = client.submit("true", backend=cluster.options(), depends_on=[killed])
        for met in (meeting.next(), meeting.next()):
            if met.said.split()[1] == "n2":
                cluster.kill_node("n2")
                cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
            else:
                os.kill(int((directory(cluster, killed) / "pid").read_text()), signal.SIGKILL)
        cluster.run("scancel", f"--name={NAME}{waits.task_id}")
        wait_until(lambda: cluster.run("squeue", "-h", "-t", "all") == "")
        for task in (completed, failed):  # they left word, and it is lost
            shutil.rmtree(directory(cluster, task))
        wait_until(lambda: lost.status == "failed")  # for a moment it might have been requeued
        found = {task.task_id: task for task in client.list_tasks()}
    assert "lost its node" in lost.reason
    assert found[completed.task_id].status == "completed" and completed.exit_code == 0 and completed.ended_at
    assert found[failed.task_id].status == "failed" and failed.exit_code == 3 and "exit code 3" in failed.reason
    assert killed.status == "failed" and "ended without a word (FAILED" in killed.reason
    assert found[waits.task_id].status == "cancelled" and "from outside" in waits.reason
    assert found[never.task_id].status == "failed" and "depends on" in never.reason


def test_what_nobody_knows_any_more(cluster: SlurmCluster, meeting: Meeting) -> None:
    task = flow.function(make_work(meeting), backend=cluster.options()).submit()  # type: ignore[call-overload]
    meeting.next()
    assert cluster.accounting is not None
    cluster.accounting.stop()
    os.kill(int((directory(cluster, task) / "pid").read_text()), signal.SIGKILL)
    wait_until(lambda: task.status == "failed")
    assert "Slurm job" in task.reason


@pytest.mark.parametrize(
    ("line", "state", "code", "words"),
    [
        ("flowfn-x|1|COMPLETED|n1|0:0|1795484536|None", "completed", 0, ""),
        ("flowfn-x|2|FAILED|n1|3:0|1795484536|None", "failed", 3, "ended without a word (FAILED, exit code 3)"),
        ("flowfn-x|2|FAILED|n1|0:9|1795484536|None", "failed", None, "ended without a word (FAILED)"),
        ("flowfn-x|3|NODE_FAIL|n2|0:0|1795484538|None", "failed", None, "lost its node"),
        ("flowfn-x|4|TIMEOUT|n1|0:0|1795484565|None", "failed", None, "time limit"),
        ("flowfn-x|5|CANCELLED by 0|n1|0:15|1795484565|None", "cancelled", None, "from outside"),
        ("flowfn-x|6|OUT_OF_MEMORY|n1|0:125|1795484565|None", "failed", None, "memory limit"),
    ],
)
def test_what_accounting_says_becomes_a_state(line: str, state: str, code: int | None, words: str) -> None:
    found = judge(accounts_of(line)["flowfn-x"], {})
    assert (found.state, found.exit_code) == (state, code)
    assert words in found.reason and (found.ended_at or 0) // 1e6 == 1795
