"""The worker: executes calls that come over a duplex byte stream, one after another, in its main thread."""

from __future__ import annotations

import errno
import json
import os
import queue
import select
import sys
import threading
import time
import types
from typing import TYPE_CHECKING, Any

from . import bodies, exceptions, limits, logs, outcomes, pickling, wire
from .batch import FLUSH_S, Batch
from .errors import ProtocolError, SerializationError, VersionMismatch

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping, Sequence

EVERYBODY = 1 << 31  # as in shm, which is not imported unless it is used
END_S = 10.0  # the host looks every second at least
STREAM_WINDOW = 16  # values of a generator that may be under way


class Worker:
    """One conversation with one client."""

    def __init__(
        self,
        stream: wire.Stream,
        side: socket.socket | None = None,
        *,
        pipes: Sequence[tuple[int, int]] = (),
        pinned: Mapping[str, str] | None = None,
        kernel_kills: int | None = None,
    ) -> None:
        """`pipes` are for standard output and error, see `logs.Capture`; `pinned`: variables that stay as they are.

        `kernel_kills`, in a container with a limit of its own: how many processes the kernel had killed in it before.
        """
        self.stream = stream
        self.side = side
        self.pinned = pinned or {}
        self._kernel_kills = kernel_kills
        self._pipes = pipes
        self._own_path = sys.path[:]
        self.functions: dict[int, tuple[wire.Frame, str]] = {}
        self.loaded: dict[int, tuple[Callable[..., Any], dict[str, Any]]] = {}
        self.objects: dict[str, Any] = {}
        self.batch: Batch | None = None
        self.recalled = 0
        self.stopped = False  # an item failed: batches that were sent before the client heard of it are left
        self.forked = False  # in a child that a call forked
        self._loop: Any = None
        self._ahead = False
        self._ahead_go: threading.Semaphore | None = None
        self._frames: queue.SimpleQueue[wire.Frame | BaseException]  # of the thread that reads ahead

    # life

    def serve(self) -> None:
        """Say hello, then answer until the client is gone."""
        self.capture = logs.Capture(self.stream, self._pipes)
        os.register_at_fork(after_in_child=self._forked)
        here = {**wire.versions(), "pid": os.getpid(), "host": os.uname().nodename, "shm": self.side is not None}
        self.stream.send(wire.HELLO, meta=json.dumps(here).encode())
        try:
            hello = self.stream.receive()
            if hello.kind != wire.HELLO:
                raise ProtocolError("the client did not say hello")
            self._welcome(json.loads(hello.meta))
            own = frozenset(self._own_path)
            while True:
                self._answer(self._next())
                if type(sys.path) is not list:
                    sys.path = []
                if not own.issubset(sys.path):  # what is imported later must be found
                    self._set_path(sys.path[:])
        except EOFError:
            pass
        except OSError as error:  # out of descriptors or memory, used up by earlier calls: the client finds another
            _say_spent(error)
        except (ProtocolError, VersionMismatch) as error:
            payload = exceptions.dumps(error)
            meta = outcomes.error_meta(error, "runtime")
            self.stream.send(wire.ERROR, meta=meta, body=payload.data, buffers=payload.buffers)

    def _forked(self) -> None:
        """In a child that a call forks: it has no client, and must not speak to its parent's."""
        self.forked = True
        self.stream.forget()
        self.capture.forget()
        if self.side is not None:
            self.side.close()

    def _welcome(self, hello: dict[str, Any]) -> None:
        wire.check_versions(wire.versions(), hello, where="the client")
        os.environ.update(hello.get("env", {}))
        for name in hello.get("unset", ()):
            os.environ.pop(name, None)
        os.environ.update(self.pinned)
        if "sys_path" in hello:
            self._set_path(hello["sys_path"])
        if cwd := hello.get("cwd"):
            try:
                os.chdir(cwd)
            except OSError:
                pass  # the client's directory is not there on this host
        sys.argv = [hello.get("argv0", "")]
        if hello.get("shm") and self.side is not None:
            from . import shm

            self.stream.arena = shm.Arena(self.side)
            self.stream.mapped = shm.Mapped(self.side)

    def _set_path(self, entries: list[str]) -> None:
        """Import as the client does; what only this side knows comes last."""
        known = set(entries)
        sys.path[:] = entries + [entry for entry in self._own_path if entry not in known]
        sys.path_importer_cache.clear()

    def _next(self) -> wire.Frame:
        """The next frame for the main thread: read here, or by the thread that reads ahead while the client says so."""
        if not self._ahead:
            frame = self.stream.receive()
            if frame.flags & wire.AHEAD:
                self._ahead = True
                if self._ahead_go is None:
                    self._frames = queue.SimpleQueue()
                    self._ahead_go = threading.Semaphore(0)
                    threading.Thread(target=self._read_ahead, name="flowfn-ahead", daemon=True).start()
                self._ahead_go.release()
            return frame
        ahead = self._frames.get()
        if isinstance(ahead, BaseException):
            raise ahead
        self._ahead = bool(ahead.flags & wire.AHEAD)
        return ahead

    def _read_ahead(self) -> None:
        """Read while the main thread computes, and send what a batch has finished meanwhile."""
        assert self._ahead_go is not None
        poll = select.poll()
        poll.register(self.stream.read_fd, select.POLLIN)
        while True:
            self._ahead_go.acquire()
            more = True
            wait = FLUSH_S
            while more:
                try:
                    while self.stream.pending == 0 and not poll.poll(wait * 1000):
                        batch = self.batch
                        wait = FLUSH_S if batch is not None and batch.flush() else min(wait * 2, 0.1)
                    frame = self.stream.receive()
                except BaseException as error:  # the main thread waits for it
                    self._frames.put(error)
                    return
                if frame.kind == wire.RECALL:
                    self.recalled = frame.call
                elif frame.kind == wire.STAGE:
                    threading.Thread(target=_stage, args=(frame,), daemon=True).start()
                else:
                    self._frames.put(frame)
                more = bool(frame.flags & wire.AHEAD)

    def _answer(self, frame: wire.Frame) -> None:
        kind = frame.kind
        if kind == wire.CALL:
            self._call(frame)
        elif kind == wire.BATCH:
            self._batch(frame)
        elif kind == wire.FUNCTION:
            self.functions[frame.arg] = (frame, json.loads(frame.meta).get("kwargs", "") if frame.meta else "")
            self.loaded.pop(frame.arg, None)
        elif kind == wire.PATHS:
            self._set_path(json.loads(frame.meta))
        elif kind == wire.OBJECT:
            self.objects[frame.meta.decode()] = _Lazy(frame)
        elif kind == wire.DROP:
            key = frame.meta.decode()
            self.objects.pop(key, None)
            for number in [number for number, (_, shared) in self.functions.items() if shared == key]:
                del self.functions[number]
                self.loaded.pop(number, None)
            if self.stream.mapped is not None:
                self.stream.mapped.forget(EVERYBODY | int(key.rpartition("-")[2]))
        # CREDIT, CLOSE, RECALL and END that come after the end of what they were about need no answer.

    # calls

    def function(self, number: int) -> tuple[Callable[..., Any], dict[str, Any]]:
        """A function body and the keyword arguments that all its calls share, loaded at the first use."""
        if found := self.loaded.get(number):
            return found
        frame, shared = self.functions[number]
        objects = _Objects(self.objects)
        try:
            function = bodies.load(frame.body, frame.buffers, objects=objects)
        except SerializationError as error:
            _end_if_spent(error.__cause__)
            raise
        function = outcomes.committing(function)
        kwargs = objects[shared] if shared else {}
        self.loaded[number] = function, kwargs
        return function, kwargs

    def arguments(self, payload: Any, buffers: list[Any]) -> tuple[Any, list[Any]]:
        """Unpickled arguments, and the references in them, staged."""
        try:
            value, references = pickling.loads(payload, buffers, objects=_Objects(self.objects))
        except Exception as error:
            _end_if_spent(error)
            raise SerializationError(
                f"the arguments can't be rebuilt in the worker: {type(error).__name__}: {error}",
                hint="are the modules of their types installed where the worker runs?",
            ) from error
        for reference in references:
            reference.prepare()
        return value, references

    def _call(self, frame: wire.Frame) -> None:
        call = frame.call
        self.capture.begin(call)
        references: list[Any] = []
        started = time.perf_counter()
        try:
            function, shared = self.function(frame.arg)
            (args, kwargs), references = self.arguments(frame.body, frame.buffers)
            want_begin = frame.flags & wire.WANT_BEGIN
            frame.buffers.clear()  # the arguments' own now, for the function to let go of
            if want_begin:
                self.stream.send(wire.BEGIN, call=call)
            started = time.perf_counter()
            value = function(*args, **shared, **kwargs)
            args = kwargs = None
            complete = True
            if type(value) in outcomes.STREAMS:
                complete = self._stream_values(call, value)
                value = None
            else:
                value = self.settle(value)
            if self.forked:
                outcomes.end_fork(None)
            outcomes.finish(references, complete)
            payload = outcomes.payload(value)
            value = None
        except BaseException as error:
            if self.forked:
                outcomes.end_fork(error)
            outcomes.finish(references, False)
            meta, payload = outcomes.failure(error)
            kind = wire.ERROR
            del error
        else:
            meta, kind = b"", wire.RESULT
        self.capture.flush()
        self.own_up()
        micros = min(int((time.perf_counter() - started) * 1e6), 0xFFFFFFFF)
        if kind == wire.RESULT:
            self.stream.send_back(kind, call=call, arg=micros, body=payload.data, buffers=payload.buffers)
        else:
            self.stream.send(kind, call=call, arg=micros, meta=meta, body=payload.data, buffers=payload.buffers)
        self.capture.call = 0

    def own_up(self) -> None:
        """Give no outcome of a call of which the kernel killed something for want of memory: the host ends this worker.

        The function may not have noticed, and the host looks now and then only.
        """
        if self._kernel_kills is not None and limits.kernel_kills() > self._kernel_kills:
            time.sleep(END_S)

    def settle(self, value: Any) -> Any:
        """The value, awaited if it is a coroutine."""
        if type(value) is types.CoroutineType:
            import asyncio

            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                asyncio.set_event_loop(self._loop)
            return self._loop.run_until_complete(value)
        return value

    def _stream_values(self, call: int, values: Any) -> bool:
        """Send what a generator yields, never more than the client has room for. False if it was closed early."""
        if type(values) is types.AsyncGeneratorType:
            values = self._synchronous(values)
        self.stream.send(wire.STREAM, call=call)
        credit = STREAM_WINDOW
        try:
            for value in values:
                if self.forked:
                    outcomes.end_fork(None)
                payload = outcomes.payload(value)
                self.capture.flush()
                self.stream.send(wire.YIELD, call=call, body=payload.data, buffers=payload.buffers)
                del value, payload
                credit -= 1
                while not credit:
                    frame = self.stream.receive()
                    if frame.call == call and frame.kind == wire.CREDIT:
                        credit += frame.arg
                    elif frame.call == call and frame.kind == wire.CLOSE:
                        return False
            return True
        finally:
            values.close()

    def _synchronous(self, values: Any) -> Any:
        try:
            while True:
                try:
                    yield self.settle(_awaited(values.__anext__()))
                except StopAsyncIteration:
                    return
        finally:
            self.settle(_awaited(values.aclose()))

    def _batch(self, frame: wire.Frame) -> None:
        batch = self.batch = Batch(self, frame)
        del frame
        try:
            batch.run()
        finally:
            self.batch = None
            self.capture.call = 0


