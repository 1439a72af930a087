"""Every error that flowfn raises of its own accord.

```
FlowError
├── ConfigError (ValueError)             an option, file or environment variable says something that can't be
│   └── ValidationError                  a field of a task, volume, mount or function option is wrong
├── BackendError                         the place where the call should run
│   ├── BackendUnavailable               the backend can't be used here: not installed, not reachable
│   ├── ResourceUnavailable              no such GPU, memory or slot there
│   ├── VersionMismatch                  the two sides speak different protocols or Python versions
│   ├── ProtocolError                    the stream carried something that is no frame
│   └── SandboxError                     a filesystem of the worker's own could not be made
├── CallError                            a call that did not return a value, though the function raised nothing itself
│   ├── SerializationError (TypeError)   arguments, result or exception can't be pickled, or not rebuilt
│   ├── WorkerLost                       the worker's process died
│   │   └── OutOfMemory (MemoryError)    it went over its memory limit
│   ├── FunctionTimeout (TimeoutError)   it ran longer than `timeout=`
│   ├── CallCancelled                    somebody cancelled it
│   └── RemoteError                      the function raised something that can't be rebuilt here; its text
├── DataError (OSError)                  moving or reading data
│   ├── DataNotFound (FileNotFoundError) no such object, prefix, bucket or volume
│   ├── DataAccessDenied (PermissionError)  credentials are missing, wrong, expired, or don't reach that far
│   ├── DataChanged                      the object is not the one that was seen before
│   ├── DataUnavailable (ConnectionError)  the server does not answer, or keeps failing
│   └── CacheFull                        no room in the cache or on its disk
├── VolumeError                          volumes
│   ├── VolumeNotFound (LookupError)
│   ├── VolumeInUse
│   └── VolumeConflict                   two writers changed the same volume
└── TaskError                            durable tasks
    ├── TaskNotFound (LookupError)
    ├── TaskFailed                       a command ended with a status other than 0
    └── NameConflict
```

A function's own exception is none of these: it arrives with its own type. Messages say what happened, to what, and
what to do next. Errors survive pickling, also with attributes of their own.
"""

from __future__ import annotations

from typing import Any


class FlowError(Exception):
    """Base of every error of flowfn's own.

    `hint` says what to do next, if that is known; it is shown after the message.
    """

    hint: str | None = None

    def __init__(self, message: str = "", *, hint: str | None = None) -> None:
        super().__init__(message)
        if hint is not None:
            self.hint = hint

    @property
    def message(self) -> str:
        """The message without the hint."""
        return str(self.args[0]) if self.args else ""

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message

    def __reduce__(self) -> Any:
        # Not through __init__: a subclass may ask for other arguments than it keeps in `args`.
        return _rebuild, (type(self), self.args, self.__dict__.copy())


def _rebuild(cls: type[FlowError], args: tuple[Any, ...], state: dict[str, Any]) -> FlowError:
    # The C-level base decides the memory layout, and with several bases only its own __new__ is accepted.
    base: Any = OSError if issubclass(cls, OSError) else BaseException
    error: FlowError = base.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    return error


class ConfigError(FlowError, ValueError):
    """An option, a configuration file or an environment variable says something that can't be."""


class ValidationError(ConfigError):
    """A field of a task, volume, mount or function option is wrong."""


class BackendError(FlowError):
    """The place where the call should run failed before the call itself did anything."""


class BackendUnavailable(BackendError):
    """The backend can't be used here: it is not installed, not running or not reachable.

    `uncertain`: the connection was lost before it could be known whether what was asked for was done.
    """

    uncertain: bool = False


class ResourceUnavailable(BackendError):
    """Nothing there fits the resources that were asked for."""


class VersionMismatch(BackendError):
    """The two sides speak different protocols or run different Python versions."""


class ProtocolError(BackendError):
    """The stream carried something that is no frame."""


class SandboxError(BackendError):
    """A filesystem of the worker's or task's own could not be made."""


class CallError(FlowError):
    """A call returned no value, though the function itself raised nothing."""


class SerializationError(CallError, TypeError):
    """Arguments, a result or an exception can't be pickled, or can't be rebuilt on the other side."""


class WorkerLost(CallError):
    """The worker's process died; the message says how.

    `exitcode` is its exit status (negative: the signal that killed it), None if it can't be known.
    """

    exitcode: int | None = None


class OutOfMemory(WorkerLost, MemoryError):
    """The worker went over its memory limit and was killed.

    `limit_bytes` is the limit, `peak_bytes` the highest use that was seen.
    """

    limit_bytes: int | None = None
    peak_bytes: int | None = None


class FunctionTimeout(CallError, TimeoutError):
    """The call ran longer than its `timeout=`; its whole process tree was ended."""


class CallCancelled(CallError):
    """The call was cancelled."""


class RemoteError(CallError):
    """The function raised an exception that can't be rebuilt here.

    `type_name` is the exception's qualified type name; the message holds its text, and the remote traceback is
    attached as a note, as for every remote exception.
    """

    type_name: str = ""


class DataError(FlowError, OSError):
    """Moving or reading data failed. `url` names what it was about."""

    url: str = ""

    def __init__(self, message: str = "", *, url: str = "", hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        if url:
            self.url = url

    __str__ = FlowError.__str__


class DataNotFound(DataError, FileNotFoundError):
    """There is no such object, prefix, bucket or file."""


class DataAccessDenied(DataError, PermissionError):
    """Credentials are missing, wrong or expired, or don't reach that far."""


class DataChanged(DataError):
    """The object is not the one that was seen before."""


class DataUnavailable(DataError, ConnectionError):
    """The server does not answer, or keeps failing."""


class CacheFull(DataError):
    """There is no room in the cache or on its disk."""


class VolumeError(FlowError):
    """Something about a volume."""


class VolumeNotFound(VolumeError, LookupError):
    """There is no such volume in this project."""


class VolumeInUse(VolumeError):
    """A running call or task uses the volume."""


class VolumeConflict(VolumeError):
    """Two writers changed the same volume."""


class TaskError(FlowError):
    """Something about a durable task."""


class TaskNotFound(TaskError, LookupError):
    """There is no such task."""


class TaskFailed(TaskError):
    """A task's command ended with a status other than 0. `exit_code` is that status."""

    exit_code: int | None = None


class NameConflict(TaskError):
    """The name is taken."""
