"""flowfn on an engine beside the engine by hand, doing the same work.

    python benchmarks/engines.py                       # every engine that is here
    python benchmarks/engines.py --engine slurm --rounds 5 --out engines.jsonl

Prints one JSON line for each peer and metric: the median over interleaved rounds, and the ratio to flowfn (above 1,
flowfn is ahead), then one for each target. An engine or peer that is missing is left out, and said to be. An engine's
part is one function, which starts the engine if need be: see `slurm`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from common import HERE, PeerMissing, Results, environment, in_turn, wall_s

MAP_CALLS = 1000
PAYLOAD_MIB = 64
WARM_CALLS = 200
WORKERS = 4  # at a time, of every peer


def run_case(results: Results, case: str, rounds: int, actions: Mapping[str, Callable[[], None]]) -> None:
    """One case: every peer once a round, then its lines."""
    for peer, error in in_turn(rounds, actions):
        results.left_out(case, peer, str(error))
    results.print_case(case)


def seconds(action: Callable[[], object]) -> float:
    """How long it takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def magnitude(number: int) -> int:
    """What every peer calls."""
    return abs(number)


# Slurm: one srun a call by hand, and submitit (sbatch, with results in files of the shared filesystem).


@contextmanager
def slurm_cluster() -> Iterator[None]:
    """The cluster that this machine belongs to if SLURM_CONF says so, else one of three nodes on this machine."""
    if "SLURM_CONF" in os.environ:
        yield
        return
    command = [sys.executable, str(HERE.parent / "tests" / "engines" / "slurm_cluster.py")]
    cluster = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert cluster.stdin and cluster.stdout
    try:
        said = cluster.stdout.readline().strip()
        if not said.startswith("SLURM_CONF="):
            raise PeerMissing(said or "Slurm did not start")
        os.environ["SLURM_CONF"] = said.partition("=")[2]
        yield
    finally:
        os.environ.pop("SLURM_CONF", None)
        cluster.stdin.close()
        cluster.wait()
        cluster.stdout.close()


