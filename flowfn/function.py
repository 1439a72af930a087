"""`@flow.function`: the decorator, and its options."""

from __future__ import annotations

import types
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, ParamSpec, TypeVar, overload

from flowfn.handle import COROUTINE, AsyncFunction, Function, flags
from flowfn.spec import FunctionSpec
from flowfn_runtime.errors import ValidationError

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class Decorator:
    """`flow.function(...)` with options: decorates a function."""

    def __init__(self, spec: FunctionSpec) -> None:
        self._spec = spec

    @overload
    def __call__(self, function: Callable[P, Coroutine[Any, Any, T]], /) -> AsyncFunction[P, T]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> Function[P, R]: ...
    def __call__(self, function: Callable[..., Any], /) -> Function[Any, Any]:
        return _decorated(function, self._spec)


def _decorated(function: Any, spec: FunctionSpec) -> Function[Any, Any]:
    if isinstance(function, Function):
        raise ValidationError(f"{function.name} is decorated with flow.function already", hint="use .options(...)")
    if isinstance(function, (staticmethod, classmethod)):
        kind = type(function).__name__
        raise ValidationError(f"flow.function can't decorate a {kind}", hint=f"put @{kind} above @flow.function")
    if isinstance(function, type) or not callable(function):
        raise ValidationError(
            f"flow.function decorates functions, and {function!r} is none",
            hint="use it as @flow.function, or @flow.function(gpu=..., ...)",
        )
    if isinstance(function, types.FunctionType) and flags(function) & COROUTINE:
        return AsyncFunction(function, spec)
    return Function(function, spec)


@overload
def function(function: Callable[P, Coroutine[Any, Any, T]], /) -> AsyncFunction[P, T]: ...
@overload
def function(function: Callable[P, R], /) -> Function[P, R]: ...
@overload
def function(
    *,
    gpu: str | int | list[str] | tuple[str, ...] | None = ...,
    cpu: float | None = ...,
    memory: str | int | None = ...,
    mounts: Any = ...,
    env: Mapping[str, str] | None = ...,
    secrets: Any = ...,
    timeout: Any = ...,
    retries: Any = ...,
    image: Any = ...,
    max_workers: int | None = ...,
    idle_timeout: Any = ...,
    backend: Any = ...,
    name: str | None = ...,
) -> Decorator: ...
def function(function: Any = None, /, **options: Any) -> Any:
    """Make a function one that can be run elsewhere: `@flow.function`, or `@flow.function(gpu="a100", ...)`.

    Options, all of them optional:

    - `gpu`: which GPUs a call needs: `"a100"`, `"a100:4"`, `"a100-80gb:2"`, `"gpu:2"`, `"any"`, or a list, the most
      wanted first. They are the worker's alone.
    - `cpu`: cores; sets the number of threads of numeric libraries, and the affinity.
    - `memory`: `"32GiB"` or bytes, for the worker and all that it starts. Going over it is an OutOfMemory error.
    - `mounts`: data at paths of the worker: `"s3://bucket/prefix"` (at /data), or `{"/train": "s3://...",
      "/models": "volume://name"}`. Buckets are read-only, volumes are not.
    - `env`: environment variables, text to text. `secrets`: names of variables of this process to pass along, or a
      mapping; their values are never shown.
    - `timeout`: seconds an attempt may run, or `"10m"`; then its process tree is ended: FunctionTimeout.
    - `retries`: how often a failed call is tried again, or `flow.Retries(...)`.
    - `image`: what the function runs in, on backends that have images.
    - `max_workers`: how many calls run at a time; default: as many as there are GPU slots, or cores.
    - `idle_timeout`: seconds after which an idle worker ends; default 300, or 60 for one that holds GPUs.
    - `backend`: where to run: `"local"`, another backend's name or URL, or a Backend; default: `FLOW_BACKEND`, the
      configuration, `"local"`.
    - `name`: for logs and listings; default: the function's own.

    Raises ValidationError, naming the option, its value and what is accepted.

    >>> import flowfn as flow
    >>> @flow.function(timeout=60)
    ... def add(a: int, b: int) -> int:
    ...     return a + b
    >>> add(1, 2)
    3
    >>> add.remote(1, 2)
    3
    >>> list(add.map([1, 2], [10, 20]))
    [11, 22]
    """
    decorate = Decorator(FunctionSpec.from_options(**options))
    return decorate if function is None else decorate(function)
