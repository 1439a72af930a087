"""Ray by hand beside flowfn on it, on a Ray of this machine: tasks (`ray task`) and actors (`ray actor`).

For `engines.py`, which calls `ray`. By itself:

    python benchmarks/engines_ray.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

from common import PeerMissing, Results, in_turn

MAP_CALLS = 10_000
TASKS_OF_MAP = 1000  # with a raw task each this part is done, and the whole taken to be ten times as long
PAYLOAD_MIB = 256
WARM_CALLS = 200
WORKERS = 4


def ray(results: Results, rounds: int) -> None:
    """First result, warm call, map of small calls, and a payload there and back."""
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
        finally:
            raw.shutdown()


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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    ray(Results(sys.stdout), parser.parse_args().rounds)