def slurm(results: Results, rounds: int) -> None:
    """First result, warm call, map of no-op calls, and a payload there and back."""
    with tempfile.TemporaryDirectory(prefix="bench-slurm-") as place, slurm_cluster():
        os.environ.update(FLOW_HOME=f"{place}/home", FLOW_CACHE=f"{place}/cache")
        os.chdir(place)
        import flowfn as flow

        options = flow.Slurm(workers=WORKERS)
        srun = ["srun", "--mpi=none", "--mem=100M", sys.executable]

        def by_hand(*arguments: str, data: bytes | None = None) -> None:
            subprocess.run([*srun, *arguments], input=data, capture_output=True, check=True, env=environment())

        def submitit(body: str) -> float:
            program = textwrap.dedent(SUBMITIT).format(place=place, workers=WORKERS) + textwrap.dedent(body)
            Path("submitit_peer.py").write_text(program)
            return float(wall_s([sys.executable, "submitit_peer.py"])[1])

        # A whole program with one result.
        first = "import flowfn as flow\nassert flow.function(abs, backend='slurm').remote(-1) == 1"
        once = "submitted = executor.submit(abs, -1)\nassert submitted.result() == 1\n"

        def add(case: str, peer: str, value: float) -> None:
            results.add(case, peer, "s", "s", value)

        run_case(
            results,
            "slurm first result",
            rounds,
            {
                "flowfn": lambda: add("slurm first result", "flowfn", wall_s([sys.executable, "-c", first])[0]),
                "srun": lambda: add("slurm first result", "srun", seconds(lambda: by_hand("-c", "print(abs(-1))"))),
                "submitit": lambda: add("slurm first result", "submitit", submitit(once + SINCE_START)),
            },
        )

        function = flow.function(backend=options)(magnitude)
        function.remote(-1)

        def warm() -> None:
            took = seconds(lambda: [function.remote(-1) for _ in range(WARM_CALLS)])
            add("slurm warm call", "flowfn", took / WARM_CALLS)

        run_case(
            results,
            "slurm warm call",
            rounds,
            {
                "flowfn": warm,
                "srun": lambda: add("slurm warm call", "srun", seconds(lambda: by_hand("-c", "print(abs(-1))"))),
                "submitit": lambda: add(
                    "slurm warm call", "submitit", submitit(once + "started = time.monotonic()\n" + once + SINCE)
                ),
            },
        )

        # By hand and with submitit every call is a process on a node: of these a part is done, and what the rest would
        # take is as much again.
        part = MAP_CALLS // 20

        def several() -> None:
            with ThreadPoolExecutor(WORKERS) as threads:
                list(threads.map(lambda n: by_hand("-c", f"print(abs({n}))"), range(part)))

        mapped = f"started = time.monotonic()\njobs = executor.map_array(abs, range({part}))\n"
        mapped += "assert [job.result() for job in jobs] == list(range({part}))\n".replace("{part}", str(part))
        case = f"slurm map of {MAP_CALLS} calls"
        run_case(
            results,
            case,
            rounds,
            {
                "flowfn": lambda: add(case, "flowfn", seconds(lambda: list(function.map(range(MAP_CALLS))))),
                "srun": lambda: add(case, "srun", seconds(several) * MAP_CALLS / part),
                "submitit": lambda: add(case, "submitit", submitit(mapped + SINCE) * MAP_CALLS / part),
            },
        )

        data = os.urandom(1 << 20) * PAYLOAD_MIB
        same = flow.function(backend=options)(lambda value: value)
        same.remote(b"")
        case = f"slurm {PAYLOAD_MIB} MiB there and back"
        cat = "import shutil, sys; shutil.copyfileobj(sys.stdin.buffer, sys.stdout.buffer, 1 << 20)"
        run_case(
            results,
            case,
            rounds,
            {
                "flowfn": lambda: add(case, "flowfn", seconds(lambda: same.remote(data))),
                "srun": lambda: add(case, "srun", seconds(lambda: by_hand("-c", cat, data=data))),
            },
        )
        flow.shutdown()
        targets = (
            ("map beside submitit, times faster", "submitit", f"slurm map of {MAP_CALLS} calls", 20),
            ("payload beside srun, times as fast", "srun", f"slurm {PAYLOAD_MIB} MiB there and back", 0.9),
        )
        for text, peer, of, limit in targets:
            ours, theirs = results.get(of, "flowfn", "s"), results.get(of, peer, "s")
            ratio = theirs / ours if ours and theirs else None
            results.print_target(f"slurm: {text}", ratio, limit, at_least=True)


SUBMITIT = """
    import os, time
    try:
        import submitit
    except ImportError as error:
        raise SystemExit("submitit is not installed")
    executor = submitit.AutoExecutor("{place}/submitit", cluster="slurm")
    executor.update_parameters(timeout_min=10, slurm_array_parallelism={workers}, slurm_mem="100M")
"""
SINCE = "print(time.monotonic() - started)\n"
SINCE_START = "print(time.monotonic() - float(os.environ['BENCH_STARTED']))\n"


# SSH: a login for each call by hand, with and without a connection that is shared (ControlMaster).


def ssh(results: Results, rounds: int) -> None:
    """First result, warm call, map of no-op calls, and a payload there and back, against sshd on loopback."""
    sys.path.insert(0, str(HERE.parent / "tests" / "engines"))
    import sshd  # type: ignore[import-not-found,unused-ignore]

    if reason := sshd.why_not():
        raise PeerMissing(reason)
    server = sshd.Sshd().start()
    try:
        with tempfile.TemporaryDirectory(prefix="bench-ssh-", dir="/tmp") as place:
            os.environ.update(FLOW_HOME=f"{place}/home", FLOW_CACHE=f"{place}/cache")
            os.chdir(place)
            _ssh(results, rounds, server.url, str(server.config))
    finally:
        server.remove()


