"""One peer: a process that starts a library's workers, and runs cases when asked on stdin (see common.Peer).

Each class gives the library its best everyday form: workers started before anything is measured, functions sent by
name, its own way to share a large object. What a library has no way for, it leaves out.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import functions

MIB = 1 << 20


class Library:
    """What a library does in each case. `n` is how many calls the case makes; slow ones are asked for fewer."""

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        raise NotImplementedError

    def map(self, function: Callable[[Any], Any], items: Iterable[Any], n: int) -> Iterator[Any]:
        raise NotImplementedError

    def maps(self, n: int) -> dict[str, Callable[[], Iterator[Any]]]:
        """Ways to make `n` no-op calls."""
        return {"": lambda: self.map(functions.noop, iter(range(n)), n)}

    def shared(self, function: Callable[[Any], Any], value: Any, n: int) -> list[Any]:
        """Share a large object, and make `n` calls on it at once."""
        raise NotImplementedError

    def variants(self) -> dict[str, Callable[[], Any]]:
        """Ways to make a no-op round trip."""
        return {"": lambda: self.call(functions.noop)}

    def close(self) -> None:
        pass


class Flowfn(Library):
    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        import flowfn as flow

        self.flow = flow
        self.functions: dict[Callable[..., Any], Any] = {
            function: flow.function(max_workers=workers)(function)
            for function in (functions.noop, functions.echo, functions.pid_after)
        }

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.functions[function].remote(*args)

    def variants(self) -> dict[str, Callable[[], Any]]:
        return {"": self.functions[functions.noop].remote}

    def map(self, function: Callable[[Any], Any], items: Iterable[Any], n: int) -> Iterator[Any]:
        return iter(self.functions[function].map(items))

    def shared(self, function: Callable[[Any], Any], value: Any, n: int) -> list[Any]:
        reference = self.flow.put(value)
        futures = [self.functions[function].spawn(reference) for _ in range(n)]
        return [future.result() for future in futures]


class ProcessPool(Library):
    """concurrent.futures.ProcessPoolExecutor, by fork."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor

        self.pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork"))

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.pool.submit(function, *args).result()

    def map(self, function: Callable[[Any], Any], items: Iterable[Any], n: int) -> Iterator[Any]:
        return self.pool.map(function, items)

    def close(self) -> None:
        self.pool.shutdown()


class MultiprocessingPool(Library):
    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        import multiprocessing

        self.pool = multiprocessing.get_context("fork").Pool(workers)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.pool.apply(function, args)

    def map(self, function: Callable[[Any], Any], items: Iterable[Any], n: int) -> Iterator[Any]:
        return self.pool.imap(function, items)

    def maps(self, n: int) -> dict[str, Callable[[], Iterator[Any]]]:
        chunked = lambda: self.pool.imap(functions.noop, range(n), chunksize=64)  # noqa: E731
        return {**super().maps(n), "chunksize=64": chunked}

    def close(self) -> None:
        self.pool.terminate()


