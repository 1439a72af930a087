"""Fetch many objects at once, and large ones by byte ranges side by side, each verified against the listing.

Where bytes end up is the caller's business: it hands in `Job`s, which open a file when their turn comes and are told
when it is complete. The number of threads grows as long as the processor is idle: a few for a server next door, dozens
for one that is far away.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Protocol

from flowfn_runtime.data.damage import Damaged, again_if_damaged, check_digest
from flowfn_runtime.data.digest import Digest, Spares
from flowfn_runtime.data.endpoint import WireError
from flowfn_runtime.data.http1 import Asked
from flowfn_runtime.data.model import Object
from flowfn_runtime.data.pace import Pace
from flowfn_runtime.data.retry import Patience
from flowfn_runtime.data.sources import Source
from flowfn_runtime.data.spec import redact
from flowfn_runtime.data.tally import Tally, Tell
from flowfn_runtime.data.writing import Writer
from flowfn_runtime.errors import CallCancelled

PART_BYTES = 16 << 20
# An object up to this size is one request; larger ones are fetched in parts side by side.
WHOLE_BYTES = 16 << 20
# How many objects up to this size a thread asks for before it takes the first of them: while it is busy with one, the
# server is with the next. (More threads would do the same, and wait for each other.)
_AHEAD = 4
_AHEAD_BYTES = 1 << 20
# Pieces of memory for what has arrived and is not hashed yet.
_SPARES = 64


class Job(Protocol):
    """One object to fetch, and where to. Called from several threads, but never from two at once for one job."""

    object: Object

    def begin(self) -> int | None:
        """A file descriptor to write to, of an empty file; None if there is nothing to do after all."""

    def complete(self, fd: int) -> None:
        """All bytes are in the file, and they are the right ones."""

    def abandon(self, fd: int) -> None:
        """The file won't be completed."""


def fetch(source: Source, jobs: Iterable[Job], *, progress: Tell | None = None) -> int:
    """Do all `jobs`; return how many bytes were fetched. Raises the first `DataError` (the other jobs are abandoned),
    and whatever `begin` and `complete` raise."""
    return _Fetch(source, jobs, progress).run()


