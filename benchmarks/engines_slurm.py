"""Slurm: one srun a call by hand, and submitit (sbatch, with results in files of the shared filesystem)."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import HERE, PeerMissing, Results, wall_s
from engines_common import MAP_CALLS, PART, WORKERS, Engine, measure, workplace


@contextmanager
def cluster() -> Iterator[None]:
    """The cluster that this machine belongs to if SLURM_CONF says so, else one of three nodes on this machine."""
    if "SLURM_CONF" in os.environ:
        yield
        return
    command = [sys.executable, str(HERE.parent / "tests" / "engines" / "slurm_cluster.py")]
    started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert started.stdin and started.stdout
    try:
        said = started.stdout.readline().strip()
        if not said.startswith("SLURM_CONF="):
            raise PeerMissing(said or "Slurm did not start")
        os.environ["SLURM_CONF"] = said.partition("=")[2]
        yield
    finally:
        os.environ.pop("SLURM_CONF", None)
        started.stdin.close()
        started.wait()
        started.stdout.close()


def slurm(results: Results, rounds: int) -> None:
    """All cases, beside srun and submitit."""
    with workplace("bench-slurm-") as place, cluster():
        import flowfn as flow

        def srun(program: str) -> list[str]:
            return ["srun", "--mpi=none", "--mem=100M", sys.executable, "-c", program]

        def submitit(body: str) -> float:
            program = textwrap.dedent(SUBMITIT).format(place=place, workers=WORKERS) + CASES[body]
            file = Path(place, "submitit_peer.py")
            file.write_text(program)
            return float(wall_s([sys.executable, str(file)])[1]) * (MAP_CALLS / PART if body == "map" else 1)

        first = "import flowfn as flow\nassert flow.function(abs, backend='slurm').remote(-1) == 1"
        backend = flow.Slurm(workers=WORKERS)
        measure(results, rounds, Engine("slurm", backend, first, {"srun": srun}, {"submitit": submitit}))
        of = f"slurm map of {MAP_CALLS} calls"
        ours, theirs = results.get(of, "flowfn", "s"), results.get(of, "submitit", "s")
        ratio = theirs / ours if ours and theirs else None
        results.print_target("slurm: map beside submitit, times faster", ratio, 20, at_least=True)


SUBMITIT = """
    import os, time
    try:
        import submitit
    except ImportError as error:
        raise SystemExit("submitit is not installed")
    executor = submitit.AutoExecutor("{place}/submitit", cluster="slurm")
    executor.update_parameters(timeout_min=10, slurm_array_parallelism={workers}, slurm_mem="100M")
"""
ONCE = "submitted = executor.submit(abs, -1)\nassert submitted.result() == 1\n"
STARTED = "started = time.monotonic()\n"
SINCE = "print(time.monotonic() - started)\n"
CASES = {
    "first": f"{ONCE}print(time.monotonic() - float(os.environ['BENCH_STARTED']))\n",
    "warm": ONCE + STARTED + ONCE + SINCE,
    "map": f"{STARTED}jobs = executor.map_array(abs, range({PART}))\n"
    f"assert [job.result() for job in jobs] == list(range({PART}))\n{SINCE}",
}
