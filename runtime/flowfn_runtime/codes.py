"""Simple functions by value, without cloudpickle: their code, and the few globals that it names.

Most functions of a script are simple: no closure, and globals that are modules or plain values. Code objects of one
version of Python are the same to both sides (the handshake sees to it), so the standard library's `marshal` carries
them. It spares each side the import of cloudpickle, which is a third of a cold call.
"""

from __future__ import annotations

import builtins
import importlib
import marshal
import pickle
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

from . import pickling

MODULE_NAMES = (
    "__package__",
    "__name__",
    "__path__",
    "__file__",
)  # what a function knows of its module, as cloudpickle
_KEPT = ("__name__", "__qualname__", "__module__", "__doc__", "__defaults__", "__kwdefaults__", "__annotations__")
_BIG = pickling.OUT_OF_BAND_BYTES  # larger values go out of band, which is the other pickler's


def dumps(function: Any) -> bytes | None:
    """The pickle of a simple function; None if it is not simple."""
    if type(function) is not types.FunctionType or function.__closure__ or function.__dict__:
        return None
    if getattr(function, "__type_params__", None):
        return None
    try:
        kept = {name: getattr(function, name) for name in _KEPT}
    except Exception:  # annotations are evaluated when they are asked for, from Python 3.14 on
        return None
    values = {name: function.__globals__[name] for name in MODULE_NAMES if name in function.__globals__}
    modules = {}
    for name in names(function.__code__):
        if name not in function.__globals__:
            continue
        value = function.__globals__[name]
        if type(value) is types.ModuleType:
            if not _by_name(value):
                return None
            modules[name] = value.__name__
        else:
            values[name] = value
    if not all(_simple(value) for value in (*values.values(), *(function.__defaults__ or ()))):
        return None
    if not all(
        _simple(value) for part in ("__kwdefaults__", "__annotations__") for value in (kept[part] or {}).values()
    ):
        return None
    return pickle.dumps(_Made(marshal.dumps(function.__code__), kept, values, modules), 5)


class _Made:
    """What a function is unpickled from."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __reduce__(self) -> Any:
        return make, self.parts


def make(
    code: bytes, kept: Mapping[str, Any], values: Mapping[str, Any], modules: Mapping[str, str]
) -> Callable[..., Any]:
    """The function, with a namespace of its own."""
    namespace = {"__builtins__": builtins, **values}
    for name, module in modules.items():
        namespace[name] = importlib.import_module(module)
    function = types.FunctionType(marshal.loads(code), namespace)
    for name, value in kept.items():
        setattr(function, name, value)
    return function


def names(code: types.CodeType) -> set[str]:
    """The names of globals and attributes in the code, and in the code within."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= names(constant)
    return found


def _by_name(module: types.ModuleType) -> bool:
    """Whether the worker can import the module, and needs no more than that.

    Of a package it may need submodules that something here has imported; cloudpickle finds them.
    """
    name = module.__name__
    if sys.modules.get(name) is not module or module.__spec__ is None or hasattr(module, "__path__"):
        return False
    if name in ("__main__", "__mp_main__"):
        return False
    cloudpickle = sys.modules.get("cloudpickle")
    return cloudpickle is None or name not in cloudpickle.list_registry_pickle_by_value()


def _simple(value: Any) -> bool:
    """Whether pickle gives what cloudpickle would, and the value can't change in place."""
    kind = type(value)
    if kind is tuple:
        return len(value) < _BIG and all(map(_simple, value))
    if kind is type:
        return value.__module__ == "builtins" and getattr(builtins, value.__name__, None) is value
    return kind in pickling.PLAIN and not (kind in (bytes, str) and len(value) >= _BIG)
