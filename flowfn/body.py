"""What of a function travels, and whether it is still what travelled before.

An importable function goes by name. One of `__main__`, a notebook, a closure or a lambda goes by value, with the
globals it refers to; these may change between two calls (a notebook cell is run again), so each call looks whether
they did. Looking is cheap for what can only be rebound, which is nearly everything; what can change in place (a list, a
dictionary) is pickled anew and compared.
"""

from __future__ import annotations

import itertools
import pickle
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

from flowfn.shared import Shared
from flowfn_runtime import bodies, codes, pickling
from flowfn_runtime.errors import SerializationError
from flowfn_runtime.pickling import Payload

BIG_BYTES = 1 << 20  # captured values bigger than this are taken as they were at the first call
_FIXED = (*pickling.PLAIN, types.ModuleType, types.BuiltinFunctionType, range, slice, Shared)
_ABSENT = object()  # of a global that is not there, or not yet
_numbers = itertools.count(1)


class Version:
    """A function body as it was at some time: one number for one content."""

    __slots__ = ("digest", "objects", "payload")

    def __init__(self, payload: Payload) -> None:
        self.digest = next(_numbers)
        self.payload = payload
        self.objects = [r for r in payload.references if isinstance(r, Shared)]


class Body:
    """A function as something to ship. `current()` is cheap when nothing changed."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._version: Version | None = None
        self._bound: list[tuple[dict[str, Any], str, Any]] = []
        self._cells: list[tuple[Any, Any]] = []
        self._classes: list[tuple[type, list[tuple[str, Any]]]] = []
        self._functions: list[tuple[types.FunctionType, Any, Any, Any]] = []
        self._fixed = True

    def current(self) -> Version:
        """The body as it is now. Raises SerializationError if it can't be pickled."""
        version = self._version
        if version is not None:
            if self._fixed and self._unchanged():
                return version
            if not self._fixed and version.payload.size_bytes > BIG_BYTES and self._unchanged():
                return version
        name = importable(self.function)
        if name:
            self._version = Version(Payload(pickle.dumps(name), [], []))
            return self._version
        self._watch()
        payload = self._pickle()
        if version is not None and bytes(version.payload.data) == payload.data and not payload.buffers:
            return version
        if not self._fixed and payload.size_bytes > BIG_BYTES:
            warnings.warn(
                f"{describe(self.function)} refers to variables of {payload.size_bytes:,} bytes, which travel with it "
                "as they are now; changes are not seen by later calls. Pass them as arguments, or use flow.put().",
                RuntimeWarning,
                stacklevel=4,
            )
        self._version = Version(payload)
        return self._version

    def _pickle(self) -> Payload:
        if (simple := codes.dumps(self.function)) is not None:
            return Payload(simple, [], [])
        try:
            payload = pickling.dumps(self.function)
        except SerializationError as error:
            error.args = (error.message.replace("value", describe(self.function), 1),)
            raise
        # The arrays in it are the user's, who may change them before the body is sent to another worker.
        return Payload(bytes(payload.data), [bytes(b) for b in payload.buffers], payload.references)

    def _unchanged(self) -> bool:
        for namespace, name, value in self._bound:
            if namespace.get(name, _ABSENT) is not value:
                return False
        for kind, members in self._classes:
            now = vars(kind)
            # Pickling an instance adds __slotnames__.
            if len(now) - ("__slotnames__" in now) != len(members) or any(
                now.get(name, _ABSENT) is not value for name, value in members
            ):
                return False
        for function, code, defaults, keyword_defaults in self._functions:
            if function.__code__ is not code or function.__defaults__ is not defaults:
                return False
            if function.__kwdefaults__ is not keyword_defaults:
                return False
        return all(_content(cell) is value for cell, value in self._cells)

    def _watch(self) -> None:
        self._bound, self._cells, self._fixed = [], [], True
        self._classes, self._functions = [], []
        self._visit(self.function, set())

    def _visit(self, value: Any, seen: set[int]) -> None:
        """Note what a captured value can change by: names that are rebound, or its own content."""
        value = bodies.unwrap(value)
        kind = type(value)
        if kind in _FIXED or id(value) in seen:
            return
        seen.add(id(value))
        if kind is tuple or kind is frozenset:
            for item in value:
                self._visit(item, seen)
        elif kind is types.FunctionType:
            if not importable(value):
                self._visit_function(value, seen)
        elif isinstance(value, type):
            if not importable(value):
                members = [item for item in vars(value).items() if item[0] != "__slotnames__"]
                self._classes.append((value, members))
                for name, member in members:
                    if type(member) in (staticmethod, classmethod, property):
                        for part in (getattr(member, n, None) for n in ("__func__", "fget", "fset", "fdel")):
                            self._visit(part, seen)
                    elif type(member) is types.FunctionType or not (name.startswith("__") and name.endswith("__")):
                        self._visit(member, seen)
                for base in value.__bases__:
                    self._visit(base, seen)
        elif kind is types.MethodType:
            self._visit(value.__func__, seen)
            self._visit(value.__self__, seen)
        else:
            self._fixed = False

    def _visit_function(self, function: types.FunctionType, seen: set[int]) -> None:
        namespace = function.__globals__
        for name in codes.names(function.__code__):
            found = namespace.get(name, _ABSENT)
            self._bound.append((namespace, name, found))
            if found is not _ABSENT:
                self._visit(found, seen)
        for cell in function.__closure__ or ():
            content = _content(cell)
            self._cells.append((cell, content))
            self._visit(content, seen)
        self._functions.append((function, function.__code__, function.__defaults__, function.__kwdefaults__))
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._visit(value, seen)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def importable(value: Any) -> tuple[str, str] | None:
    """Module and qualified name under which a worker can import the very same object, or None."""
    module_name = getattr(value, "__module__", None)
    qualname = getattr(value, "__qualname__", None)
    if not isinstance(module_name, str) or not isinstance(qualname, str) or "<" in qualname:
        return None
    if module_name in ("__main__", "__mp_main__") or module_name not in sys.modules:
        return None
    found: Any = sys.modules[module_name]
    for name in qualname.split("."):
        found = getattr(found, name, None)
    if bodies.unwrap(found) is not bodies.unwrap(value):
        return None
    return (module_name, qualname) if _findable(module_name) else None


_found: dict[str, bool] = {}


def _findable(module: str) -> bool:
    """Whether the module could be imported anew, from the same `sys.path`."""
    top = module.partition(".")[0]
    known = _found.get(top)
    if known is None:
        spec = None
        for finder in sys.meta_path:
            try:
                spec = finder.find_spec(top, None)
            except Exception:
                continue
            if spec is not None:
                break
        known = _found[top] = spec is not None
    if not known:
        import cloudpickle

        # It exists in this process only, so all that it holds goes by value.
        if module not in cloudpickle.list_registry_pickle_by_value():
            cloudpickle.register_pickle_by_value(sys.modules[module])
    return known


def describe(function: Any) -> str:
    """The function's name, for messages."""
    return f"{getattr(function, '__qualname__', None) or type(function).__qualname__}()"
