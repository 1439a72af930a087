"""flowfn's calls beside those of other libraries.

    python benchmarks/calls.py                                  # everything, about three minutes
    python benchmarks/calls.py --case roundtrip --peer flowfn,mp
    python benchmarks/calls.py --cores 4 --out calls.jsonl

Prints one JSON line for each peer and metric (medians over interleaved rounds, and the ratio to flowfn: above 1, flowfn
is ahead), then one for each target. The exit status is 1 if a target was measured and missed. Peers that are not
installed are left out, and said to be: `pip install '.[bench]'` has them all.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import Peer, PeerMissing, Results, in_turn, isolation, wall_s

PEERS = ("flowfn", "ppe", "mp", "joblib", "ray", "dask", "raw")
# How many calls a peer's map makes: about a second's worth of each.
MAP_CALLS = {"flowfn": 100_000, "mp": 100_000, "joblib": 100_000, "ppe": 10_000, "ray": 2_000, "dask": 1_000}
PAYLOAD_CALLS = {"flowfn": 1000, "mp": 500, "joblib": 300, "ppe": 300, "ray": 200, "dask": 100}

# Whole programs with one result.
COLD = {
    "flowfn": "import flowfn as flow\n@flow.function\ndef f(): return 1\nassert f.remote() == 1",
    "ppe": (
        "import multiprocessing\nfrom concurrent.futures import ProcessPoolExecutor\ndef f(): return 1\n"
        "p = ProcessPoolExecutor(2, mp_context=multiprocessing.get_context('fork'))\nassert p.submit(f).result() == 1"
    ),
    "mp": (
        "import multiprocessing\ndef f(): return 1\n"
        "p = multiprocessing.get_context('fork').Pool(2)\nassert p.apply(f) == 1"
    ),
    "joblib": "import joblib\ndef f(): return 1\nassert joblib.Parallel(n_jobs=2)([joblib.delayed(f)()] * 2) == [1, 1]",
    "ray": (
        "import sys; sys.path.insert(0, {here!r})\nimport peers; peers.raise_loopback()\nimport ray\n"
        "ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level='ERROR')\n"
        "@ray.remote\ndef f(): return 1\nassert ray.get(f.remote()) == 1"
    ),
    "dask": (
        "from distributed import Client, LocalCluster\ndef f(): return 1\n"
        "def main():\n c = Client(LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None))\n"
        " assert c.submit(f).result() == 1\n"
        "if __name__ == '__main__': main()"
    ),
}
SINCE = "\nif __name__ == '__main__': import os, time; print(time.monotonic() - float(os.environ['BENCH_STARTED']))"
IMPORT = {
    "python": "pass",
    "flowfn": "import flowfn",
    "ppe": "from concurrent.futures import ProcessPoolExecutor",
    "mp": "import multiprocessing.pool",
    "joblib": "import joblib",
    "ray": "import ray",
    "dask": "import distributed",
}
DECORATE = {
    "flowfn": "import flowfn as flow\n@flow.function(gpu='a100', timeout=60)\ndef f(x: int) -> int: return x",
    "joblib": "import joblib\n@joblib.delayed\ndef f(x): return x",
    "ray": "import ray\n@ray.remote\ndef f(x): return x",
    "dask": "import dask, distributed\n@dask.delayed\ndef f(x): return x",
}


class Bench:
    """The peers that run, and what was measured of them."""

    def __init__(self, results: Results, wanted: Sequence[str], *, workers: int, timeout_s: float) -> None:
        self.results = results
        self.wanted = wanted
        self.workers = workers
        self.timeout_s = timeout_s
        self._running: dict[str, Peer | None] = {}

    def peer(self, case: str, name: str) -> Peer | None:
        """The peer's process, started when it is first wanted; None (said once) if it can't be."""
        if name not in self._running:
            try:
                self._running[name] = Peer(name, workers=self.workers, timeout_s=self.timeout_s)
            except PeerMissing as error:
                self._running[name] = None
                self.results.left_out(case, name, str(error))
        return self._running[name]

    def ask(
        self,
        case: str,
        rounds: int,
        units: dict[str, str],
        *,
        peers: Sequence[str] = PEERS,
        options: Callable[[str], dict[str, Any]],
        asked: str = "",
    ) -> None:
        """Ask every peer for one run of the case, round after round, and print the medians."""

        def action(name: str, peer: Peer) -> Callable[[], None]:
            def once() -> None:
                for variant, measured in peer.ask(asked or case, **options(name)).items():
                    for metric, value in measured.items():
                        shown = f"{name} ({variant})" if variant else name
                        higher = units[metric].endswith("/s")
                        self.results.add(case, shown, metric, units[metric], value, higher_is_better=higher)

            return once

        chosen = [name for name in PEERS if name in self.wanted and name in peers]
        running = {name: peer for name in chosen if (peer := self.peer(case, name))}
        for name, why in in_turn(rounds, {name: action(name, peer) for name, peer in running.items()}):
            self.results.left_out(case, name, str(why))
        self.results.print_case(case)

    def programs(self, case: str, sources: dict[str, str], rounds: int, *, slow: Sequence[str] = ()) -> None:
        """Run whole programs, round after round; `slow` ones in the first two only."""
        with tempfile.TemporaryDirectory() as folder:
            commands: dict[str, list[str]] = {}
            for name, source in sources.items():
                if name in self.wanted or name == "python":
                    path = Path(folder, f"{case}_{name}.py")
                    path.write_text(source)
                    try:
                        commands[name] = [*isolation(name if case == "cold" else ""), sys.executable, str(path)]
                    except PeerMissing as error:
                        self.results.left_out(case, name, str(error))

            def action(name: str) -> Callable[[], None]:
                def once() -> None:
                    whole, printed = wall_s(commands[name])
                    self.results.add(case, name, "seconds", "s", whole)
                    if printed:
                        self.results.add(case, name, "first_result_s", "s", float(printed))

                return once

            many = [name for name in commands if name not in slow]
            for some, times in ((list(commands), 2), (many, rounds - 2)):
                for name, why in in_turn(times, {name: action(name) for name in some if name in commands}):
                    commands.pop(name)
                    self.results.left_out(case, name, str(why))
        self.results.print_case(case)

    def close(self) -> None:
        for peer in self._running.values():
            if peer:
                peer.close()


def roundtrip(bench: Bench) -> None:
    bench.ask("roundtrip", 5, {"p50_us": "µs", "p99_us": "µs"}, options=lambda name: {"seconds": 0.25})


def map_(bench: Bench) -> None:
    units = {"calls_per_s": "calls/s", "grown_mib": "MiB"}
    bench.ask("map", 3, units, peers=list(MAP_CALLS), options=lambda name: {"n": MAP_CALLS[name]})


def million(bench: Bench) -> None:
    units = {"calls_per_s": "calls/s", "grown_mib": "MiB"}
    bench.ask("million", 2, units, peers=["flowfn"], options=lambda name: {"n": 1_000_000}, asked="map")


def array(bench: Bench) -> None:
    peers = [name for name in PEERS if name != "raw"]
    warm = {"flowfn": 3, "ray": 3}  # who reuses memory gets the chance to have some
    options = lambda name: {"mib": 256, "warm_up": warm.get(name, 1)}  # noqa: E731
    bench.ask("array", 3, {"seconds": "s"}, peers=peers, options=options)


def shared(bench: Bench) -> None:
    peers = ("flowfn", "joblib", "ray", "dask")
    bench.ask("shared", 3, {"seconds": "s"}, peers=peers, options=lambda name: {"mib": 256, "n": 16})


def payloads(bench: Bench) -> None:
    bench.ask(
        "payloads", 3, {"per_s": "calls/s"}, peers=list(PAYLOAD_CALLS), options=lambda name: {"n": PAYLOAD_CALLS[name]}
    )


def cold(bench: Bench) -> None:
    here = str(Path(__file__).parent)
    sources = {name: source.replace("{here!r}", repr(here)) + SINCE for name, source in COLD.items()}
    bench.programs("cold", sources, 7, slow=("ray", "dask"))


def imports(bench: Bench) -> None:
    bench.programs("import", IMPORT, 11, slow=("ray", "dask"))
    bench.programs("decorate", DECORATE, 11, slow=("ray", "dask"))


CASES: dict[str, Callable[[Bench], None]] = {
    "cold": cold,
    "import": imports,
    "roundtrip": roundtrip,
    "map": map_,
    "million": million,
    "array": array,
    "shared": shared,
    "payloads": payloads,
}


def targets(results: Results) -> bool:
    """What flowfn promises of itself, against what was measured; False if one is missed."""
    met: list[bool | None] = []

    def ratio(case: str, peers: Sequence[str], metric: str, *, higher: bool) -> float | None:
        ours, theirs = results.get(case, "flowfn", metric), results.best(case, peers, metric)
        if ours is None or theirs is None:
            return None
        return ours / theirs if higher else theirs / ours

    def say(text: str, value: float | None, limit: float, *, at_least: bool) -> None:
        met.append(results.print_target(text, value, limit, at_least=at_least))

    value = ratio("roundtrip", ["ppe"], "p50_us", higher=False)
    say("no-op round trip, times faster than ProcessPoolExecutor", value, 2, at_least=True)
    pool = results.get("roundtrip", "ppe", "p50_us")
    # Said of a machine where the pool takes 190 µs; another machine's share is taken in proportion.
    limit = 100 * (pool or 190) / 190
    say("no-op round trip, p50 in µs", results.get("roundtrip", "flowfn", "p50_us"), limit, at_least=False)
    value = ratio("map", ["mp", "joblib"], "calls_per_s", higher=True)
    say("no-op map, times the best of mp imap (no chunksize) and joblib", value, 2, at_least=True)
    say("no-op map, MiB that the client grows by", results.get("map", "flowfn", "grown_mib"), 16, at_least=False)
    few, many = results.get("map", "flowfn", "calls_per_s"), results.get("million", "flowfn", "calls_per_s")
    value = many / few if few and many else None
    say("no-op map of 10^6, throughput over that of 10^5", value, 0.8, at_least=True)
    say(
        "no-op map of 10^6, MiB that the client grows by",
        results.get("million", "flowfn", "grown_mib"),
        16,
        at_least=False,
    )
    value = ratio("cold", ["ppe"], "seconds", higher=False)
    say("whole cold process, of ProcessPoolExecutor's", 1 / value if value else None, 2, at_least=False)
    value = results.get("cold", "flowfn", "first_result_s")
    say("first result after the start of a cold process, ms", 1000 * value if value else None, 150, at_least=False)
    ours, bare = results.get("import", "flowfn", "seconds"), results.get("import", "python", "seconds")
    say("import flowfn, ms over bare Python", 1000 * (ours - bare) if ours and bare else None, 30, at_least=False)
    value = results.get("decorate", "flowfn", "seconds")
    say("import and decorate, ms of the whole process", 1000 * value if value else None, 120, at_least=False)
    for peer, name in (("ray", "Ray"), ("ppe", "ProcessPoolExecutor")):
        value = ratio("array", [peer], "seconds", higher=False)
        say(f"256 MiB there and back, times faster than {name}", value, 3, at_least=True)
    say("16 calls on one 256 MiB array, s", results.get("shared", "flowfn", "seconds"), 0.3, at_least=False)
    value = ratio("payloads", ["ppe"], "per_s", higher=True)
    say("1 MiB payloads, times ProcessPoolExecutor's rate", value, 3, at_least=True)
    return all(one is not False for one in met)


def names(accepted: Sequence[str]) -> Callable[[str], list[str]]:
    """An option's value: comma-separated names."""

    def parse(text: str) -> list[str]:
        chosen = [name.strip() for name in text.split(",")]
        if unknown := [name for name in chosen if name not in accepted]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose among {', '.join(accepted)}")
        return chosen

    return parse


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure flowfn's calls beside those of other libraries.")
    parser.add_argument("--case", type=names(list(CASES)), default=list(CASES), help=f"of: {', '.join(CASES)}")
    parser.add_argument("--peer", type=names(PEERS), default=PEERS, help=f"of: {', '.join(PEERS)}")
    parser.add_argument(
        "--cores", type=int, default=2, help="how many cores everything runs on, and workers a peer has"
    )
    parser.add_argument("--timeout", type=float, default=60, help="seconds that a peer may take for one run of a case")
    parser.add_argument("--out", type=argparse.FileType("w"), default=sys.stdout, help="a file for the JSON lines")
    options = parser.parse_args()

    cores = sorted(os.sched_getaffinity(0))[: options.cores]
    os.sched_setaffinity(0, cores)  # of this process and all that it starts
    results = Results(options.out)
    bench = Bench(results, options.peer, workers=len(cores), timeout_s=options.timeout)
    with tempfile.TemporaryDirectory(prefix="flowfn-bench-") as folder:
        os.environ.update(FLOW_HOME=f"{folder}/home", FLOW_CACHE=f"{folder}/cache")
        try:
            for case in options.case:
                started = time.perf_counter()
                CASES[case](bench)
                print(f"{case}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
        finally:
            bench.close()
    return 0 if targets(results) else 1


if __name__ == "__main__":
    sys.exit(main())
