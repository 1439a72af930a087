"""Tasks on machines that OpenSSH reaches: they are tasks of that machine's own, under its own supervisors.

This client asks for them over sessions with `flowfn_runtime.taskserver`, opened when there is something to ask. So the
task knows nothing of clients: they may end, or lose the network, and ask again later.
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
from flowfn_runtime import exceptions, taskdb, wire
from flowfn_runtime.errors import BackendUnavailable, ConfigError, FlowError, ResourceUnavailable

if TYPE_CHECKING:
    from flowfn.plan import Draft

IDLE_SESSIONS = 2  # sessions that are kept for the next question


class Session:
    """One connection, with a program on the other side that answers questions about tasks."""

    def __init__(self, client: openssh.Client, program: Sequence[str], label: str, home: str | None) -> None:
        self.broken = False
        self._explain = Failure(client.address)
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


class SshJobs(Jobs):
    """Tasks of one host."""

    def __init__(self, place: Mapping[str, Any]) -> None:
        self.place = place
        options = {key: place[key] for key in ("config", "connect_timeout", "alive_interval") if key in place}
        self._client = openssh.Client(openssh.Address.parse(place["address"]), **options)
        self.label = f"ssh://{self._client.address}"
        self._idle: list[Session] = []
        self._lock = threading.Lock()

    # the contract

    def choose(self, draft: Draft) -> Jobs:
        _refuse_image(draft)
        return self

    def check(self, draft: Draft) -> None:
        _refuse_image(draft)
        self._ask({"do": "check", "wanted": self._wanted(draft)})

    def start(self, draft: Draft) -> None:
        self._ask({"do": "start", "wanted": self._wanted(draft)}, draft.payload or b"", draft)

    def states(self, ids: Sequence[str]) -> dict[str, State]:
        found, _ = self._ask({"do": "states", "ids": [there(task_id) for task_id in ids]})
        return {task_id: State(*found[there(task_id)]) for task_id in ids if there(task_id) in found}

    def read(self, task_id: str, name: str, offset: int = 0) -> bytes:
        return self._ask({"do": "read", "id": there(task_id), "name": name, "offset": offset})[1]

    def end_of(self, task_id: str, name: str, lines: int) -> int:
        offset: int = self._ask({"do": "end_of", "id": there(task_id), "name": name, "lines": lines})[0]
        return offset

    def more(self, task_id: str, offsets: Mapping[str, int], timeout: float) -> More:
        request = {"do": "more", "id": there(task_id), "offsets": dict(offsets), "timeout": timeout}
        (sizes, ended), body = self._ask(request)
        added, position = {}, 0
        for name, size in sizes.items():
            added[name] = body[position : position + size]
            position += size
        return More(added, ended)

    def wait(self, task_id: str, state: str, timeout: float) -> None:
        self._ask({"do": "wait", "id": there(task_id), "state": state, "timeout": timeout})

    def cancel(self, task_id: str, reason: str) -> None:
        self._ask({"do": "cancel", "id": there(task_id), "reason": reason})

    def forget(self, ids: Sequence[str]) -> None:
        self._ask({"do": "forget", "ids": [there(task_id) for task_id in ids]})

    def address(self, task_id: str) -> str:
        return self._client.address.host

    def close(self) -> None:
        with self._lock:
            sessions, self._idle = self._idle, []
        for session in sessions:
            session.close()

    # within

    def _wanted(self, draft: Draft) -> dict[str, Any]:
        wanted = {**draft.wanted, "id": there(draft.wanted["id"]), "box": "sandbox if possible"}
        wanted["depends_on"] = [there(task_id) for task_id in wanted["depends_on"]]
        if draft.image is not None:
            wanted["environment"] = draft.image.to_dict()
        return wanted

    def _ask(self, request: Mapping[str, Any], body: bytes = b"", draft: Draft | None = None) -> tuple[Any, bytes]:
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


class SshGroup(Jobs):
    """Tasks of several hosts: each goes to the one with the fewest of ours that has what it needs."""

    def __init__(self, hosts: Sequence[SshJobs]) -> None:
        self.hosts = list(hosts)
        self.label = "ssh"
        self.place = {}

    def close(self) -> None:
        for host in self.hosts:
            host.close()

    def choose(self, draft: Draft) -> Jobs:
        active = [row.place for row in taskdb.elsewhere(None)]
        ordered = sorted(self.hosts, key=lambda host: active.count(json.dumps(dict(host.place), sort_keys=True)))
        errors: list[FlowError] = []
        for host in ordered:
            try:
                host.check(draft)
                return host
            except (ResourceUnavailable, BackendUnavailable) as error:
                errors.append(error)
        if len(errors) == 1:
            raise errors[0]
        raise ResourceUnavailable("none of the hosts takes it: " + "; ".join(error.message for error in errors))

    def check(self, draft: Draft) -> None:
        self.choose(draft)

    def _nobody(self, *_: Any) -> Any:
        raise NotImplementedError("a task is of one host, see `choose`")

    start = states = read = end_of = more = wait = cancel = forget = _nobody  # type: ignore[assignment]


def there(task_id: str) -> str:
    """A task's id on the host. Not the same: the host may be this one, with the same register."""
    return f"{task_id}r"


def _refuse_image(draft: Draft) -> None:
    if isinstance(draft.image, str):
        raise ConfigError(
            f"image={draft.image!r}: the ssh backend has no containers",
            hint="say what to install: image=flow.Image.python('3.12').pip_install(...)",
        )
