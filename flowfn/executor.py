"""Executor: flowfn's workers for everything that takes a `concurrent.futures.Executor`."""

from __future__ import annotations

import atexit
import concurrent.futures
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ParamSpec, TypeVar

from flowfn import pools, threads
from flowfn.backends import registry
from flowfn.body import Body, describe
from flowfn.call import Call
from flowfn.future import Future
from flowfn.handle import Function, run_future
from flowfn.pool import Pool
from flowfn.spec import FunctionSpec
from flowfn_runtime import bodies, pickling

P = ParamSpec("P")
T = TypeVar("T")

_executors: weakref.WeakSet[Executor]


class Executor(concurrent.futures.Executor):
    """A `concurrent.futures.Executor` whose workers are those of `flow.function` with the same options.

    The options are those of `flow.function`; `max_workers` may be given first, as everywhere. It waits for its calls
    when it is left, or when the interpreter exits.
    """

    def __init__(self, max_workers: int | None = None, **options: Any) -> None:
        self._spec = FunctionSpec.from_options(max_workers=max_workers, **options)
        self._bodies: dict[Any, Body] = {}
        self._shut_down = False
        self._forget()
        self._open()
        _executors.add(self)

    def _forget(self) -> None:
        """Be as if nothing had been submitted."""
        self._pool: Pool | None = None
        self._lock = threading.Lock()
        self._futures: weakref.WeakSet[Future[Any]] = weakref.WeakSet()

    def _open(self) -> Pool:
        if self._pool is None:
            self._pool = Pool(registry.get(self._spec.backend), self._spec)
            pools.keep(self._pool)
        return self._pool

    def _close(self) -> None:
        if self._pool is not None:
            self._pool.close()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Start `fn(*args, **kwargs)` on a worker; its Future. Raises RuntimeError after `shutdown`."""
        target = bodies.unwrap(fn)
        bound = fn._bound if isinstance(fn, Function) else ()
        with self._lock:
            if self._shut_down:
                raise RuntimeError("cannot schedule new futures after shutdown")
            body = self._body(target)
            call = Call(self._spec, describe(target), body.current(), pickling.dumps(((*bound, *args), kwargs)))
            future: Future[T] = Future(call)
            self._futures.add(future)
            run_future(self._open(), call, future)
        return future

    def _body(self, function: Any) -> Body:
        """The body of a function; the last few are kept, so that each travels once."""
        try:
            body = self._bodies.get(function)
        except TypeError:  # not hashable
            return Body(function)
        if body is None:
            if len(self._bodies) >= 256:
                self._bodies.clear()
            body = self._bodies[function] = Body(function)
        return body

    def map(
        self, fn: Callable[..., T], *iterables: Iterable[Any], timeout: float | None = None, chunksize: int = 1
    ) -> Iterator[T]:
        """As `concurrent.futures.Executor.map`: inputs are taken at once, results come in order.

        `chunksize` inputs go to a worker together. (`flow.function(...).map` finds it by itself, and streams.)
        """
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if chunksize == 1:
            return super().map(fn, *iterables, timeout=timeout)
        target = bodies.unwrap(fn)
        results = super().map(_Chunked(target), _chunks(zip(*iterables, strict=False), chunksize), timeout=timeout)
        return (value for chunk in results for value in chunk)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls; `cancel_futures` cancels those that have not begun; `wait` waits for the rest.

        Waiting takes in the callbacks of the futures. A callback itself doesn't wait, as it would wait for itself.
        """
        with self._lock:
            self._shut_down = True
            futures = [future for future in self._futures if not future.done()]
        if cancel_futures:
            for future in futures:
                if not future.running():
                    future.cancel()
        pool = self._pool
        if wait and not (pool is not None and pool.helpers.in_callback()):
            concurrent.futures.wait(futures)
            if pool is not None:
                pool.helpers.wait_until_told()
            self._close()
        else:
            left = [future for future in futures if not future.done()]
            self._close_after(left)

    def _close_after(self, futures: list[Future[Any]]) -> None:
        """Close the pool when these are done."""
        count = len(futures)
        if not count:
            self._close()
            return
        lock = threading.Lock()

        def one_less(_: Any) -> None:
            nonlocal count
            with lock:
                count -= 1
                last = count == 0
            if last:
                threads.start(self._close)

        for future in futures:
            future.add_done_callback(one_less)


class _Chunked:
    """Calls a function for each tuple of arguments of a chunk."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, chunk: list[tuple[Any, ...]]) -> list[Any]:
        return [self.function(*args) for args in chunk]


def _chunks(source: Iterable[Any], size: int) -> Iterator[list[Any]]:
    import itertools

    iterator = iter(source)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


_executors = weakref.WeakSet()


def forget() -> None:
    """In a forked child: calls and workers are the parent's; executors start anew."""
    for executor in list(_executors):
        executor._forget()


def _at_exit() -> None:
    """As executors of the standard library do: calls that were submitted are finished before the interpreter ends."""
    for executor in list(_executors):
        executor.shutdown(wait=True)


# Before threads are joined where the interpreter offers it, since afterwards no thread can be started.
getattr(threading, "_register_atexit", atexit.register)(_at_exit)