class Joblib(Library):
    """joblib with loky, as in its documentation; one call alone goes through loky's own executor."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        import joblib
        from joblib.externals.loky import ProcessPoolExecutor

        self.joblib = joblib
        self.executor = ProcessPoolExecutor(workers)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.executor.submit(function, *args).result()

    def map(self, function: Callable[[Any], Any], items: Iterable[Any], n: int) -> Iterator[Any]:
        parallel = self.joblib.Parallel(n_jobs=self.workers, return_as="generator")
        results: Iterator[Any] = parallel(self.joblib.delayed(function)(item) for item in items)
        return results

    def shared(self, function: Callable[[Any], Any], value: Any, n: int) -> list[Any]:
        results: list[Any] = self.joblib.Parallel(n_jobs=self.workers, batch_size=1)(
            self.joblib.delayed(function)(value) for _ in range(n)
        )
        return results

    def close(self) -> None:
        self.executor.shutdown(kill_workers=True)


class Ray(Library):
    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        raise_loopback()
        import ray

        self.ray = ray
        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        self.tasks: dict[Callable[..., Any], Any] = {
            function: ray.remote(function) for function in (functions.noop, functions.echo, functions.pid_after)
        }

        class Actor:
            def noop(self) -> None:
                return None

        self.actor: Any = ray.remote(num_cpus=0)(Actor).remote()
        # Its workers start with the first tasks.
        ray.get([self.tasks[functions.noop].remote() for _ in range(50 * workers)])

    def variants(self) -> dict[str, Callable[[], Any]]:
        noop, get = self.tasks[functions.noop], self.ray.get
        return {"": lambda: get(noop.remote()), "actor": lambda: get(self.actor.noop.remote())}

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.ray.get(self.tasks[function].remote(*args))

    def map(self, function: Callable[[Any], Any], items: Iterable[Any], n: int) -> Iterator[Any]:
        task = self.tasks[function]
        # As its documentation advises: a bounded number in flight, else the object store spills to disk.
        waiting: collections.deque[Any] = collections.deque()
        for item in items:
            waiting.append(task.remote(item))
            if len(waiting) >= 64:
                yield self.ray.get(waiting.popleft())
        for reference in waiting:
            yield self.ray.get(reference)

    def shared(self, function: Callable[[Any], Any], value: Any, n: int) -> list[Any]:
        reference = self.ray.put(value)
        results: list[Any] = self.ray.get([self.tasks[function].remote(reference) for _ in range(n)])
        return results

    def close(self) -> None:
        self.ray.shutdown()


class Dask(Library):
    """distributed's LocalCluster."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        import dask
        from distributed import Client, LocalCluster

        dask.config.set(
            {"distributed.worker.memory.terminate": False, "distributed.admin.large-graph-warning-threshold": "1GB"}
        )
        cluster = LocalCluster(n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=None)
        self.client = Client(cluster)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.client.submit(function, *args, pure=False).result()

    def map(self, function: Callable[[Any], Any], items: Iterable[Any], n: int) -> Iterator[Any]:
        return iter(self.client.gather(self.client.map(function, list(items), pure=False)))

    def shared(self, function: Callable[[Any], Any], value: Any, n: int) -> list[Any]:
        future = self.client.scatter(value, hash=False)
        results: list[Any] = self.client.gather([self.client.submit(function, future, pure=False) for _ in range(n)])
        return results

    def close(self) -> None:
        self.client.shutdown()


