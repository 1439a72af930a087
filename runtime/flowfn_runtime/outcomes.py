"""What comes of a call in the worker: a pickled result, or an error that says whose it is."""

from __future__ import annotations

import json
import os
import sys
import types
from typing import TYPE_CHECKING, Any

from . import exceptions, items, pickling
from .errors import SerializationError

if TYPE_CHECKING:
    from collections.abc import Callable

STREAMS = (types.GeneratorType, types.AsyncGeneratorType)
# The frames of these files that a traceback begins with are none of the user's.
_HERE = os.path.dirname(__file__)
_OURS = tuple(os.path.join(_HERE, name) for name in ("worker.py", "batch.py", "data/volume_commit.py"))


def committing(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, and then what it changed in volumes of a bucket written back."""
    if "FLOW_VOLUME_KEEPERS" not in os.environ:
        return function
    from .data import volume_commit

    return volume_commit.after(function)


def finish(references: list[Any], ok: bool) -> None:
    """Publish or discard what a call's references hold. Publishing may raise; discarding does not."""
    for reference in references:
        try:
            reference.finish(ok)
        except Exception:
            if ok:
                raise
    if ok and references and "FLOW_VOLUME_KEEPERS" in os.environ:
        from .data import volume_commit

        volume_commit.commit_mounted()  # an Output may have been published in one


def end_fork(error: BaseException | None) -> None:
    """End a process that a call forked and that came back from the function: the call is its parent's."""
    code = 0
    try:
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        elif error is not None:
            code = 1
            sys.excepthook(type(error), error, error.__traceback__)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def payload(value: Any) -> pickling.Payload:
    """A result, pickled. Raises SerializationError that speaks of the result."""
    try:
        return pickling.dumps(value)
    except SerializationError as error:
        error.args = (error.message.replace("value", "the result", 1),)
        raise


def failure(error: BaseException) -> tuple[bytes, pickling.Payload]:
    """Meta and body of an ERROR: whose error it is, its type names, and the exception itself."""
    skip = 0
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_frame.f_code.co_filename in _OURS:
        skip += 1
        traceback = traceback.tb_next
    origin = "runtime" if isinstance(error, SerializationError) else "function"
    return error_meta(error, origin), exceptions.dumps(error, skip_frames=skip)


def failed(error: BaseException) -> items.Packed:
    """The same, as the result of one item of a batch."""
    meta, pickled = failure(error)
    return items.Packed(pickled, meta)


def error_meta(error: BaseException, origin: str) -> bytes:
    """What can be known of an error without unpickling it."""
    return json.dumps({"origin": origin, "types": exceptions.type_names(error)}).encode()


def no_stream(value: Any) -> Any:
    """The value, which must not be a generator."""
    if type(value) in STREAMS:
        raise SerializationError(
            "a generator can't be the result of one item of a map", hint="call .remote() per input"
        )
    return value
