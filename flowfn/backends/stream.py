"""What all backends share whose worker is a program with a stream on its standard input and output.

Such a backend decides two things: which program to start (`podman run -i ...`, `ssh host ...`, `srun ...`, each
followed by `loader.program()`), and how to end it. Everything else is here: the runtime and the project get there, the
worker is prepared, what goes wrong meanwhile becomes one clear error, and how it ended is found out.

```python
class MyBackend(Backend):
    def connect(self, spec):
        argv = ["podman", "run", "-i", "--rm", "image", *loader.program("python3")]
        return stream.start(argv, shipping.launch(spec, enforce=("cpu",)), label="container", explain=explain)
```
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from flowfn.backends import loading
from flowfn.backends.program import END_S as END_S
from flowfn.backends.program import Connections as Connections
from flowfn.backends.program import StreamConnection as StreamConnection
from flowfn_runtime import wire
from flowfn_runtime.errors import BackendUnavailable, FlowError

if TYPE_CHECKING:
    from flowfn.shipping import Launch

ATTEMPTS = 3  # when the project changes while it is sent

# Of a program that ended before a worker spoke: its exit status and the end of its standard error -> what to raise.
Explain = Callable[[int, str], FlowError | None]


class Begun(Protocol):
    """A program that was begun before it was known what for."""

    def ready(self) -> StreamConnection:
        """Its connection, the runtime loaded."""

    connection: StreamConnection


def start(
    argv: Sequence[str],
    launch: Launch | Callable[[], Launch],
    *,
    label: str,
    environ: Mapping[str, str] | None = None,
    explain: Explain | None = None,
    kind: Callable[..., StreamConnection] = StreamConnection,
    on_end: Callable[[], object] | None = None,
    begun: Begun | None = None,
) -> StreamConnection:
    """Start a program whose last part is `loader.program()`, and get a worker ready there.

    `launch` may be a function, which is called while the program starts. `label` says where it is, for people.
    `environ` is the program's own environment here. `explain` knows the engine's messages. `kind` makes the connection.
    `on_end` is called once, when the program has ended, or could not be started. `begun` is such a program that runs
    already.
    Raises BackendUnavailable, VersionMismatch, or what the preparation on the other side raised.
    """
    for attempt in range(ATTEMPTS):
        early, begun = begun, None
        try:
            connection = early.connection if early else kind(argv, label=label, environ=environ)
        except BaseException:
            if on_end is not None:
                on_end()
            raise
        if on_end is not None:
            connection.on_end(on_end)
        try:
            if callable(launch):
                launch = launch()
            if early:
                early.ready()
                launch.send(connection.stream)
            if early or not loading.load(connection, launch):
                loading.loaded(connection)
            prepare(connection, launch)
            return connection
        except EOFError:
            raise ended(connection, explain) from None
        except BaseException as error:
            again = isinstance(error, (OSError, FlowError)) and attempt < ATTEMPTS - 1
            newer = launch.newer() if again and not callable(launch) else None
            if newer is not None and on_end is not None and not connection.forget(on_end):
                newer = None
            connection.kill()
            connection.close()
            if newer is None:
                raise
            launch = newer  # files were edited while they were sent
    raise AssertionError("unreachable: the last attempt returns or raises")


def ended(connection: StreamConnection, explain: Explain | None) -> FlowError:
    """What to raise of a program that ended before a worker was ready."""
    how = connection.exit(END_S)
    status = connection.process.poll()
    connection.kill()
    connection.close()
    known = explain(status if status is not None else -9, connection.said(1000)) if explain else None
    if known is not None:
        return known
    words = f"status {status}" if status is not None else "no status"
    said = connection.said() or how.detail or "".join(how.output).strip()
    message = f"{connection.label}: the worker's program ended with {words}"
    return BackendUnavailable(f"{message}:\n{said}" if said else message)


def prepare(connection: StreamConnection, launch: Launch) -> None:
    """Answer what the other side asks until the worker's process is there."""
    from flowfn import terminal

    try:
        _prepare(connection, launch)
    finally:
        terminal.staging_over()


def _prepare(connection: StreamConnection, launch: Launch) -> None:
    stream = connection.stream
    while True:
        frame = stream.receive()
        if frame.kind == wire.ERROR:
            from flowfn_runtime import exceptions

            raise exceptions.loads(frame.body, frame.buffers)
        news = json.loads(frame.meta) if frame.kind == wire.NEWS else {}
        if "ask" in news:
            launch.answer(stream, news["ask"])
        elif "ready" in news:
            connection.facts = news
            connection.label += f" pid {news['pid']}"
            return
        else:
            show(connection.label, news)


def show(label: str, news: dict[str, Any]) -> None:
    """Let the user see what is going on there."""
    from flowfn import terminal

    if "progress" in news:
        terminal.staging(news["progress"])
    elif "log" in news:
        terminal.show_output(news.get("step", "build"), 0, label, news["log"].encode(), True)
