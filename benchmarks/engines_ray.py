"""Ray by hand beside flowfn on it, on a Ray of this machine: tasks (`ray task`) and actors (`ray actor`).

Then once more on a cluster whose workers are on a second node, in a network of its own behind a link, as root; there
flowfn reaches its workers by TCP, and for comparison they are relayed by Ray.

For `engines.py`, which calls `ray`. By itself:

    python benchmarks/engines_ray.py [--rounds 5] [--second-node]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

from common import HERE, PeerMissing, Results, in_turn
from engines_common import OBJECTS, objects, staged

MAP_CALLS = 10_000
TASKS_OF_MAP = 1000  # with a raw task each this part is done, and the whole taken to be ten times as long
PAYLOAD_MIB = 256
WARM_CALLS = 200
WORKERS = 4


def ray(results: Results, rounds: int) -> None:
    """All cases, and some of them with workers on a second node."""
    try:
        import numpy
        import ray as raw
    except ImportError as error:
        raise PeerMissing(str(error)) from None
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled")
    with tempfile.TemporaryDirectory(prefix="bench-ray-", dir="/tmp") as place:
        os.environ.update(FLOW_HOME=f"{place}/home", FLOW_CACHE=f"{place}/cache", RAY_TMPDIR=place)
        os.mkdir(f"{place}/project")  # nothing of Ray's in it, which would be sent as the user's files
        os.chdir(f"{place}/project")
        raw.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers need not find this file
        start(raw)
        try:
            _first(results, rounds, raw)
            _warm(results, rounds, raw, numpy)
            _staged(results, rounds, raw)
        finally:
            raw.shutdown()
    second_node(results, rounds)


def second_node(results: Results, rounds: int) -> None:
    """First result, warm call, and a payload there and back, where the nodes are other machines."""
    import numpy
    import ray as raw

    sys.path.insert(0, str(HERE.parent / "tests" / "engines"))
    import ray_cluster  # type: ignore[import-not-found,unused-ignore]

    if os.getuid() != 0:
        raise PeerMissing("a second node in a network of its own takes root")
    store = {"object_store_memory": 3 << 30}
    nodes: list[dict[str, Any]] = [{"num_cpus": 0, **store}, {"num_cpus": 2 * WORKERS, "away": True, **store}]
    network = ray_cluster.Network()
    os.environ.update(ray_cluster.ENVIRON)
    raw.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    cluster = ray_cluster.RayCluster(nodes, network=network)
    os.environ.update(XDG_RUNTIME_DIR=str(cluster.sockets), FLOW_HOME=str(cluster.home))
    os.mkdir(cluster.root / "project")
    os.chdir(cluster.root / "project")
    try:
        network.make()
        cluster.start()
        _on_second_node(results, rounds, raw, numpy, cluster)
    finally:
        raw.shutdown()
        cluster.remove()
        network.remove()


def _on_second_node(results: Results, rounds: int, raw: Any, numpy: Any, cluster: Any) -> None:
    import flowfn as flow
    from flowfn.backends.ray import RayBackend

    def again() -> None:
        flow.shutdown()
        raw.shutdown()
        raw.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")

    def first(call: Callable[[], object]) -> Callable[[], float]:
        def run() -> float:
            again()
            return _seconds(call)

        return run

    direct, relayed = (RayBackend(**cluster.options(direct=direct)) for direct in (True, False))
    case = "ray, second node: {}".format
    _case(
        results,
        case("first result"),
        rounds,
        {
            "flowfn": first(lambda: flow.function(backend=direct)(magnitude).remote(-1)),
            "flowfn, relayed": first(lambda: flow.function(backend=relayed)(magnitude).remote(-1)),
            "ray task": first(lambda: raw.get(raw.remote(magnitude).remote(-1))),
            "ray actor": first(lambda: raw.get(raw.remote(Actor).remote().magnitude.remote(-1))),
        },
    )
    again()
    array = numpy.arange(PAYLOAD_MIB << 17, dtype=numpy.float64)
    task, actor = raw.remote(same), raw.remote(num_cpus=1)(Actor).remote()
    calls: dict[str, Callable[[Any], Any]] = {
        "flowfn": flow.function(backend=direct)(same).remote,
        "flowfn, relayed": flow.function(backend=relayed)(same).remote,
        "ray task": lambda value: raw.get(task.remote(value)),
        "ray actor": lambda value: raw.get(actor.same.remote(value)),
    }
    for what, value, count in (("warm call", -1, WARM_CALLS), (f"{PAYLOAD_MIB} MiB there and back", array, 1)):

        def timed(call: Callable[[Any], Any], value: Any = value, count: int = count) -> Callable[[], float]:
            def run() -> float:
                call(value)  # what the first of each round takes is not measured
                return _seconds(lambda: [call(value) for _ in range(count)]) / count

            return run

        _case(results, case(what), rounds, {peer: timed(call) for peer, call in calls.items()})
        mine, theirs = (results.get(case(what), peer, "s") for peer in ("flowfn", "ray task"))
        ratio = theirs / mine if mine and theirs else None
        results.print_target(f"{case(what)} beside a task, times as fast", ratio, 1 / 1.1, at_least=True)
    flow.shutdown()


def start(raw: Any) -> None:
    # Room for idle workers of ours beside those of Ray: who waits for whom is not what is measured.
    raw.init(num_cpus=2 * WORKERS, include_dashboard=False, log_to_driver=False, logging_level="ERROR")


def magnitude(number: int) -> int:
    return abs(number)


def same(value: Any) -> Any:
    return value


class Actor:
    def magnitude(self, number: int) -> int:
        return abs(number)

    def magnitudes(self, numbers: list[int]) -> list[int]:
        return [abs(number) for number in numbers]

    def same(self, value: Any) -> Any:
        return value


def _case(results: Results, case: str, rounds: int, actions: Mapping[str, Callable[[], float]]) -> None:
    """Each action says how many seconds it took."""

    def measured(peer: str, action: Callable[[], float]) -> Callable[[], None]:
        return lambda: results.add(case, peer, "s", "s", action())

    for peer, error in in_turn(rounds, {peer: measured(peer, action) for peer, action in actions.items()}):
        results.left_out(case, peer, str(error))
    results.print_case(case)


def _seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _first(results: Results, rounds: int, raw: Any) -> None:
    """The first result of a driver that is connected, of which nothing runs on the cluster yet."""
    import flowfn as flow

    def again() -> None:
        flow.shutdown()
        raw.shutdown()
        start(raw)

    def ours() -> float:
        again()
        return _seconds(lambda: flow.function(backend="ray")(magnitude).remote(-1))

    def task() -> float:
        again()
        return _seconds(lambda: raw.get(raw.remote(magnitude).remote(-1)))

    def actor() -> float:
        again()
        return _seconds(lambda: raw.get(raw.remote(Actor).remote().magnitude.remote(-1)))

    _case(results, "ray first result", rounds, {"flowfn": ours, "ray task": task, "ray actor": actor})
    again()


def _warm(results: Results, rounds: int, raw: Any, numpy: Any) -> None:
    import flowfn as flow

    function = flow.function(backend="ray", max_workers=WORKERS)(magnitude)
    task = raw.remote(magnitude)
    actor = raw.remote(num_cpus=0)(Actor).remote()
    function.remote(-1), raw.get(task.remote(-1)), raw.get(actor.magnitude.remote(-1))

    def each(call: Callable[[], object]) -> Callable[[], float]:
        return lambda: _seconds(lambda: [call() for _ in range(WARM_CALLS)]) / WARM_CALLS

    _case(
        results,
        "ray warm call",
        rounds,
        {
            "flowfn": each(lambda: function.remote(-1)),
            "ray task": each(lambda: raw.get(task.remote(-1))),
            "ray actor": each(lambda: raw.get(actor.magnitude.remote(-1))),
        },
    )

    scale = MAP_CALLS / TASKS_OF_MAP
    batches = [list(range(at, at + 500)) for at in range(0, MAP_CALLS, 500)]
    list(function.map(range(MAP_CALLS)))  # all workers are there, as Ray's are
    mapped = f"ray map of {MAP_CALLS} calls"
    _case(
        results,
        mapped,
        rounds,
        {
            "flowfn": lambda: _seconds(lambda: list(function.map(range(MAP_CALLS)))),
            "ray task": lambda: _seconds(lambda: raw.get([task.remote(n) for n in range(TASKS_OF_MAP)])) * scale,
            "ray actor": lambda: _seconds(lambda: raw.get([actor.magnitude.remote(n) for n in range(MAP_CALLS)])),
            "ray actor, batched by hand": lambda: _seconds(
                lambda: raw.get([actor.magnitudes.remote(batch) for batch in batches])
            ),
        },
    )

    array = numpy.arange(PAYLOAD_MIB << 17, dtype=numpy.float64)
    ours = flow.function(backend="ray")(same)
    task = raw.remote(same)
    payload = f"ray {PAYLOAD_MIB} MiB there and back"

    def there_and_back(call: Callable[[Any], Any]) -> Callable[[], float]:
        def run() -> float:
            call(array)  # the memory that the first of each round takes is not measured
            return _seconds(lambda: call(array))

        return run

    _case(
        results,
        payload,
        rounds,
        {
            "flowfn": there_and_back(ours.remote),
            "ray task": there_and_back(lambda value: raw.get(task.remote(value))),
            "ray actor": there_and_back(lambda value: raw.get(actor.same.remote(value))),
        },
    )
    flow.shutdown()
    for text, peer, case, limit in (
        ("map beside one task each, times faster", "ray task", mapped, 10),
        ("payload beside a task, times as fast", "ray task", payload, 1 / 1.1),
        ("warm call beside a task, times as fast", "ray task", "ray warm call", 1),
        ("first result beside a task, times as fast", "ray task", "ray first result", 1),
    ):
        mine, theirs = results.get(case, "flowfn", "s"), results.get(case, peer, "s")
        results.print_target(f"ray: {text}", theirs / mine if mine and theirs else None, limit, at_least=True)


def _staged(results: Results, rounds: int, raw: Any) -> None:
    """Objects of an S3 server; in a new process each time, as by hand on other engines."""
    with objects() as source:
        task = raw.remote(max_calls=1)(fetched)
        case = f"ray {OBJECTS} objects staged"

        def by_task() -> float:
            program = source.program()
            return _seconds(lambda: raw.get(task.remote(program)))

        peers = {"flowfn": lambda: staged("ray", source), "ray task": by_task}
        _case(results, case, rounds, peers)
    mine, theirs = (results.get(case, peer, "s") for peer in peers)
    results.print_target(f"{case}, times as fast", theirs / mine if mine and theirs else None, 1, at_least=True)


def fetched(program: str) -> None:
    """Run it, in a namespace of its own."""
    exec(program, {})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--second-node", action="store_true", help="only that part")
    options = parser.parse_args()
    (second_node if options.second_node else ray)(Results(sys.stdout), options.rounds)
