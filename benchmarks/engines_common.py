"""The cases that every engine is measured in, flowfn beside the engine by hand.

By hand a program is run through the engine for each piece of work (`ssh host python -c ...`), which is what people do.
Both do the same: a function and its arguments go there as a pickle, and its result comes back as one. A first result is
that of a whole new Python program on either side, from its start to its end; by hand this is `HAND`. Warm calls and
maps by hand come from a program that runs already, as flowfn's do. The payload is bytes, which by hand travel as they
are, without a pickle.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import HERE, Results, environment, in_turn, wall_s

MAP_CALLS = 10_000
PART = 40  # calls of a map that are made by hand, one process each; the whole is counted as so many times as much
PAYLOAD_MIB = 256
OBJECTS, OBJECT_BYTES = 1000, 16 << 10
WARM_CALLS = 200
WORKERS = 4  # at a time, of every peer

By = Callable[[str], "list[str]"]  # the command that has the engine run this Python program
CALL = (
    "import pickle, sys; function, arguments = pickle.load(sys.stdin.buffer); "
    "pickle.dump(function(*arguments), sys.stdout.buffer)"
)
HAND = """
import pickle, subprocess
done = subprocess.run({command!r}, input=pickle.dumps((abs, (-1,))), stdout=subprocess.PIPE, check=True)
assert pickle.loads(done.stdout) == 1
"""
BACK = "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read())"  # a value, whole, as a function has it
# As one writes it: a client a thread, and 16 of them.
FETCH = """
import concurrent.futures, os, tempfile, boto3
s3 = boto3.client("s3", endpoint_url={endpoint!r}, aws_access_key_id={key!r}, aws_secret_access_key={secret!r},
                  region_name="us-east-1")
pages = s3.get_paginator("list_objects_v2").paginate(Bucket={bucket!r}, Prefix={prefix!r})
keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
with tempfile.TemporaryDirectory() as place, concurrent.futures.ThreadPoolExecutor(16) as threads:
    list(threads.map(lambda key: s3.download_file({bucket!r}, key, f"{{place}}/{{os.path.basename(key)}}"), keys))
    assert len(os.listdir(place)) == {count}
"""


@dataclass
class Engine:
    """An engine that runs, and how each peer uses it."""

    name: str
    backend: Any  # flowfn's
    first: str  # a whole program with one result of flowfn's
    by_hand: Mapping[str, By]  # peers
    more: Mapping[str, Callable[[str], float]] = field(default_factory=dict)  # peers that measure themselves, by case
    fetches: bool = True  # whether programs run by hand have boto3
    let_go: Callable[[], object] = lambda: None  # before each first result: end what an earlier one left open


def seconds(action: Callable[[], object]) -> float:
    """How long it takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def run(command: list[str], data: bytes) -> bytes:
    """What a program prints that is given this on its standard input."""
    return subprocess.run(command, input=data, capture_output=True, check=True, env=environment()).stdout


def call(by: By) -> None:
    """One call by hand."""
    results_are(pickle.loads(run(by(CALL), pickle.dumps((abs, (-1,))))), 1)


def magnitude(number: int) -> int:
    """What every peer calls."""
    return abs(number)


def measure(results: Results, rounds: int, engine: Engine) -> None:
    """All cases."""
    import flowfn as flow

    def case(what: str, ours: Callable[[], float], theirs: Callable[[By], float], *, own: str = "") -> None:
        title = f"{engine.name} {what}"

        def add(peer: str, measured: Callable[[], float]) -> Callable[[], None]:
            return lambda: results.add(title, peer, "s", "s", measured())

        actions = {"flowfn": add("flowfn", ours)}
        for peer, by in engine.by_hand.items():
            actions[peer] = add(peer, lambda by=by: theirs(by))  # type: ignore[misc]
        if own:
            actions |= {peer: add(peer, lambda run=run: run(own)) for peer, run in engine.more.items()}  # type: ignore[misc]
        for peer, error in in_turn(rounds, actions):
            results.left_out(title, peer, str(error))
        results.print_case(title)

    def first(program: str) -> float:
        engine.let_go()
        return wall_s([sys.executable, "-c", program])[0]

    first(engine.first)  # what is kept over there is there, as on every day but the first
    case("first result", lambda: first(engine.first), lambda by: first(HAND.format(command=by(CALL))), own="first")

    function = flow.function(backend=engine.backend, max_workers=WORKERS)(magnitude)
    function.remote(-1)
    warm = lambda: seconds(lambda: [function.remote(-1) for _ in range(WARM_CALLS)]) / WARM_CALLS  # noqa: E731
    case("warm call", warm, lambda by: seconds(lambda: call(by)), own="warm")

    def several(by: By) -> float:
        with ThreadPoolExecutor(WORKERS) as threads:
            return seconds(lambda: list(threads.map(lambda _: call(by), range(PART)))) * MAP_CALLS / PART

    case(f"map of {MAP_CALLS} calls", lambda: seconds(lambda: list(function.map(range(MAP_CALLS)))), several, own="map")

    data = os.urandom(1 << 20) * PAYLOAD_MIB
    same = flow.function(backend=engine.backend)(lambda value: value)
    same.remote(b"")
    case(
        f"{PAYLOAD_MIB} MiB there and back",
        lambda: seconds(lambda: same.remote(data)),
        lambda by: seconds(lambda: results_are(len(run(by(BACK), data)), len(data))),
    )
    flow.shutdown()
    with objects() as source:
        fetch = lambda by: seconds(lambda: run(by(source.program()), b""))  # noqa: E731
        if not engine.fetches:
            engine.by_hand = {}
        case(f"{OBJECTS} objects staged", lambda: staged(engine.backend, source), fetch)
    flow.shutdown()
    targets(results, engine)