class Raw(Library):
    """The limit: one byte to a forked process over a socket and back; bare, and through a future and a thread."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        self.near, far = socket.socketpair()
        if os.fork() == 0:
            self.near.close()
            while data := far.recv(64):
                far.sendall(data)
            os._exit(0)
        far.close()
        self.waiting: queue.SimpleQueue[Future[bytes]] = queue.SimpleQueue()

    def variants(self) -> dict[str, Callable[[], Any]]:
        return {"": self._ping, "future and thread": self._through_a_future}

    def _ping(self) -> None:
        self.near.sendall(b"x")
        self.near.recv(64)

    def _through_a_future(self) -> bytes:
        if not hasattr(self, "reader"):
            self.reader = threading.Thread(target=self._read, daemon=True)
            self.threaded, far = socket.socketpair()
            if os.fork() == 0:
                self.threaded.close()
                while data := far.recv(64):
                    far.sendall(data)
                os._exit(0)
            far.close()
            self.reader.start()
        future: Future[bytes] = Future()
        self.waiting.put(future)
        self.threaded.sendall(b"x")
        return future.result()

    def _read(self) -> None:
        while data := self.threaded.recv(64):
            self.waiting.get().set_result(data)


LIBRARIES: dict[str, type[Library]] = {
    "flowfn": Flowfn,
    "ppe": ProcessPool,
    "mp": MultiprocessingPool,
    "joblib": Joblib,
    "ray": Ray,
    "dask": Dask,
    "raw": Raw,
}


# The cases. Each returns {variant: {metric: value}}.


def roundtrip(library: Library, *, seconds: float) -> dict[str, dict[str, float]]:
    """The p50 of as many no-op calls, one after another, as fit into the time."""
    measured = {}
    for variant, call in library.variants().items():
        for _ in range(20):
            call()
        times = []
        end = time.perf_counter() + seconds
        while (started := time.perf_counter()) < end:
            call()
            times.append(time.perf_counter() - started)
        times.sort()
        measured[variant] = {"p50_us": 1e6 * times[len(times) // 2], "p99_us": 1e6 * times[int(len(times) * 0.99)]}
    return measured


def map_(library: Library, *, n: int) -> dict[str, dict[str, float]]:
    """No-op calls a second, and how far this process grew meanwhile."""
    measured = {}
    for variant, calls in library.maps(n).items():
        collections.deque(library.map(functions.noop, range(min(n, 200)), min(n, 200)), maxlen=0)
        before = reset_peak_bytes()
        started = time.perf_counter()
        done = sum(1 for _ in calls())
        took = time.perf_counter() - started
        assert done == n, f"{done} results of {n} calls"
        measured[variant] = {"calls_per_s": n / took, "grown_mib": max(0.0, (peak_bytes() - before) / MIB)}
    return measured


def array(library: Library, *, mib: int, warm_up: int) -> dict[str, dict[str, float]]:
    """A large array there and back, once warm."""
    import numpy as np

    if not hasattr(library, "large"):
        library.large = np.arange(mib * MIB // 8, dtype=np.float64)  # type: ignore[attr-defined]
        for _ in range(warm_up):
            library.call(functions.echo, library.large)  # type: ignore[attr-defined]
    large = library.large  # type: ignore[attr-defined]
    started = time.perf_counter()
    back = library.call(functions.echo, large)
    took = time.perf_counter() - started
    assert back.shape == large.shape and back[-1] == large[-1] and back[1] == large[1]
    return {"": {"seconds": took}}


def shared(library: Library, *, mib: int, n: int) -> dict[str, dict[str, float]]:
    """`n` calls on one large array."""
    import numpy as np

    value = np.full(mib * MIB // 8, time.time())
    started = time.perf_counter()
    pids = library.shared(functions.pid_after, value, n)
    took = time.perf_counter() - started
    assert len(pids) == n
    return {"": {"seconds": took}}


def payloads(library: Library, *, n: int) -> dict[str, dict[str, float]]:
    """Arrays of 1 MiB there and back, in a map."""
    import numpy as np

    arrays = [np.full(MIB, i, dtype=np.uint8) for i in range(16)]
    for back in library.map(functions.echo, arrays[:4], 4):
        assert len(back) == MIB
    started = time.perf_counter()
    for i, back in enumerate(library.map(functions.echo, itertools.islice(itertools.cycle(arrays), n), n)):
        assert back[-1] == i % 16
    return {"": {"per_s": n / (time.perf_counter() - started)}}


CASES: dict[str, Callable[..., dict[str, dict[str, float]]]] = {
    "roundtrip": roundtrip,
    "map": map_,
    "array": array,
    "shared": shared,
    "payloads": payloads,
}


def peak_bytes() -> int:
    """The most resident memory that this process has had since `reset_peak_bytes`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def reset_peak_bytes() -> int:
    """Begin anew with the peak; returns what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def raise_loopback() -> None:
    """A new network namespace has its loopback down."""
    import fcntl
    import struct

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket, contextlib.suppress(PermissionError):
        flags = struct.pack("16sh14x", b"lo", 0x41)  # IFF_UP, IFF_RUNNING
        fcntl.ioctl(any_socket, 0x8914, flags)  # SIOCSIFFLAGS


def main() -> None:
    name, workers = sys.argv[1], int(sys.argv[2])
    replies = os.fdopen(os.dup(1), "w")
    os.set_inheritable(replies.fileno(), False)
    os.dup2(2, 1)  # whatever a library prints is no reply

    def reply(value: object) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    try:
        library = LIBRARIES[name](workers)
        reply({"ready": True})
    except ImportError as error:
        reply({"error": f"not installed: {error}"})
        return
    except Exception as error:
        reply({"error": f"{type(error).__name__}: {error}"[:300]})
        return
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            reply(CASES[asked.pop("case")](library, **asked))
        except NotImplementedError:
            reply({"error": "it has no way for this"})
        except Exception as error:
            reply({"error": f"{type(error).__name__}: {error}"[:300]})
    library.close()


if __name__ == "__main__":
    main()