class _Parts:
    """A large object under way: its file, and which of its parts are there."""

    def __init__(self, job: Job, fd: int, size: int, spares: Spares) -> None:
        self.job = job
        self.fd = fd
        self.count = -(-size // PART_BYTES)
        self.done = 0
        # The kernel lets one thread at a time write to a file, and has the others spin: here they sleep, and the server
        # next door, say, has the processor.
        self.writing = threading.Lock()
        self.digest = Digest(fd, size, PART_BYTES, spares) if job.object.md5 else None
        self.failures = 0  # times that the digest was wrong
        self.headers: Mapping[str, str] = {}

    def close(self) -> None:
        """Nothing is done with the file any more."""
        if self.digest:
            self.digest.close()


class _Fetch:
    def __init__(self, source: Source, jobs: Iterable[Job], progress: Tell | None) -> None:
        self.source = source
        self.waiting = deque(jobs)
        self.parts: deque[tuple[_Parts, int]] = deque()
        self.open_parts: set[_Parts] = set()
        self.spares = Spares(_SPARES)
        lock = threading.RLock()
        self.lock = threading.Condition(lock)  # threads without work wait for some
        self.ended = threading.Condition(lock)  # the caller waits for the last thread
        self.running = 0
        self.beginning = 0  # jobs whose parts may still come into `parts`
        self.failure: BaseException | None = None
        self.patience = Patience(source.url)
        self.fetched = 0
        self.writer = Writer()
        sizes = [job.object.size for job in self.waiting]
        total = None if None in sizes else sum(size or 0 for size in sizes)
        self.tally = Tally(redact(source.url), total, len(sizes), progress)
        self.threads = 0
        self.held = 0  # threads that wait for a digest
        self.requests = 0
        mean = sum(size or 0 for size in sizes) / max(1, len(sizes))
        self.pace = Pace(mean, now=time.monotonic(), used=time.process_time())

    def run(self) -> int:
        if not self.waiting:
            return 0
        try:
            self._start(min(self.pace.first, max(len(self.waiting), self._most_parts())))
            with self.ended:
                while self.running:
                    self.ended.wait()
        except BaseException:
            # Ctrl-C: no thread may write to a file after this.
            self._stop(CallCancelled("The transfer was stopped."))
            with self.ended:
                while self.running:
                    self.source.interrupt()  # and again, since one may just have been connecting
                    self.ended.wait(0.1)
            raise
        finally:
            for parts in self.open_parts:
                parts.close()
                parts.job.abandon(parts.fd)
        if self.failure is not None:
            raise self.failure
        self.tally.finish()
        return self.fetched

    def _most_parts(self) -> int:
        return max((object.object.size or 0) for object in self.waiting) // PART_BYTES

    def _start(self, count: int) -> None:
        with self.lock:
            self.threads += count
            self.running += count
        self._launch(count)

    def _launch(self, count: int) -> None:
        for started in range(count):
            try:
                threading.Thread(target=self._work, name="flowfn-transfer", daemon=True).start()
            except RuntimeError:  # the account may have no more threads: get on with those that run
                with self.lock:
                    self.running -= count - started
                    self.threads -= count - started
                    if not self.running:
                        raise
                return

    def _stop(self, failure: BaseException) -> None:
        with self.lock:
            if self.failure is None:
                self.failure = failure
            under_way = list(self.open_parts)
            self.lock.notify_all()
        self.patience.stopped.set()
        for parts in under_way:
            parts.close()

    def _work(self) -> None:
        ahead: deque[tuple[Job, int, Asked | None]] = deque()  # what was asked for and has not been taken
        try:
            while self.failure is None:
                if ahead and (len(ahead) == _AHEAD or self.parts or not self.waiting):
                    self._take(*ahead.popleft())
                elif self.parts:
                    try:
                        parts, index = self.parts.popleft()
                    except IndexError:
                        continue
                    self._part(parts, index)
                else:
                    with self.lock:
                        if not self.waiting:
                            if ahead:
                                continue
                            if not self.beginning and not self.parts:
                                return
                            if not self.parts:
                                self.lock.wait()
                            continue
                        job = self.waiting.popleft()
                        self.beginning += 1
                    self._job(job, ahead)
                self._more_threads()
        except BaseException as error:
            self._stop(error)
        finally:
            try:
                for job, fd, asked in ahead:
                    if asked:
                        asked.drop()
                    job.abandon(fd)
            finally:
                with self.lock:
                    self.running -= 1
                    self.lock.notify_all()
                    if not self.running:
                        self.ended.notify_all()

    def _more_threads(self) -> None:
        now = time.monotonic()
        if self.held or not self.pace.due(now):
            return
        with self.lock:
            more = self.pace.more(
                now=now,
                used=time.process_time(),
                done=self.requests,
                threads=self.threads,
                queued=len(self.waiting) + len(self.parts),
            )
            self.threads += more
            self.running += more
        self._launch(more)

    # -- one object ----------------------------------------------------------------------------------------------------

    def _job(self, job: Job, ahead: deque[tuple[Job, int, Asked | None]]) -> None:
        """Begin with a job. Of a small object the answer is taken later, when those before it have been."""
        try:
            fd = self._begin(job)
        finally:
            with self.lock:
                self.beginning -= 1
                if not self.beginning or self.parts:
                    self.lock.notify_all()
        if fd is None:
            return
        asked = None
        if 0 < (job.object.size or 0) <= _AHEAD_BYTES:
            try:
                asked = self.source.ask(job.object)
            except WireError:
                pass  # to be met again, with patience
            except BaseException:
                job.abandon(fd)
                raise
        ahead.append((job, fd, asked))
        if asked is None:
            self._take(*ahead.pop())

    def _take(self, job: Job, fd: int, asked: Asked | None) -> None:
        try:
            self._whole(job, fd, asked)
        except BaseException:
            job.abandon(fd)
            raise
        job.complete(fd)
        self.tally.add(0, 1)

    def _begin(self, job: Job) -> int | None:
        """Open a job's file. None if nothing is left to do for the caller: the object is there, or split into parts."""
        fd = job.begin()
        if fd is None:
            self.tally.add(job.object.size or 0, 1)
            return None
        size = job.object.size
        if size is None or size <= WHOLE_BYTES or not self.source.ranges:
            return fd
        # Not allocated in advance: that costs a fifth of the transfer (on ext4), and room was asked for before.
        parts = _Parts(job, fd, size, self.spares)
        with self.lock:
            self.open_parts.add(parts)
        self.parts.extend((parts, index) for index in range(parts.count))
        return None

    def _whole(self, job: Job, fd: int, asked: Asked | None) -> None:
        object, expected = job.object, job.object.md5
        if object.size == 0:
            return

        def attempt() -> None:
            nonlocal asked
            digest = hashlib.md5(usedforsecurity=False) if expected else None
            position = 0

            def sink(piece: memoryview) -> None:
                nonlocal position
                if self.failure is not None:
                    raise CallCancelled("The transfer was stopped.")
                self.writer.write(fd, piece, position)
                position += len(piece)
                if digest:
                    digest.update(piece)

            request, asked = asked, None
            headers = self.source.fetch(object, 0, None, sink, request)
            if object.size is not None and position != object.size:
                raise WireError(f"{position} of {object.size} bytes came")
            if digest:
                check_digest(digest.hexdigest(), object, headers, self.source)
            with self.lock:
                self.fetched += position
                self.requests += 1
            self.tally.add(position, 0)

        self.patience.attempt(again_if_damaged(attempt))

    def _part(self, parts: _Parts, index: int) -> None:
        object, digest = parts.job.object, parts.digest
        assert object.size is not None
        first = position = index * PART_BYTES
        end = min(first + PART_BYTES, object.size)
        if digest:
            self._let_hash(digest, index)

        def sink(piece: memoryview) -> memoryview | None:
            nonlocal position
            if self.failure is not None:
                raise CallCancelled("The transfer was stopped.")
            if position + len(piece) > end:
                raise WireError(f"more than {end - first} bytes came")
            with parts.writing:
                self.writer.write(parts.fd, piece, position)
            position += len(piece)
            return digest.arrived(index, position, piece) if digest else None

        def attempt() -> None:
            # After an error only the rest is asked for: what is in the digest must not be written to again.
            if position < end:
                parts.headers = self.source.fetch(object, position, end - 1, sink)
            if position != end:
                raise WireError(f"{position - first} of {end - first} bytes came")

        self.patience.attempt(attempt)
        self.tally.add(end - first, 0)
        with self.lock:
            self.fetched += end - first
            self.requests += 1
            parts.done += 1
            if parts not in self.open_parts or parts.done < parts.count:
                return
        try:
            if digest:
                check_digest(digest.result(), object, parts.headers, self.source)
        except Damaged as damaged:
            self._from_the_start(parts, damaged)
            return
        with self.lock:
            self.open_parts.discard(parts)
        parts.job.complete(parts.fd)
        self.tally.add(0, 1)

    def _let_hash(self, digest: Digest, index: int) -> None:
        with self.lock:
            self.held += 1
        digest.wait_for_turn(index)
        with self.lock:
            self.held -= 1

    def _from_the_start(self, parts: _Parts, damaged: Damaged) -> None:
        """Fetch a large object again whose parts don't make up the listed content."""
        if parts.failures >= 2:
            raise damaged.error
        again = _Parts(parts.job, parts.fd, parts.job.object.size or 0, self.spares)
        again.failures = parts.failures + 1
        with self.lock:
            self.open_parts.discard(parts)
            self.open_parts.add(again)
            self.lock.notify_all()
        self.parts.extend((again, index) for index in range(again.count))
