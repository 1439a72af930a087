"""The handle: what `@flow.function` makes of a function, and the ways to run it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sized
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar, overload

from flowfn import body as bodies_here
from flowfn import pools
from flowfn.clock import clock
from flowfn.shared import Shared
from flowfn.spec import FunctionSpec
from flowfn_runtime import bodies, pickling
from flowfn_runtime.errors import CallCancelled, SerializationError, ValidationError

if TYPE_CHECKING:
    from flowfn.call import Call
    from flowfn.future import Future
    from flowfn.map import Map
    from flowfn.pool import Pool
    from flowfn.task import Task

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")


# As in `inspect`, whose import would be a quarter of the way from a bare Python to a decorated function.
_GENERATOR, COROUTINE, _ASYNC_GENERATOR = 0x20, 0x80, 0x200


class Function(Generic[P, R]):
    """A function that can be run here, by calling it, or elsewhere. Made by `flow.function`.

    Attributes: `name`, for logs and listings; `spec`, the options.
    """

    __flow_wrapped__: Callable[P, R]
    # The function's own, where it has them.
    __name__: str
    __qualname__: str

    def __init__(self, function: Callable[P, R], spec: FunctionSpec) -> None:
        self.__flow_wrapped__ = function
        self.spec = spec
        self.name = spec.name or getattr(function, "__qualname__", type(function).__qualname__).replace("<locals>.", "")
        self._bound: tuple[Any, ...] = ()
        self._set_up()
        for attribute in ("__module__", "__name__", "__qualname__", "__doc__", "__annotations__"):
            try:
                setattr(self, attribute, getattr(function, attribute))
            except AttributeError:
                pass
        self.__wrapped__ = function

    def _set_up(self) -> None:
        self._body = bodies_here.Body(self.__flow_wrapped__)
        self._pool: Pool | None = None
        self._generation = -1

    # here

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the function here, as if it were not decorated. Outputs among its arguments are published."""
        here: Any = (*self._bound, *map(_here, args))
        output = sys.modules.get("flowfn_runtime.data.output")
        outputs = [a for a in (*here, *kwargs.values()) if isinstance(a, output.Output)] if output else ()
        if not outputs:
            return self.__flow_wrapped__(*here, **kwargs)
        with ExitStack() as stack:
            for each in outputs:
                stack.enter_context(each)
            return self.__flow_wrapped__(*here, **kwargs)

    def local(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the function here: the same as calling it."""
        return self(*args, **kwargs)

    # elsewhere

    def remote(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the function on a worker and return its result.

        A generator function returns an iterator over what it yields, as it is yielded; an `async def` function its
        result. What the function raises is raised here, with its own type.

        Raises WorkerLost if the worker died, OutOfMemory over `memory=`, FunctionTimeout over `timeout=`,
        SerializationError for what can't be pickled, BackendUnavailable or ResourceUnavailable if no worker can be had.
        """
        if (asyncio := sys.modules.get("asyncio")) is not None and asyncio._get_running_loop() and not _in_a_cell():
            warnings.warn(
                f"{self.name}.remote() blocks the running event loop; write: await {self.name}.spawn(...)",
                RuntimeWarning,
                stacklevel=2,
            )
        from flowfn.call import execute

        pool = self._find_pool()
        return execute(self._call(args, kwargs), pool).value()  # type: ignore[no-any-return]

    def spawn(self, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Start the function on a worker and return a Future at once. Await it, or call its `result()`."""
        from flowfn.future import Future

        pool = self._find_pool()
        call = self._call(args, kwargs)
        future: Future[R] = Future(call)
        run_future(pool, call, future)
        return future

    def map(
        self,
        *iterables: Iterable[Any],
        kwargs: Mapping[str, Any] | None = None,
        window: int | None = None,
        order_outputs: bool = True,
        return_exceptions: bool = False,
    ) -> Map[R]:
        """Run the function for each input, on all workers; an iterator over the results, as soon as they may.

        Inputs are pulled lazily: at most `window` (default: as many as keep the workers busy) are under way or
        waiting to be taken. Results come in input order, or with `order_outputs=False` as they are ready. The first
        exception is raised where its result would be, and the rest is cancelled; with `return_exceptions` exceptions
        are results. Several iterables give several arguments, as in the built-in `map`; `kwargs` go to every call and
        travel once to each worker, which must not change them. Leaving the loop cancels the rest.
        """
        if not iterables:
            raise TypeError("map() needs at least one iterable of inputs")
        single = len(iterables) == 1 and not self._bound
        if single:
            source: Iterable[Any] = iterables[0]
        elif self._bound:
            bound = self._bound
            source = ((*bound, *values) for values in zip(*iterables, strict=False))
        else:
            source = zip(*iterables, strict=False)
        totals = [len(i) for i in iterables if isinstance(i, Sized)]
        total = min(totals) if totals else None
        return self._map(source, not single, kwargs, window, order_outputs, return_exceptions, total)

    def starmap(
        self,
        arguments: Iterable[Iterable[Any]],
        *,
        kwargs: Mapping[str, Any] | None = None,
        window: int | None = None,
        order_outputs: bool = True,
        return_exceptions: bool = False,
    ) -> Map[R]:
        """As `map`, with the arguments of each call in a tuple."""
        total = len(arguments) if isinstance(arguments, Sized) else None
        bound = self._bound
        source = ((*bound, *values) for values in arguments)
        return self._map(source, True, kwargs, window, order_outputs, return_exceptions, total)

    def for_each(
        self,
        *iterables: Iterable[Any],
        kwargs: Mapping[str, Any] | None = None,
        window: int | None = None,
        ignore_exceptions: bool = False,
    ) -> None:
        """As `map`, for what the calls do and not for what they return. Raises the first exception, or none at all."""
        results = self.map(
            *iterables, kwargs=kwargs, window=window, order_outputs=False, return_exceptions=ignore_exceptions
        )
        for _ in results:
            pass

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> Task:
        """Make the call a durable task: it survives this process, and its result can be had any number of times."""
        from flowfn.task import submit_call

        return submit_call(self.spec, self.__flow_wrapped__, (*self._bound, *args), kwargs)

    def options(self, **options: Any) -> Function[P, R]:
        """This function with some options set anew, as a handle of its own; they are those of `flow.function`."""
        other = type(self)(self.__flow_wrapped__, self.spec.replace(**options))
        other._bound = self._bound
        return other

    # within

    def _find_pool(self) -> Pool:
        pool = self._pool
        if isinstance(self.spec.secrets, tuple) and self.spec.secrets:
            pool = None  # which one it is depends on their values
        if pool is not None and pool.code != pools.code_of(pool.backend):
            pool = None  # files were edited, or modules imported that its workers don't have; or who asks has changed
        if pool is None or self._generation != pools.current or pool.closed:
            pool = self._pool = pools.pool_for(self.spec)
            self._generation = pools.current
            pool.expect()
        return pool

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        from flowfn.call import Call

        if self._bound:
            args = (*self._bound, *args)
        version = self._body.current()
        try:
            payload = pickling.dumps((args, kwargs))
        except SerializationError as error:
            error.args = (self._name_argument(error.message),)
            raise
        return Call(self.spec, self.name, version, payload)

    def _name_argument(self, message: str) -> str:
        """`value[0][1]` and `value[1]['x']` as the function's own parameters."""
        import re

        if found := re.match(r"value\[0\]\[(\d+)\](.*)", message, re.DOTALL):
            index, rest = int(found[1]), found[2]
            try:
                import inspect

                names = list(inspect.signature(self.__flow_wrapped__).parameters)
            except (TypeError, ValueError):
                names = []
            return f"argument {names[index] if index < len(names) else index}{rest}"
        if found := re.match(r"value\[1\]\['(\w+)'\](.*)", message, re.DOTALL):
            return f"argument {found[1]}{found[2]}"
        return message

    def _map(
        self,
        source: Iterable[Any],
        star: bool,
        kwargs: Mapping[str, Any] | None,
        window: int | None,
        ordered: bool,
        return_exceptions: bool,
        total: int | None,
    ) -> Map[R]:
        from flowfn.map import Map, Run
        from flowfn.shared import put

        if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
            raise ValidationError(f"window={window!r} is not accepted; accepted: a whole number, 1 or more, or None")
        if flags(self.__flow_wrapped__) & (_GENERATOR | _ASYNC_GENERATOR):
            raise TypeError(
                f"{self.name} is a generator function, which has no single result; call .remote() per input"
            )
        run = Run(
            self._find_pool(),
            self.spec,
            self.name,
            self._body,
            source,
            star=star,
            shared=put(dict(kwargs)) if kwargs else None,
            window=window,
            ordered=ordered,
            return_exceptions=return_exceptions,
            total=total,
        )
        return Map(run)

    # as an object

    @overload
    def __get__(self, instance: None, owner: type | None = None) -> Function[P, R]: ...
    @overload
    def __get__(
        self: Function[Concatenate[Any, Q], R], instance: object, owner: type | None = None
    ) -> Function[Q, R]: ...
    def __get__(self, instance: object | None, owner: type | None = None) -> Function[Any, R]:
        if instance is None:
            return self
        method: Function[Any, R] = type(self).__new__(type(self))
        method.__dict__.update(self.__dict__)
        method._bound = (instance,)
        return method

    def __reduce__(self) -> Any:
        from flowfn.backends.base import Backend

        name = None if self._bound else bodies_here.importable(self)
        if name and bodies.resolve(*name) is self:  # and no other handle of the same function, with other options
            return bodies.handle_by_name, name
        spec = self.spec
        if isinstance(spec.backend, Backend):
            spec = spec.replace(backend=spec.backend.name)  # the object holds this process's connections
        # The spec as bytes: where only the runtime is installed it can't be unpickled, and is not needed.
        packed = bytes(pickling.dumps(spec, in_band=True).data)
        state = {"__flow_wrapped__": self.__flow_wrapped__, "spec": packed, "name": self.name, "_bound": self._bound}
        return bodies.new_handle, ("flowfn.function", type(self).__name__), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.spec = pickling.loads(state["spec"])[0]
        self.__wrapped__ = self.__flow_wrapped__
        self._set_up()

    def __repr__(self) -> str:
        return f"<flow.function {self.name}>"


class AsyncFunction(Function[P, R]):
    """A Function of an `async def` function: called here it gives a coroutine, elsewhere its result."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:  # type: ignore[override]
        """Call the function here, as if it were not decorated: await what it returns."""
        return super().__call__(*args, **kwargs)  # type: ignore[return-value]


def _here(value: Any) -> Any:
    """A reference of `flow.put` as the object it stands for; anything else as it is."""
    return value.get() if type(value) is Shared else value


def flags(function: Any) -> int:
    """What kind of function it is, also one with some arguments given by functools.partial."""
    code = getattr(getattr(function, "func", function), "__code__", None)
    return code.co_flags if code is not None else 0


def _in_a_cell() -> bool:
    """Whether who calls `remote` is plain code of a notebook, where a loop runs that only waits for the cell."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return hasattr(shell, "kernel") and not sys._getframe(2).f_code.co_flags & COROUTINE


def run_future(pool: Pool, call: Call, future: Future[Any]) -> None:
    """Run the call in a helper thread of its pool, for the future."""
    from flowfn.call import Outcome, Pause, execute

    def job() -> Callable[[], object] | None:
        if not future._start():
            return None
        try:
            outcome = execute(call, pool, sleep=False)
        except BaseException as error:
            outcome = Outcome(error=error)
        if isinstance(outcome, Pause):
            clock.later(outcome.seconds, again)
            return None
        del call.payload  # the future may be kept for long, and need not keep the arguments
        return lambda: future._finish(outcome)

    def again() -> None:
        try:
            pool.helpers.run_later(job)
        except CallCancelled as error:
            future._finish(Outcome(error=error))

    pool.helpers.run_later(job)
