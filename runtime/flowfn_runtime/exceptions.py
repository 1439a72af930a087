"""Exceptions to bytes and back, whole: type, attributes, cause, context, notes, groups and traceback.

Pickle loses most of that, and fails on any exception whose constructor takes other arguments than it keeps. Here an
exception is taken apart on the side where it was raised, and the parts are tried there; what can't be rebuilt arrives
as a RemoteError with its text. Tracebacks are sent as (file, function, line) and made into real ones by tblib.
"""

from __future__ import annotations

import copyreg
import pickle
import types
from typing import Any

from . import pickling
from .errors import RemoteError

_MEMBERS = (types.MemberDescriptorType, types.GetSetDescriptorType)
_MAX_CHAIN = 32  # causes and contexts that are followed
try:
    _GROUP: tuple[type, ...] = (BaseExceptionGroup,)  # type: ignore[name-defined,unused-ignore]
except NameError:  # Python 3.10
    _GROUP = ()


def type_names(error: BaseException) -> list[str]:
    """The qualified names of the exception's classes, nearest first: what a retry policy looks at."""
    return [f"{c.__module__}.{c.__qualname__}" for c in type(error).__mro__[:-1]]


def dumps(error: BaseException, *, skip_frames: int = 0) -> pickling.Payload:
    """Pickle an exception with all that hangs on it. Never fails on account of what the exception holds."""
    return pickling.dumps(_take_apart(error, skip_frames, {}))


def loads(data: Any, buffers: Any = ()) -> BaseException:
    """The exception, with its remote traceback. A RemoteError if it can't be rebuilt here."""
    record, _ = pickling.loads(data, buffers, keep_classes=True)
    return _put_together(record, {})


def _take_apart(error: BaseException, skip: int, seen: dict[int, int]) -> dict[str, Any]:
    number = seen[id(error)] = len(seen)
    record: dict[str, Any] = {
        "number": number,
        "type": type_names(error)[0],
        "text": _text(error),
        "frames": _frames(error.__traceback__)[skip:],
        "parts": None,
    }
    if not (isinstance(error, (SystemExit, KeyboardInterrupt, GeneratorExit))):
        record["parts"] = _parts(error)
    for name in ("cause", "context"):
        other = getattr(error, f"__{name}__")
        if other is not None:
            known = seen.get(id(other))
            if known is not None:
                record[name] = known
            elif len(seen) < _MAX_CHAIN:
                record[name] = _take_apart(other, 0, seen)
    record["suppress"] = error.__suppress_context__
    if isinstance(error, _GROUP):
        record["members"] = [_take_apart(member, 0, seen) for member in error.exceptions]  # type: ignore[attr-defined]
    return record


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as problem:
        return f"<its text can't be had: {type(problem).__name__}>"


def _frames(traceback: types.TracebackType | None) -> list[tuple[str, str, int]]:
    frames: list[tuple[str, str, int]] = []
    while traceback is not None and len(frames) < 1000:
        code = traceback.tb_frame.f_code
        frames.append((code.co_filename, code.co_name, traceback.tb_lineno))
        traceback = traceback.tb_next
    return frames


