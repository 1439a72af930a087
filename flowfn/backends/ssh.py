"""Workers on machines that OpenSSH reaches: one connection a host, and as many workers over it as fit.

`backend="ssh://user@host:port"`, or a group of hosts in the configuration:

```toml
[backends.gpubox]
type = "ssh"
hosts = ["gpu1", "me@gpu2:2222"]
```

The first program on a connection is the keeper (`flowfn_runtime.keeper`), which says what the host has. Workers are
further sessions of the connection. The server limits these (MaxSessions, 10 unless it was set), so when they are used
up there is a second connection.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from flowfn import loader, shipping, threads
from flowfn.backends import openssh, stream
from flowfn.backends.base import Backend, Connection
from flowfn.backends.ssh_lane import Failure, Lane
from flowfn_runtime.errors import BackendUnavailable, ConfigError, FlowError, ResourceUnavailable

if TYPE_CHECKING:
    from flowfn.backends.jobs import Jobs
    from flowfn.spec import FunctionSpec
    from flowfn_runtime.gpus import Inventory

SESSIONS = 9  # workers on a connection: a server's default of 10, less the keeper
SILENCE_S = 60.0  # after which it believes that the client is gone
ATTEMPTS = 5  # to start a worker, when connections are lost or full
PAUSE_S = 0.2  # longer before each of them
AGAIN_S = 5.0  # after which a host that could not be reached is tried again


class _Options:
    """What the backend was configured with."""

    def __init__(
        self, python: str | None, cache: str | None, home: str | None, sessions: int, silence_s: float
    ) -> None:
        self.python = python
        self.cache = cache
        self.environ = {"FLOW_HOME": home} if home else {}
        self.sessions = sessions
        self.silence_s = silence_s


class Host:
    """One machine: its connections, what it has, and how much of that is in use by this client."""

    def __init__(self, client: openssh.Client, options: _Options) -> None:
        self.client = client
        self.address = client.address
        self.options = options
        self.python = options.python
        self.lock = threading.RLock()
        self.limit = options.sessions  # on one connection; less if the server turns out to allow less
        self.used = 0  # workers, starting ones included
        # GPUs of theirs, as far as it can be told from here: they are claimed there, and that is where workers wait.
        self.taken: set[int] = set()
        self.waiting: list[tuple[FunctionSpec, set[int]]] = []
        self._lanes: list[Lane] = []
        self._facts: dict[str, Any] = {}
        self._inventory: Inventory | None = None
        self._error: tuple[float, FlowError] | None = None
        self._started = threading.Event()  # ssh runs, or could not be started
        self._connecting: stream.StreamConnection | None = None

    def program(self) -> list[str]:
        return loader.program(self.python, cache=self.options.cache)

    def begin(self) -> None:
        """Start to connect, if nobody did; returns when ssh runs."""
        if self._facts or self._error or self._started.is_set():
            return
        try:
            threads.start(self._begin)
        except FlowError:
            return  # whoever asks for a worker will hear of it
        self._started.wait()

    def _begin(self) -> None:
        try:
            self.facts()
        except FlowError:
            pass  # it is kept for who asks next
        finally:
            self._started.set()

    def _has_started(self, keeper: stream.StreamConnection) -> None:
        self._connecting = keeper
        self._started.set()

    def facts(self) -> dict[str, Any]:
        """What the keeper says that the host has. Connects if need be; raises BackendUnavailable."""
        with self.lock:
            if not self._facts:
                if self._error and time.monotonic() - self._error[0] < AGAIN_S:
                    raise self._error[1]
                try:
                    self._lane()
                except FlowError as error:
                    self._error = time.monotonic(), error
                    raise
            return self._facts

    def _lane(self) -> Lane:
        """A connection with room for one more session, if a server has any. The caller has the lock."""
        self._lanes = [lane for lane in self._lanes if not lane.dead]
        for lane in self._lanes:
            if lane.sessions < self.limit or not self.limit:
                return lane
        try:
            lane = Lane(self.client, self.program(), self.options.silence_s, started=self._has_started)
        finally:
            self._connecting = None
        self.python = lane.keeper.python
        self._facts = lane.facts
        self._lanes.append(lane)
        return lane

    def connect(self, launch: shipping.Launch) -> stream.StreamConnection:
        """Start a worker."""
        for attempt in range(ATTEMPTS):
            time.sleep(PAUSE_S * attempt)  # a busy server drops connections, and a moment later it may not
            with self.lock:
                lane = self._lane()
                before, lane.sessions = lane.sessions, lane.sessions + 1
            program = self.program()
            # Some servers allow the keeper's session and no other.
            argv = self.client.further(lane.socket, program) if self.limit else self.client.alone(program)
            told = shipping.Launch({**launch.setup, "alive": lane.facts["alive"]}, launch.roots)
            spare = lane.spare() if self.limit else None
            failure = Failure(self.client)
            left = functools.partial(self._left, lane)
            try:
                return stream.start(argv, told, label=lane.label, explain=failure, on_end=left, begun=spare)
            except BackendUnavailable:
                with self.lock:
                    if openssh.refused_session(failure.said):
                        self.limit = min(self.limit, before)
                    elif lane.dead or openssh.lost_connection(failure.said):
                        lane.close()
                    else:
                        raise
        raise BackendUnavailable(
            f"{self.address} lets nobody start a worker, after {ATTEMPTS} attempts:\n{failure.said.strip()}"
        )

    def _left(self, lane: Lane) -> None:
        """A worker's session is over."""
        with self.lock:
            lane.sessions -= 1

    def inventory(self) -> Inventory:
        """The GPUs there."""
        from flowfn_runtime.gpus import Gpu, Inventory

        with self.lock:
            if self._inventory is None:
                told = self._lane().gpus()
                self._inventory = Inventory(tuple(Gpu(**gpu) for gpu in told["gpus"]), told["source"], told["reason"])
            return self._inventory

    def free(self, spec: FunctionSpec) -> set[int] | None:
        """GPUs that the spec could have there now, if there are enough."""
        there = self.inventory().gpus if spec.gpu else ()
        for wanted in spec.gpu:
            fits = [gpu.index for gpu in there if wanted.fits(gpu.model, gpu.memory_bytes)]
            fits = [index for index in fits if index not in self.taken]
            if len(fits) >= wanted.count:
                return set(fits[: wanted.count])
        return None if spec.gpu else set()

    def slots(self, spec: FunctionSpec) -> int:
        """How many workers of the spec fit there. Raises ResourceUnavailable if none, BackendUnavailable."""
        if spec.gpu:
            from flowfn_runtime import gpus

            there = self.inventory()
            gpus.check(spec.gpu, there)
            return max(sum(g.fits(gpu.model, gpu.memory_bytes) for gpu in there.gpus) // g.count for g in spec.gpu)
        facts = self.facts()
        if spec.memory and spec.memory > facts["memory_bytes"]:
            raise ResourceUnavailable(
                f"{self.address} has {facts['memory_bytes'] >> 20} MiB of memory, and {spec.memory >> 20} are asked for"
            )
        cores: int = facts["cores"]
        if spec.cpu and spec.cpu > cores:
            raise ResourceUnavailable(f"{self.address} has {cores} cores, and cpu={spec.cpu:g} asks for more")
        return max(1, int(cores // spec.cpu)) if spec.cpu else cores

    def close(self) -> None:
        if (connecting := self._connecting) is not None:
            connecting.kill()
        with self.lock:
            self._started.clear()
            lanes, self._lanes, self._facts, self._inventory = self._lanes, [], {}, None
        for lane in lanes:
            lane.close()


class SshBackend(Backend):
    """Workers on one host (`url`), or on several (`hosts`), the least loaded first.

    `python`: the interpreter there; None looks for one of this Python's version. `cache`, `home`: directories there in
    place of ~/.cache/flowfn and ~/.flowfn. `config`: a file in place of ~/.ssh/config. `sessions`: workers on one
    connection. `silence`: seconds after which a host gives up a client whose network is gone, and ends its workers.
    `connect_timeout`: seconds for logging in. `alive_interval`: seconds between signs of life that are asked of the
    host; three without answer, and it is given up here.
    Keys, jump hosts and known hosts are OpenSSH's matter.
    """

    name = "ssh"
    ships_project = True

    def __init__(
        self,
        url: str | None = None,
        *,
        hosts: Iterable[str] = (),
        python: str | None = None,
        cache: str | None = None,
        home: str | None = None,
        config: str | None = None,
        sessions: int = SESSIONS,
        silence: float = SILENCE_S,
        connect_timeout: int = 15,
        alive_interval: int = 5,
    ) -> None:
        texts = [url] if url else list(hosts)
        if not texts or isinstance(hosts, str):
            raise ConfigError(
                "the ssh backend has no hosts", hint='write backend="ssh://user@host", or hosts = ["host", ...]'
            )
        options = _Options(python, cache, home, sessions, silence)
        config = os.path.expanduser(config) if config else None
        clients = [
            openssh.Client(openssh.Address.parse(text), config, connect_timeout, alive_interval) for text in texts
        ]
        self.hosts = [Host(client, options) for client in clients]
        self._environ = options.environ
        places = [{"backend": "ssh", "address": str(client.address)} for client in clients]
        more: dict[str, Any] = {"python": python, "cache": cache, "home": home, "config": config}
        more |= {"connect_timeout": connect_timeout, "alive_interval": alive_interval}
        self._places = [place | {key: value for key, value in more.items() if value is not None} for place in places]
        self._jobs: Jobs | None = None
        self._connections = stream.Connections()
        self._lock = threading.Lock()

    def begin(self) -> None:
        for host in self.hosts:
            host.begin()

    def describe(self) -> str:
        said, failures = [], []
        for host in self.hosts:
            try:
                said.append(f"{host.address}: {host.facts()['cores']} cores, {host.inventory()}")
            except FlowError as error:
                failures.append(error)
        if not said:
            raise failures[0]
        return "; ".join([*said, *(error.message for error in failures)])

    def connect(self, spec: FunctionSpec) -> Connection:
        launch = shipping.launch(spec, environ=self._environ, image=_image(spec))
        host, gpus = self._choose(spec)
        left = functools.partial(self._left, host, gpus)
        try:
            connection = host.connect(launch)
        except BaseException:
            left()
            raise
        connection.on_end(left)
        return self._connections.add(connection)

    def _choose(self, spec: FunctionSpec) -> tuple[Host, set[int]]:
        """The host with the smallest share of its slots in use, one more counted for it; and what it will use."""
        fits = self._fitting(spec)
        with self._lock:
            free = {host: host.free(spec) for host in fits}

            def load(host: Host) -> tuple[bool, float, int]:
                return free[host] is None, (host.used + 1) / fits[host], self.hosts.index(host)

            host = min(fits, key=load)
            gpus = free[host] or set()
            host.used += 1
            host.taken |= gpus
            if free[host] is None:
                host.waiting.append((spec, gpus))
            return host, gpus

    def _left(self, host: Host, gpus: set[int]) -> None:
        with self._lock:
            host.used -= 1
            host.taken -= gpus
            host.waiting = [entry for entry in host.waiting if entry[1] is not gpus]
            for entry in list(host.waiting):
                if got := host.free(entry[0]):
                    entry[1].update(got)
                    host.taken |= got
                    host.waiting.remove(entry)

    def has_room(self, spec: FunctionSpec) -> bool:
        hosts = self._fitting(spec)
        with self._lock:
            return any(host.free(spec) is not None for host in hosts)

    def _fitting(self, spec: FunctionSpec) -> dict[Host, int]:
        """The hosts that can run the spec, with their slots. Raises what stands in the way if there is none."""
        fits: dict[Host, int] = {}
        errors: list[FlowError] = []

        def ask(host: Host) -> None:
            try:
                fits[host] = host.slots(spec)
            except FlowError as error:
                errors.append(error)

        threads = [threading.Thread(target=ask, args=(host,)) for host in self.hosts[1:]]
        for thread in threads:
            thread.start()
        ask(self.hosts[0])
        for thread in threads:
            thread.join()
        if fits:
            return fits
        lacking = [error for error in errors if isinstance(error, ResourceUnavailable)]
        if len(errors) == 1 or not lacking:
            raise errors[0]
        raise ResourceUnavailable("none of the hosts fits: " + "; ".join(error.message for error in errors))

    def jobs(self) -> Jobs:
        from flowfn.backends.ssh_tasks import SshGroup, SshJobs

        if self._jobs is None:
            hosts = [SshJobs(place) for place in self._places]
            self._jobs = hosts[0] if len(hosts) == 1 else SshGroup(hosts)
        return self._jobs

    @classmethod
    def jobs_at(cls, place: Mapping[str, Any]) -> Jobs:
        from flowfn.backends.ssh_tasks import SshJobs

        return SshJobs(place)

    def slots(self, spec: FunctionSpec) -> int:
        return sum(self._fitting(spec).values())

    def close(self) -> None:
        self._connections.close()
        if self._jobs is not None:
            self._jobs.close()
        for host in self.hosts:
            host.close()


def _image(spec: FunctionSpec) -> Any:
    if isinstance(spec.image, str):
        raise ConfigError(
            f"image={spec.image!r}: the ssh backend has no containers",
            hint="say what to install: image=flow.Image.python('3.12').pip_install(...)",
        )
    return spec.image
