"""Fetch with several processes where one interpreter is the limit: thousands of small objects.

Run as a program, this module is one of them: it reads its share of the work from stdin, does it as the parent would,
and reports on stdout. It ends when stdin does, so nothing outlives a parent that was killed.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
from collections.abc import Sequence
from typing import IO, Any

from flowfn_runtime import limits
from flowfn_runtime.data import transfer
from flowfn_runtime.data.depot import Depot, ObjectJob
from flowfn_runtime.data.model import Object, Progress
from flowfn_runtime.data.sources import Source, open_source
from flowfn_runtime.data.spec import redact
from flowfn_runtime.data.tally import Tell

# Starting a process takes as much processor time as fetching a hundred small objects: it has to be worth it. Measured:
# 2,000 of 100 KiB take one process twice as long as four.
_OBJECTS_A_PROCESS = 500
_MOST_PROCESSES = 4
_SMALL_BYTES = 1 << 20


def fetch(depot: Depot, source: Source, jobs: Sequence[ObjectJob], *, progress: Tell | None = None) -> int:
    """Do all jobs, as `transfer.fetch`; how many processes that takes is decided here."""
    count = min(_MOST_PROCESSES, limits.cores(), len(jobs) // _OBJECTS_A_PROCESS)
    small = sum(job.object.size or 0 for job in jobs) <= _SMALL_BYTES * len(jobs)
    if count < 2 or not small or source.recipe is None:
        return transfer.fetch(source, jobs, progress=progress)
    return _Crew(depot, source, jobs, progress).run(count)


class _Crew:
    def __init__(self, depot: Depot, source: Source, jobs: Sequence[ObjectJob], progress: Tell | None) -> None:
        self.depot = depot
        self.source = source
        self.jobs = jobs
        self.progress = progress
        self.lock = threading.Lock()
        self.done: dict[int, tuple[int, int]] = {}  # by member: bytes and objects
        self.fetched = 0
        self.failure: BaseException | None = None
        self.total = sum(job.object.size or 0 for job in jobs)

    def run(self, count: int) -> int:
        import subprocess

        runtime = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([runtime, os.environ.get("PYTHONPATH", "")])}
        members: list[tuple[Any, threading.Thread]] = []
        try:
            for index in range(1, count):
                process = subprocess.Popen(
                    [sys.executable, "-m", __name__],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=environment,
                    start_new_session=True,  # Ctrl-C is the parent's to handle
                )
                thread = threading.Thread(target=self._lead, args=(process, index, count), daemon=True)
                members.append((process, thread))
                thread.start()
            # This process is one of them, and busy while the others start.
            own = transfer.fetch(
                self.source, self.jobs[::count], progress=self.progress and (lambda seen: self._seen(0, seen))
            )
            for _, thread in members:
                thread.join()
        except BaseException:
            self._end(members)
            raise
        finally:
            for process, thread in members:
                process.kill()
                process.wait()
                thread.join()
                process.stdout.close()
                process.stdin.close()
        if self.failure is not None:
            raise self.failure
        return self.fetched + own

    def _seen(self, index: int, seen: Progress) -> None:
        self._report(index, seen.done_bytes, seen.done_objects)

    def _end(self, members: list[tuple[Any, threading.Thread]]) -> None:
        for process, _ in members:
            process.kill()

    def _lead(self, process: Any, index: int, count: int) -> None:
        """Hand a member its share, and take down what it reports."""
        share = self.jobs[index::count]
        try:
            work = (self.depot.root, self.depot.arrivals, self.source.recipe, [(job.object, job.name) for job in share])
            pickle.dump(work, process.stdin, protocol=5)
            process.stdin.flush()
            while True:
                kind, value = pickle.load(process.stdout)
                if kind == "progress":
                    self._report(index, *value)
                elif kind == "failed":
                    raise value
                else:
                    break
            fetched, arrived, deferred = value
            for job, path in zip(share, arrived, strict=True):
                job.arrived = path
            with self.lock:
                self.fetched += fetched
                self.depot.deferred.extend(share[number] for number in deferred)
        except BaseException as error:
            with self.lock:
                if self.failure is None:
                    ended = isinstance(error, (EOFError, BrokenPipeError))
                    code = process.wait() if ended else None
                    self.failure = RuntimeError(f"A helper process ended with status {code}.") if ended else error

    def _report(self, index: int, done_bytes: int, done_objects: int) -> None:
        if self.progress is None:
            return
        with self.lock:
            self.done[index] = (done_bytes, done_objects)
            self.progress(
                Progress(
                    redact(self.source.url),
                    sum(done for done, _ in self.done.values()),
                    self.total,
                    sum(done for _, done in self.done.values()),
                    len(self.jobs),
                )
            )


def _member(stdin: IO[bytes], stdout: IO[bytes]) -> None:
    """One process of a crew."""
    root, arrivals, recipe, share = pickle.load(stdin)
    threading.Thread(target=_end_with_parent, args=(stdin,), daemon=True).start()
    source = open_source(*recipe)
    depot = Depot(root, arrivals, source.url)
    jobs = [ObjectJob(depot, Object(*object), name) for object, name in share]
    numbers = {id(job): number for number, job in enumerate(jobs)}

    def tell(kind: str, value: object) -> None:
        pickle.dump((kind, value), stdout, protocol=5)
        stdout.flush()

    try:
        fetched = transfer.fetch(
            source, jobs, progress=lambda progress: tell("progress", (progress.done_bytes, progress.done_objects))
        )
        deferred = [numbers[id(job)] for job in depot.deferred]
        tell("done", (fetched, [job.arrived for job in jobs], deferred))
    except BaseException as error:
        tell("failed", error)


def _end_with_parent(stdin: IO[bytes]) -> None:
    stdin.read()
    os._exit(1)


if __name__ == "__main__":
    _member(sys.stdin.buffer, sys.stdout.buffer)
    # Not by way of the interpreter's end, which would wait for the thread that reads stdin.
    os._exit(0)