def _parts(error: BaseException) -> bytes | None:
    """A pickle of (how, class, arguments, attributes) that was seen to rebuild the exception; None if there is none."""
    kind = type(error)
    attributes = {}
    dropped = []
    for name, value in getattr(error, "__dict__", {}).items():
        if pickling._can_pickle(value):
            attributes[name] = value
        else:
            dropped.append(name)
    if dropped:
        note = f"flowfn: left behind, since they can't be pickled: attributes {', '.join(dropped)}"
        attributes["__notes__"] = [*attributes.get("__notes__", []), note]
    ways: list[tuple[Any, ...]] = []
    if isinstance(error, _GROUP):
        ways.append(("group", kind, (error.message,), attributes))  # type: ignore[attr-defined]
    else:
        reduced: Any = None
        try:
            reduced = error.__reduce_ex__(4)
        except Exception:
            pass
        if isinstance(reduced, tuple) and callable(reduced[0]) and len(reduced) in (2, 3):
            state = reduced[2] if len(reduced) == 3 else None
            # BaseException's own reduce gives the attributes as the state: use those that can be pickled.
            own = attributes if not isinstance(state, dict) or state == error.__dict__ else {**state, **attributes}
            ways.append(("call", reduced[0], reduced[1], own if state is None or isinstance(state, dict) else state))
        # What an OSError was made of is not all in its `args`.
        full = isinstance(error, OSError) and isinstance(reduced, tuple) and type(reduced[1]) is tuple
        ways.append(("new", kind, reduced[1] if full else error.args, attributes))
    for way in ways:
        try:
            payload = pickling.dumps(way)
            if payload.buffers:
                data = pickle.dumps(way, 5) if way[0] != "group" else None
            else:
                data = bytes(payload.data)
            if data is None:
                continue
            if way[0] == "group" or _same(_rebuild(way), error):
                return data
        except Exception:
            continue
    return None


def _same(copy: BaseException, error: BaseException) -> bool:
    if type(copy) is not type(error) or _text(copy) != _text(error):
        return False
    try:
        return len(copy.args) == len(error.args)
    except Exception:
        return False


def _rebuild(way: tuple[Any, ...], members: list[BaseException] | None = None) -> BaseException:
    how, kind, args, state = way
    error: BaseException
    if how == "group":
        error = kind(*args, members)
    elif how == "call":
        error = kind(*args)
    else:
        # The class's own constructor is passed by: it may ask for anything.
        base = next(c for c in kind.__mro__ if c.__module__ == "builtins")
        if issubclass(kind, OSError):
            error = OSError.__new__(kind)
            OSError.__init__(error, *args)
        else:
            if kind.__new__ is base.__new__:
                error = copyreg.__newobj__(kind, *args)  # type: ignore[attr-defined]
            else:
                error = BaseException.__new__(kind)
            error.args = args
    if isinstance(state, dict):
        for name, value in state.items():
            if type(getattr(kind, name, None)) in _MEMBERS:  # such as an ImportError's name
                setattr(error, name, value)
            else:
                error.__dict__[name] = value
    elif state is not None:
        error.__setstate__(state)
    return error


def _put_together(record: dict[str, Any], made: dict[int, BaseException]) -> BaseException:
    members = [_put_together(member, made) for member in record.get("members", [])]
    error: BaseException
    try:
        if record["parts"] is None:
            raise ValueError("it can't be rebuilt")
        error = _rebuild(pickling.loads(record["parts"], keep_classes=True)[0], members)
    except Exception:
        error = RemoteError(f"{record['type'].removeprefix('builtins.')}: {record['text']}")
        error.type_name = record["type"]
    made[record["number"]] = error
    error.__traceback__ = _traceback(record["frames"])
    for name in ("cause", "context"):
        other = record.get(name)
        if isinstance(other, int):
            setattr(error, f"__{name}__", made.get(other))
        elif other is not None:
            setattr(error, f"__{name}__", _put_together(other, made))
    error.__suppress_context__ = record["suppress"]
    return error


def _traceback(frames: list[tuple[str, str, int]]) -> types.TracebackType | None:
    if not frames:
        return None
    from tblib import Traceback

    traceback: types.TracebackType | None = None
    made: dict[tuple[str, str, int], Any] = {}  # endless recursion has the same few frames a thousand times
    for each in reversed(frames):
        frame = made.get(each)
        if frame is None:
            filename, name, line = each
            described = {
                "f_globals": {"__name__": name, "__file__": filename},
                "f_locals": {},
                "f_code": {"co_filename": filename, "co_name": name},
                "f_lineno": line,
            }
            alone = Traceback.from_dict({"tb_frame": described, "tb_lineno": line, "tb_next": None}).as_traceback()
            frame = made[each] = alone.tb_frame
        # One by one, since tblib itself would recurse.
        traceback = types.TracebackType(traceback, frame, frame.f_lasti, each[2])
    return traceback