def _ssh(results: Results, rounds: int, url: str, config: str) -> None:
    import flowfn as flow
    from flowfn.backends.ssh import SshBackend

    python = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    shared = ["-o", "ControlMaster=auto", "-o", "ControlPath=ctl", "-o", "ControlPersist=60"]

    def by_hand(options: list[str], program: str, data: bytes | None = None) -> None:
        argv = ["ssh", "-F", config, *options, url, f"{python} -c '{program}'"]
        subprocess.run(argv, input=data, capture_output=True, check=True)

    def add(case: str, peer: str, value: float) -> None:
        results.add(case, peer, "s", "s", value)

    def peers(case: str, action: Callable[[list[str]], float], ours: Callable[[], float]) -> None:
        run_case(
            results,
            case,
            rounds,
            {
                "flowfn": lambda: add(case, "flowfn", ours()),
                "ssh": lambda: add(case, "ssh", action([])),
                "ssh shared": lambda: add(case, "ssh shared", action(shared)),
            },
        )

    one = "print(abs(-1))"
    # A program with one result: the interpreter and the library start here, and a worker there.
    first = (
        "import flowfn as flow; from flowfn.backends.ssh import SshBackend\n"
        f"b = SshBackend({url!r}, config={config!r})\nassert flow.function(backend=b)(abs).remote(-1) == 1"
    )
    peers(
        "ssh first result",
        lambda options: seconds(lambda: by_hand(options, one)),
        lambda: wall_s([sys.executable, "-c", first])[0],
    )

    backend = SshBackend(url, config=config)
    function = flow.function(backend=backend, max_workers=WORKERS)(magnitude)
    function.remote(-1)
    peers(
        "ssh warm call",
        lambda options: seconds(lambda: by_hand(options, one)),
        lambda: seconds(lambda: [function.remote(-1) for _ in range(WARM_CALLS)]) / WARM_CALLS,
    )

    part = MAP_CALLS // 20

    def several(options: list[str]) -> float:
        with ThreadPoolExecutor(WORKERS) as threads:
            work = seconds(lambda: list(threads.map(lambda _: by_hand(options, one), range(part))))
        return work * MAP_CALLS / part

    peers(f"ssh map of {MAP_CALLS} calls", several, lambda: seconds(lambda: list(function.map(range(MAP_CALLS)))))

    data = os.urandom(1 << 20) * PAYLOAD_MIB
    same = flow.function(backend=backend)(lambda value: value)
    same.remote(b"")
    case = f"ssh {PAYLOAD_MIB} MiB there and back"
    cat = "import shutil, sys; shutil.copyfileobj(sys.stdin.buffer, sys.stdout.buffer, 1 << 20)"
    peers(
        case,
        lambda options: seconds(lambda: by_hand(options, cat, data)),
        lambda: seconds(lambda: same.remote(data)),
    )
    subprocess.run(["ssh", "-F", config, *shared, "-O", "exit", url], capture_output=True)
    flow.shutdown()
    backend.close()
    for text, peer, of, limit in (
        ("warm call beside a shared connection, times faster", "ssh shared", "ssh warm call", 20),
        ("payload beside ssh by hand, times as fast", "ssh shared", case, 0.9),
    ):
        ours, theirs = results.get(of, "flowfn", "s"), results.get(of, peer, "s")
        results.print_target(f"ssh: {text}", theirs / ours if ours and theirs else None, limit, at_least=True)


ENGINES: dict[str, Callable[[Results, int], None]] = {"slurm": slurm, "ssh": ssh}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default=",".join(ENGINES), help="which, separated by commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", help="a file for the JSON lines, in place of standard output")
    arguments = parser.parse_args()
    with open(arguments.out, "w") if arguments.out else sys.stdout as out:
        results = Results(out)
        for name in arguments.engine.split(","):
            try:
                ENGINES[name](results, arguments.rounds)
            except PeerMissing as error:
                results.left_out(name, "flowfn", str(error))


if __name__ == "__main__":
    main()
