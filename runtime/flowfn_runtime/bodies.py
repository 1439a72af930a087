"""Function bodies as they travel, and handles of functions where the client package is not installed.

A body is either the name of an importable function or the function itself, by value. A decorated function is a handle;
what travels is what it wraps.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from . import codes as codes  # for workers whose calls leave them no descriptors to import it with
from . import pickling
from .errors import SerializationError

WRAPPED = "__flow_wrapped__"  # the attribute by which a handle says which function it wraps


def unwrap(value: Any) -> Any:
    """The function inside a handle; anything else as it is."""
    return getattr(value, WRAPPED, value)


def resolve(module: str, qualname: str) -> Any:
    """The object of that name, importing its module."""
    value: Any = importlib.import_module(module)
    for name in qualname.split("."):
        value = getattr(value, name)
    return value


def load(data: Any, buffers: Any = (), *, objects: dict[str, Any] | None = None) -> Callable[..., Any]:
    """The function of a body. Raises SerializationError if it can't be had here."""
    try:
        body, _ = pickling.loads(data, buffers, objects=objects)
        function = unwrap(resolve(*body)) if type(body) is tuple else body
    except Exception as error:
        raise SerializationError(
            f"the function can't be loaded in the worker: {type(error).__name__}: {error}",
            hint="is its module, and what it imports, installed where the worker runs?",
        ) from error
    if not callable(function):
        raise SerializationError(f"what the function's name stands for in the worker is a {type(function).__name__}")
    return function  # type: ignore[no-any-return]


def handle_by_name(module: str, qualname: str) -> Any:
    """What a handle of an importable function is unpickled as: that handle."""
    return resolve(module, qualname)


def new_handle(module: str, name: str) -> Any:
    """What any other handle is unpickled as, empty: the client's class, or where that is not installed a plain one."""
    try:
        cls = resolve(module, name)
    except ImportError:
        return PlainHandle()
    return cls.__new__(cls)


class PlainHandle:
    """A decorated function where only the runtime is installed: it can be called, and nothing else."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__flow_wrapped__(*args, **kwargs)  # type: ignore[attr-defined]

    local = __call__
