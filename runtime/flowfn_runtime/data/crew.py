"""Fetch with several processes where one interpreter is the limit: thousands of small objects.

Each of the others is a `member`, which is told its share of the work through its stdin and reports on its stdout.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
from collections.abc import Sequence
from typing import Any

from flowfn_runtime import limits
from flowfn_runtime.data import transfer
from flowfn_runtime.data.depot import Depot, ObjectJob
from flowfn_runtime.data.model import Progress
from flowfn_runtime.data.sources import Source
from flowfn_runtime.data.spec import redact
from flowfn_runtime.data.tally import Tell

# Starting a process takes as much processor time as fetching a hundred small objects: it has to be worth it. Measured:
# 2,000 of 100 KiB take two processes half as long as one, and three or four no less.
_OBJECTS_A_PROCESS = 1000
_MOST_PROCESSES = 3
_HEAD_START = 150  # objects that are done by the time that the others have started
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

        shares = _shares(self.jobs, count)
        members: list[tuple[Any, threading.Thread]] = []
        try:
            for index in range(1, count):
                process = subprocess.Popen(
                    [sys.executable, "-S", "-c", _program()],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    start_new_session=True,  # Ctrl-C is the parent's to handle
                )
                thread = threading.Thread(target=self._lead, args=(process, index, shares[index]), daemon=True)
                members.append((process, thread))
                thread.start()
            # This process is one of them, and busy while the others start.
            own = transfer.fetch(self.source, shares[0], progress=self.progress and (lambda seen: self._seen(0, seen)))
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

    def _lead(self, process: Any, index: int, share: Sequence[ObjectJob]) -> None:
        """Hand a member its share, and take down what it reports."""
        try:
            jobs = [(tuple(job.object), job.name, job.path) for job in share]
            work = (self.depot.root, self.source.recipe, jobs)
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
            for job, there in zip(share, arrived, strict=True):
                job.arrived = there
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


def _shares(jobs: Sequence[ObjectJob], count: int) -> list[Sequence[ObjectJob]]:
    """What each process does. The first, this one, need not be started: it has so much more."""
    ahead = _HEAD_START
    return [[*jobs[:ahead], *jobs[ahead::count]], *(jobs[ahead + index :: count] for index in range(1, count))]


def _program() -> str:
    """A member's program. Without `site`, which takes a good part of an interpreter's start, it has to be told where
    modules are."""
    runtime = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    path = [runtime, *(folder for folder in sys.path if isinstance(folder, str))]
    return f"import sys; sys.path = {path!r}; from flowfn_runtime.data.member import main; main()"