class _Lazy:
    """A shared object that was not unpickled yet."""

    __slots__ = ("frame",)

    def __init__(self, frame: wire.Frame) -> None:
        self.frame = frame


class _Objects(dict[str, Any]):
    """The shared objects by key, unpickled when first asked for."""

    def __init__(self, store: dict[str, Any]) -> None:
        super().__init__()
        self.store = store

    def __contains__(self, key: object) -> bool:
        return key in self.store

    def __getitem__(self, key: str) -> Any:
        value = self.store[key]
        if type(value) is _Lazy:
            frame = value.frame
            buffers = [memoryview(buffer).toreadonly() for buffer in frame.buffers]  # all calls share them
            value = self.store[key] = pickling.loads(frame.body, buffers, objects=self)[0]
        return value


def _say_spent(error: BaseException) -> None:
    print(f"flowfn: this worker can't go on: {error}", file=sys.stderr, flush=True)


def _end_if_spent(error: BaseException | None) -> None:
    """End this worker if earlier calls left it no descriptors to import something with: the client finds another."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        _say_spent(error)
        os._exit(0)


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


def _stage(frame: wire.Frame) -> None:
    """Stage what a coming call will need. Its errors are that call's to report."""
    try:
        references = pickling.loads(frame.body, frame.buffers)[1]
        if references:
            from .data import ahead

            ahead.stage(references)
    except Exception:
        pass
