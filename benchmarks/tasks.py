"""Tasks and the command line: what they cost beside the same thing done by hand. One JSON line a case.

    python benchmarks/tasks.py [--rounds 20]

Cases are interleaved with what they are compared to; times are medians in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

FLOW = [sys.executable, "-c", "import sys; from flowfn.cli import main; sys.exit(main())"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(prefix="flowfn-bench-") as place:
        os.environ |= {"FLOW_HOME": f"{place}/home", "FLOW_CACHE": f"{place}/cache"}
        project = Path(place, "project")
        project.mkdir()
        (project / "main.py").write_text("print('hi')\n")
        os.chdir(project)
        first_line(rounds)
        commands(rounds)
        crowd()


def report(case: str, **values: float | int) -> None:
    print(json.dumps({"case": case, **{name: round(value, 2) for name, value in values.items()}}), flush=True)


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1000


def first_line(rounds: int) -> None:
    """From submit to the first line of output, beside bubblewrap by hand."""
    from flow import Flow

    client = Flow()
    sandbox = ["bwrap", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--tmpfs", "/tmp", "--unshare-pid"]

    def by_hand() -> None:
        with subprocess.Popen([*sandbox, "bash", "-c", "echo hi"], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()

    def task() -> None:
        next(iter(client.submit("echo hi").logs(follow=True)))

    task()
    hand, ours, submits, whole = [], [], [], []
    for _ in range(rounds):
        hand.append(timed(by_hand))
        ours.append(timed(task))
        submits.append(timed(lambda: client.submit("true")))
        whole.append(timed(lambda: client.submit("true").wait()))
    report(
        "submit to first line",
        by_hand_ms=statistics.median(hand),
        task_ms=statistics.median(ours),
        over_ms=statistics.median(ours) - statistics.median(hand),
        submit_returns_ms=statistics.median(submits),
        submit_to_end_ms=statistics.median(whole),
    )


def commands(rounds: int) -> None:
    """The command line, without and with many past tasks."""
    from flow import Flow
    from flowfn_runtime import taskdb, tasksql

    def command(*arguments: str) -> Callable[[], object]:
        return lambda: subprocess.run([*FLOW, *arguments], check=True, stdout=subprocess.DEVNULL)

    bare = [timed(lambda: subprocess.run([sys.executable, "-c", "pass"], check=True)) for _ in range(rounds)]
    shown = [timed(command("--help")) for _ in range(rounds)]
    few = [timed(command("ps")) for _ in range(rounds)]
    row = taskdb.get(Flow().submit("true").wait().task_id)
    with tasksql.connection("rwc") as db:
        values = taskdb._values(row)
        marks = ", ".join("?" * len(values))
        db.execute("BEGIN")
        rows = [(f"task_{number:012x}", *values[1:]) for number in range(10_000)]
        db.executemany(f"INSERT INTO tasks ({taskdb._COLUMNS}) VALUES (NULL, {marks})", rows)
        db.execute("COMMIT")
    many = [timed(command("ps")) for _ in range(rounds)]
    status = [timed(command("status", row.id)) for _ in range(rounds)]
    report(
        "command line",
        python_ms=statistics.median(bare),
        help_ms=statistics.median(shown),
        ps_ms=statistics.median(few),
        ps_of_10000_ms=statistics.median(many),
        status_of_10000_ms=statistics.median(status),
    )


def crowd() -> None:
    """Two hundred tasks one after another, and at once: time, memory and descriptors of the client."""
    from flow import Flow, Task

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    client = Flow()
    client.submit("true").wait()
    memory, files = resident(), len(os.listdir("/proc/self/fd"))
    tasks: list[Task] = []
    spent = timed(lambda: tasks.extend(client.submit("true") for _ in range(200)))
    for task in tasks:
        task.wait()
    report(
        "200 tasks",
        submits_per_s=200_000 / spent,
        client_growth_kib=(resident() - memory) / 1024,
        client_descriptors_more=len(os.listdir("/proc/self/fd")) - files,
    )


if __name__ == "__main__":
    main()