def staged(backend: Any, source: Source) -> float:
    """How long it takes until a new worker has counted objects that nobody has staged yet."""
    import flowfn as flow

    url, environ = source.fresh()
    count = flow.function(backend=backend, mounts={"/objects": url}, env=environ)(lambda: len(os.listdir("/objects")))
    took = seconds(lambda: results_are(count.remote(), OBJECTS))
    flow.shutdown()
    return took


def results_are(found: object, wanted: object) -> None:
    if found != wanted:
        raise AssertionError(f"{found!r} in place of {wanted!r}")


def targets(results: Results, engine: Engine) -> None:
    """No slower than by hand anywhere."""
    limits = {
        "first result": 1.0,
        "warm call": 20.0,
        f"map of {MAP_CALLS} calls": 20.0,
        f"{PAYLOAD_MIB} MiB there and back": 1.0,
        f"{OBJECTS} objects staged": 1.0,
    }
    for what, limit in limits.items():
        of = f"{engine.name} {what}"
        ours, theirs = results.get(of, "flowfn", "s"), results.best(of, [*engine.by_hand, *engine.more], "s")
        ratio = theirs / ours if ours and theirs else None
        results.print_target(f"{of}: the best by hand, times as long", ratio, limit, at_least=True)


class Source:
    """Objects in an S3 server on loopback."""

    def __init__(self, root: Path, endpoint: str, key: str, secret: str) -> None:
        self._root, self._endpoint, self._key, self._secret = root, endpoint, key, secret
        self._count = 0

    def _make(self) -> str:
        self._count += 1
        folder = self._root / "bench" / f"set-{self._count}"
        folder.mkdir(parents=True)
        for number in range(OBJECTS):
            (folder / f"{number}.bin").write_bytes(os.urandom(OBJECT_BYTES))
        return folder.name

    def fresh(self) -> tuple[str, dict[str, str]]:
        """A prefix that nobody has staged yet, and the environment to get at it."""
        environ = {"AWS_ACCESS_KEY_ID": self._key, "AWS_SECRET_ACCESS_KEY": self._secret}
        environ |= {"AWS_ENDPOINT_URL_S3": self._endpoint, "AWS_REGION": "us-east-1"}
        return f"s3://bench/{self._make()}", environ

    def program(self) -> str:
        """The same by hand."""
        return FETCH.format(
            endpoint=self._endpoint,
            key=self._key,
            secret=self._secret,
            bucket="bench",
            prefix=self._make() + "/",
            count=OBJECTS,
        )


@contextmanager
def workplace(prefix: str) -> Iterator[str]:
    """A directory with flowfn's home and cache; and the working directory is an empty project in it, until the end."""
    here = os.getcwd()
    with tempfile.TemporaryDirectory(prefix=prefix, dir="/tmp") as place:
        os.environ.update(FLOW_HOME=f"{place}/home", FLOW_CACHE=f"{place}/cache")
        os.mkdir(f"{place}/project")  # what lies in it would be sent as the user's files
        os.chdir(f"{place}/project")
        try:
            yield place
        finally:
            os.chdir(here)


@contextmanager
def objects() -> Iterator[Source]:
    """An S3 server on loopback."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    from s3 import KEY, SECRET, S3Server  # type: ignore[import-not-found,unused-ignore]

    with tempfile.TemporaryDirectory(prefix="bench-s3-") as place:
        server = S3Server(Path(place)).start()
        try:
            yield Source(Path(place), f"http://127.0.0.1:{server.port}", KEY, SECRET)
        finally:
            server.kill()
