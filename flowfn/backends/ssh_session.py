"""Tasks that a program on another machine answers for: the client's side of `flowfn_runtime.taskserver`.

Its sessions are OpenSSH's, opened when there is something to ask, and a few of them kept for the next question.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flowfn import loader, shipping
from flowfn.backends import openssh, stream
from flowfn.backends.jobs import Jobs, More, State
from flowfn.backends.ssh_lane import Failure
from flowfn_runtime import exceptions, wire
from flowfn_runtime.errors import BackendUnavailable, FlowError

if TYPE_CHECKING:
    from flowfn.plan import Draft

IDLE_SESSIONS = 2  # sessions that are kept for the next question


class Session:
    """One connection, with a program on the other side that answers questions about tasks."""

    def __init__(self, client: openssh.Client, program: Sequence[str], label: str, home: str | None) -> None:
        self.broken = False
        self._explain = Failure(client)
        launch = shipping.Launch({"tasks": True, "home": home})
        self._connection = stream.start(client.alone(program), launch, label=label, explain=self._explain)

    def ask(self, request: Mapping[str, Any], body: bytes = b"", draft: Draft | None = None) -> tuple[Any, bytes]:
        """What the other side answers, and the bytes that come with it. Raises what it raises."""
        link = self._connection.stream
        try:
            link.send(wire.SETUP, meta=json.dumps(request).encode(), body=body)
            while True:
                frame = link.receive()
                if frame.kind == wire.ERROR:
                    raise exceptions.loads(frame.body, frame.buffers)
                news = json.loads(frame.meta)
                if "answer" in news:
                    return news["answer"], bytes(frame.body)
                if "ask" in news and draft is not None:
                    shipping.Launch({}, draft.snapshots).answer(link, news["ask"])
        except EOFError:
            self.broken = True
            lost = stream.ended(self._connection, self._explain)
            if isinstance(lost, BackendUnavailable):
                lost.uncertain = True
            raise lost from None
        except BaseException as error:
            self.broken = self.broken or not isinstance(error, FlowError)
            raise

    def close(self) -> None:
        """Let go of it."""
        self._connection.close()
        self._connection.kill()


class RemoteJobs(Jobs):
    """Tasks of which a program on another machine knows all. `place` says which Python runs it, and its directories."""

    of: str | None = None  # which tasks of that machine's; None: its own

    def __init__(self, place: Mapping[str, Any], client: openssh.Client) -> None:
        self.place = place
        self._client = client
        self._idle: list[Session] = []
        self._lock = threading.Lock()

    def there(self, task_id: str) -> str:
        """The task's id on that machine."""
        return task_id

    # the contract

    def states(self, ids: Sequence[str]) -> dict[str, State | FlowError]:
        found, _ = self._ask({"do": "states", "ids": [self.there(task_id) for task_id in ids]})
        return {task_id: _state(found[self.there(task_id)]) for task_id in ids if self.there(task_id) in found}

    def read(self, task_id: str, name: str, offset: int = 0) -> bytes:
        return self._ask({"do": "read", "id": self.there(task_id), "name": name, "offset": offset})[1]

    def end_of(self, task_id: str, name: str, lines: int) -> int:
        offset: int = self._ask({"do": "end_of", "id": self.there(task_id), "name": name, "lines": lines})[0]
        return offset

    def more(self, task_id: str, offsets: Mapping[str, int], timeout: float) -> More:
        request = {"do": "more", "id": self.there(task_id), "offsets": dict(offsets), "timeout": timeout}
        (sizes, ended), body = self._ask(request)
        added, position = {}, 0
        for name, size in sizes.items():
            added[name] = body[position : position + size]
            position += size
        return More(added, ended)

    def wait(self, task_id: str, state: str, timeout: float) -> None:
        self._ask({"do": "wait", "id": self.there(task_id), "state": state, "timeout": timeout})

    def cancel(self, task_id: str, reason: str) -> None:
        self._ask({"do": "cancel", "id": self.there(task_id), "reason": reason})

    def forget(self, ids: Sequence[str]) -> None:
        self._ask({"do": "forget", "ids": [self.there(task_id) for task_id in ids]})

    def close(self) -> None:
        with self._lock:
            sessions, self._idle = self._idle, []
        for session in sessions:
            session.close()

    # within

    def _ask(self, request: Mapping[str, Any], body: bytes = b"", draft: Draft | None = None) -> tuple[Any, bytes]:
        if self.of is not None:
            request = {**request, "of": self.of}
        with self._lock:
            kept = self._idle.pop() if self._idle else None
        if kept is not None:
            try:
                return self._with(kept, lambda session: session.ask(request, body, draft))
            except FlowError:
                if not kept.broken:
                    raise  # it is the answer
        program = loader.program(self.place.get("python"), cache=self.place.get("cache"))
        try:
            fresh = Session(self._client, program, self.label, self.place.get("home"))
        except BackendUnavailable as error:
            error.uncertain = kept is not None
            raise
        return self._with(fresh, lambda session: session.ask(request, body, draft))

    def _with(self, session: Session, work: Callable[[Session], tuple[Any, bytes]]) -> tuple[Any, bytes]:
        try:
            return work(session)
        except BaseException as error:
            session.broken = session.broken or not isinstance(error, FlowError)
            raise
        finally:
            with self._lock:
                keep = not session.broken and len(self._idle) < IDLE_SESSIONS
                if keep:
                    self._idle.append(session)
            if not keep:
                session.close()


def _state(told: list[Any] | dict[str, Any]) -> State | FlowError:
    """A task's state as it was told, or what is in the way of knowing it."""
    return State(*told) if isinstance(told, list) else BackendUnavailable(told["message"], hint=told["hint"])
