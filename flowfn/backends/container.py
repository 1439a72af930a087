"""The container backend: each worker is a container of Podman or Docker on this host, `run -i` its stream.

```toml
[backends.box]
type = "container"
image = "docker.io/library/python:3.12-slim"
```

The container has the image's files, and of this host's: flowfn's cache, home and store (so that nothing is staged
twice, and volumes are the same), the mounts, and the directories of `share`, each under the same path as here. It runs
as the user of this process.

What is shared between workers is decided here, beside the engine: GPUs and cores are claimed, and data is leased, by
descriptors that the engine's program inherits. So they stay held as long as the container lives, even if this process
is killed; and then the worker sees its standard input end, ends, and the engine removes the container.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import resource
import sys
import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from flowfn import config, loader, shipping, terminal
from flowfn.backends import stream
from flowfn.backends.base import Backend, Connection
from flowfn.backends.container_connection import ContainerConnection, Door
from flowfn.backends.container_engine import Engine, Facts
from flowfn.backends.container_images import Images
from flowfn_runtime import paths
from flowfn_runtime import settings as runtime_settings
from flowfn_runtime.errors import BackendError, BackendUnavailable, ConfigError, FlowError
from flowfn_runtime.taskcontainer import bind, gpu_options

if TYPE_CHECKING:
    from flowfn.plan import Draft
    from flowfn.spec import FunctionSpec
    from flowfn_runtime.gpus import Claim, Inventory

LABEL = "flowfn.client"  # on every container: the process that it belongs to
MAKER = "flowfn.backend"  # and the backend in it
WORKDIR = "/"
OVERHEAD_BYTES = 64 << 20  # of the engine's limit, beside what the function may use: the runtime, and room for files
LOOK_S = 2.0  # how often a call that waits for GPUs looks whether it is still wanted


class ContainerBackend(Backend):
    """Workers in containers of Podman or Docker on this host.

    `image` (or `container://name:tag`): what functions without `image=` run in, and what `flow.Image.python` is built
    on; the official image of this Python's version unless given. `engine`: "podman", "docker" or a path; None takes
    what is there, Podman first. `network`: as the engine's `--network`; None leaves it to the engine. `share`:
    directories of this host that workers see under the same path. `user`: whom workers run as; None is this process's
    user. `python`: the interpreter in the image; None looks for one of this Python's version. `engine_limits=False`
    leaves `memory=` and `cpu=` to the runtime alone. `engine_options`, `run_options` and `build_options` are further
    arguments: before the engine's verb, of `run`, and of `build`.
    """

    name = "container"
    ships_project = True

    def __init__(
        self,
        url: str | None = None,
        *,
        image: str | None = None,
        engine: str | None = None,
        network: str | None = None,
        share: Iterable[str | os.PathLike[str]] = (),
        user: str | None = None,
        python: str | None = None,
        engine_limits: bool = True,
        engine_options: Iterable[str] = (),
        run_options: Iterable[str] = (),
        build_options: Iterable[str] = (),
    ) -> None:
        if url is not None:
            if image is not None:
                raise ConfigError(f"backend={url!r} and image={image!r} both name an image; leave one of them out")
            image = url.partition("://")[2]
            if not re.fullmatch(r"\w[\w./:@-]*", image, re.ASCII):
                raise ConfigError(
                    f"backend={url!r} names no image", hint='write "container://name:tag", or "container"'
                )
        for name, given in (("share", share), ("engine_options", engine_options), ("run_options", run_options)):
            if isinstance(given, (str, bytes)):
                raise ConfigError(f"{name}={given!r} is a text; it has to be a list")
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        self.image = image or f"docker.io/library/python:{version}-slim"
        self.engine = Engine(engine, list(engine_options))
        self.images = Images(self.engine, list(build_options))
        self.network = network
        self._share = [os.path.abspath(os.path.expanduser(os.fspath(path))) for path in share]
        self._user = user
        self.python = python
        self._engine_limits = engine_limits
        self._run_options = list(run_options)
        self._connections = stream.Connections()
        self._id = os.urandom(16).hex()
        self._used = False
        self._closed = 0  # how often
        self._lock = threading.Lock()

    # the contract

    def connect(self, spec: FunctionSpec) -> Connection:
        facts, remembered = self.engine.facts(), self.engine.remembered
        failures: list[str] = []
        try:
            return self._connect(spec, facts, failures)
        except FlowError:
            if not failures or not remembered:
                raise
        self.engine.doubt()  # it may be another one than it was, or lack the image by now
        return self._connect(spec, self.engine.facts(), failures)

    def _connect(self, spec: FunctionSpec, facts: Facts, failures: list[str]) -> Connection:
        """Start a container. If the engine failed, `failures` has its words."""
        generation = self._closed
        image = self.images.get(spec.image, self.image)
        held = Held()
        try:
            environ, options = self._resources(spec, held)
            binds = self._binds(spec, held, environ)
            if spec.gpu:
                options += self._gpus(spec, held, environ, generation)
            # Not where memory is limited: of what is shared it is anybody's guess who is charged for it.
            door = None if spec.memory else Door()
            enforced = {"cpu"} if "cpuset" in self._limits() else set()

            def launch() -> shipping.Launch:
                told = shipping.launch(spec, enforce={"memory", "cpu"} - enforced, environ=environ, sandbox=False)
                if spec.memory and "memory" in self._limits():
                    told.setup["request"]["cgroup"] = True
                if door is not None:
                    from flowfn_runtime import shm

                    assert shm  # is needed in a moment, and now there is time
                    told.setup["request"]["side_path"] = door.path
                return told

            program = loader.program(self.python, cache=paths.cache())
            ours = ["--rm", f"--workdir={WORKDIR}", f"--label={LABEL}={os.getpid()}", f"--label={MAKER}={self._id}"]
            argv = [*ours, *self._run_words(facts.docker, facts.rootless), *options, *binds, *self._run_options]
            argv += ["--entrypoint", program[0], image, *program[1:]]
            kind = functools.partial(self._start, generation, held.fds, door)
            explain = functools.partial(self._explain, image, failures)
            connection = stream.start(argv, launch, label="container", explain=explain, kind=kind)
        except BaseException:
            held.close()
            raise
        connection.on_end(held.close)
        return connection

    def _start(
        self, generation: int, fds: Sequence[int], door: Door | None, argv: Sequence[str], **options: Any
    ) -> ContainerConnection:
        """Run the engine, unless the backend was closed meanwhile; `close` knows of it from here on."""
        with self._lock:
            if self._closed != generation:
                raise BackendUnavailable("the backend was closed while a worker was to start")
            connection = ContainerConnection(argv, engine=self.engine, pass_fds=fds, door=door, **options)
            self._connections.add(connection)
            self._used = True
            return connection

    def jobs(self) -> None:
        """This host runs its tasks, in containers."""

    def box(self, draft: Draft) -> dict[str, Any]:
        from flowfn.backends import container_tasks

        return container_tasks.box(self, draft)

    def describe(self) -> str:
        from flowfn_runtime import limits

        how = " without root" if self.engine.facts().rootless else ""
        return f"{self.engine.name}{how}, {limits.cores()} cores, {self._inventory()}"

    def slots(self, spec: FunctionSpec) -> int:
        if spec.gpu:
            from flowfn_runtime import gpus

            there = self._inventory()
            gpus.check(spec.gpu, there)
            return max(sum(g.fits(gpu.model, gpu.memory_bytes) for gpu in there.gpus) // g.count for g in spec.gpu)
        from flowfn_runtime import limits

        return max(1, int(limits.cores() // spec.cpu)) if spec.cpu else limits.cores()

    def has_room(self, spec: FunctionSpec) -> bool:
        if not spec.gpu:
            return True
        from flowfn_runtime import gpus

        free = gpus.free(self._inventory())
        return any(sum(g.fits(gpu.model, gpu.memory_bytes) for gpu in free) >= g.count for g in spec.gpu)

    def close(self) -> None:
        """End all containers; returns when they are gone."""
        with self._lock:
            self._closed += 1
        self._connections.close()
        if self._used:
            # The engine removes a container in its own time, after the program that ran it has ended.
            self._used = False
            _, there, _ = self.engine.ask("ps", "--all", "--quiet", "--filter", f"label={MAKER}={self._id}")
            if there:
                self.engine.ask("rm", "--force", *there.split())

    # the command line

    def _run_words(self, docker: bool, rootless: bool) -> list[str]:
        # No log driver: what goes over standard output is the worker's stream, and none of a log file's business.
        words = ["--interactive", "--log-driver=none", "--no-healthcheck", "--pull=never"]
        words.append("--security-opt=label=disable")
        if self.network:
            words.append(f"--network={self.network}")
        if self._user is not None:
            words.append(f"--user={self._user}")
        elif not docker and rootless:
            words.append("--userns=keep-id")
        elif not (docker and rootless):  # there the container's root is this user
            words.append(f"--user={os.getuid()}:{os.getgid()}")
        if os.getuid() != 0:
            words += ["--env", "HOME=/tmp"]
        if not docker:
            # Podman asks for more than a root without CAP_SYS_RESOURCE may have, and takes from itself what is above.
            for name, number, most in (
                ("nofile", resource.RLIMIT_NOFILE, None),
                ("nproc", resource.RLIMIT_NPROC, 32768),
            ):
                hard = resource.getrlimit(number)[1]
                if hard != resource.RLIM_INFINITY:
                    hard = min(hard, most or hard)
                    words.append(f"--ulimit={name}={hard}:{hard}")
        # PyTorch's loaders and the like want more than 64 MiB; like all memory it counts only when it is used.
        words.append(f"--shm-size={os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') // 2}")
        return words

    def task_words(self) -> list[str]:
        """The options of `run` for a task."""
        facts = self.engine.facts()
        shared = [bind(path, path, False) for path in self._share]
        return [*self._run_words(facts.docker, facts.rootless), *shared, *self._run_options]

    def _limits(self) -> frozenset[str]:
        return self.engine.facts().limits if self._engine_limits else frozenset()

    def _resources(self, spec: FunctionSpec, held: Held) -> tuple[dict[str, str], list[str]]:
        """Cores and memory: variables of the worker, and options of `run`."""
        environ: dict[str, str] = {}
        options: list[str] = []
        limits = self._limits()
        if spec.memory and "memory" in limits:
            size = spec.memory + OVERHEAD_BYTES
            options += [f"--memory={size}b", f"--memory-swap={size}b"]
        if spec.cpu:
            if "cpu" in limits:
                options.append(f"--cpus={min(spec.cpu, os.cpu_count() or 1):g}")
            if "cpuset" in limits:
                from flowfn_runtime.limits import cpu_share

                share = cpu_share(spec.cpu)
                held.keep(share.fds)
                environ |= share.env
                options.append(f"--cpuset-cpus={','.join(map(str, share.cores))}")
        return environ, options

    def _binds(self, spec: FunctionSpec, held: Held, environ: dict[str, str]) -> list[str]:
        """What of this host the container sees, mounts staged."""
        own = [paths.private_dir(path) for path in (paths.home(), paths.cache())]
        if runtime_settings.store():  # it may lie elsewhere
            from flowfn_runtime.data import store

            own += store.shared_dirs()
        binds = [bind(path, path, False) for path in dict.fromkeys([*own, *self._share])]
        # The client does not see the container's files.
        environ |= {"FLOW_HOME": paths.home(), runtime_settings.UPLOAD_LOCAL: "1"}
        settings = config.load()
        environ |= settings.data_environment({}) | ({"FLOW_STORE": settings.store} if settings.store else {})
        if spec.mounts:
            import json

            from flowfn_runtime.data import mounts

            try:
                staged = mounts.stage(
                    [settings.with_options(mount) for mount in spec.mounts],
                    env=spec.environment(os.environ),
                    project=settings.project,
                    progress=_show,
                )
            finally:
                terminal.staging_over()
            held.keep(staged.lease_fds)
            binds += [bind(b.host_path, b.target, b.read_only) for b in staged.binds]
            environ["FLOW_MOUNTS"] = json.dumps({mount.source: mount.target for mount in spec.mounts})
            environ |= staged.environ()
        return binds

    # GPUs

    def _inventory(self) -> Inventory:
        from flowfn_runtime import gpus

        return gpus.inventory(config.load().gpus)

    def _gpus(self, spec: FunctionSpec, held: Held, environ: dict[str, str], generation: int) -> list[str]:
        """Take the GPUs, waiting for them if need be: options of `run`."""
        from flowfn import pools
        from flowfn_runtime import gpus

        there = self._inventory()
        claim: Claim | None = None
        while claim is None:
            claim = gpus.claim(spec.gpu, there=there, wait=True, timeout=LOOK_S)
            if claim is None and (self._closed != generation or not pools.wanted(self, spec)):
                raise BackendUnavailable("all GPUs are in use, and no call waits for one any more")
        held.keep(claim.fds)
        environ |= claim.env
        return gpu_options([gpu.uuid for gpu in claim.gpus if not gpu.declared], self.engine.facts().docker)

    def _explain(self, image: str, failures: list[str], status: int, said: str) -> FlowError | None:
        failures.append(said)
        self.images.forget()
        if found := self.engine.meaning(said, image):
            return found
        if status == 125:
            return BackendError(f"{self.engine.name} can't start a container of {image}:\n{said.strip()}")
        return None


class Held:
    """Descriptors that keep cores, GPUs and data for a worker, until its container is gone."""

    def __init__(self) -> None:
        self.fds: list[int] = []
        self._lock = threading.Lock()
        _held.add(self)

    def keep(self, fds: Iterable[int]) -> None:
        """Take these over."""
        self.fds += fds

    def close(self) -> None:
        """Let go of them in this process. Safe to repeat."""
        with self._lock:
            fds, self.fds = self.fds, []
        for fd in fds:
            os.close(fd)


_held: weakref.WeakSet[Held] = weakref.WeakSet()


def _after_fork() -> None:
    """A forked child must not hold what the parent's workers hold."""
    for held in list(_held):
        held._lock = threading.Lock()
        with contextlib.suppress(OSError):
            held.close()


os.register_at_fork(after_in_child=_after_fork)


def _show(state: Any) -> None:
    terminal.staging({"url": state.url, "done_bytes": state.done_bytes, "total_bytes": state.total_bytes})
