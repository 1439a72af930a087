"""The nodes of a task on this host: what each is given (GPUs, data, code, environment) and how it is started.

Every node is in a box (`taskbox`), as a rule a sandbox: a filesystem of its own with the project's code at the working
directory, the mounts at their targets and nothing of other tasks. A task of one node is the common case; further ones
share the mounts, and have working directories, unnamed volumes and logs of their own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import paths, proctree
from .errors import FlowError

if TYPE_CHECKING:
    from .data.mounts import Staged
    from .gpus import Claim, Gpu
    from .sandbox import Bind
    from .taskbox import Command
    from .taskcontainer import Guard

CALL_FD, RESULT_FD = "FLOW_CALL_FD", "FLOW_RESULT_FD"  # how a call made durable finds its pickle and its outcome
# Rendezvous ports are taken below the range from which the kernel gives out ports of its own.
_PORTS = range(20000, 32768)
# Says nothing to a task, or what it says is wrong in there.
_NOT_INHERITED = ("FLOW_HOME", "FLOW_CACHE", "PWD", "OLDPWD", "_", "SHLVL", "LS_COLORS")


class Nodes:
    """What a task's nodes hold while it runs. `close` gives all of it back."""

    def __init__(self, directory: str, spec: dict[str, Any], *, terminal: bool = False, tree: str = "tree") -> None:
        self._directory = directory
        self._spec = spec
        self._terminal = terminal
        self._count: int = spec["nodes"]
        self._gpus: Claim | None = None
        self._staged: Staged | None = None
        self._contained = isinstance(spec["box"], dict)
        self.guard: Guard | None = None  # of containers
        self._plain_guard: proctree.Guard | None = None  # of processes that no sandbox ends
        self._fds: list[int] = []
        self._null = self._keep(os.open(os.devnull, os.O_RDONLY))
        self._logs = [] if terminal else [self._open_logs(rank) for rank in range(self._count)]
        self._commands: list[Command] = []
        # Shared by every process of the sandboxes: while one lives, this lock is held.
        self._tree = os.open(os.path.join(directory, tree), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def acquire(self, report: Callable[[str], None]) -> None:
        """Get all that the nodes share, waiting where others have it; `report` is told what is waited for."""
        # Volumes before GPUs: no task ever holds devices while it waits for something else.
        self._stage(report)
        self._get_image(report)
        self._claim(report)

    def build(self) -> None:
        """Make the nodes' directories and sandboxes, of what was acquired. For the thread that will start them."""
        import fcntl

        fcntl.flock(self._tree, fcntl.LOCK_EX)
        os.set_inheritable(self._tree, True)
        if self._contained:
            from .taskcontainer import Guard

            self.guard = Guard(self._spec, self._directory)
        elif self._spec["box"] == "plain":
            self._plain_guard = proctree.guard_marked(f"FLOW_TASK_ID={self._spec['task_id']}")
        if not self._contained and self._spec["cpus"]:
            from . import limits

            # This process's cores and variables, which everything that it starts has as well.
            limits.set_cpu(self._spec["cpus"], keep=list(self._spec["env"]))
        port = self._rendezvous()
        shared = [] if self._staged is None else list(self._staged.binds)
        for rank in range(self._count):
            self._commands.append(self._command(rank, shared, port))

    def start(self) -> list[int]:
        """Start every node; returns their process ids, by rank."""
        if self._spec["call"]:
            self._open_call()
        pids = []
        for rank, command in enumerate(self._commands):
            if self._terminal:
                stdin, stdout, stderr = 0, 1, 2
            else:
                stdin, (stdout, stderr) = self._null, self._logs[rank]
            if command.stdin:
                stdin = os.memfd_create("flowfn-stdin")
                with open(stdin, "wb", closefd=False) as file:
                    file.write(command.stdin)
                os.lseek(stdin, 0, os.SEEK_SET)
            pids.append(proctree.start(command.argv, command.env, stdin=stdin, stdout=stdout, stderr=stderr))
            if command.stdin:
                os.close(stdin)
        return pids

    def note(self, text: str) -> None:
        """A line of the supervisor's own, in the log of node 0."""
        line = f"flow: {text}\n".encode(errors="replace")
        try:
            os.write(2 if self._terminal else self._logs[0][1], line)
        except OSError:
            pass  # a full disk; the outcome says what there is to say

    def commit(self) -> None:
        """Write back what they changed in volumes that live in a bucket. Raises `VolumeConflict`, and other errors."""
        if self._staged is not None:
            self._staged.commit()

    def close(self) -> None:
        """Give everything back. The nodes have ended."""
        for guard in (self.guard, self._plain_guard):
            if guard is not None:
                guard.close()
        if self._gpus is not None:
            self._gpus.close()
        if self._staged is not None:
            self._staged.close()
        for fd in self._fds:
            os.close(fd)
        os.close(self._tree)
        self._gpus, self._staged, self._fds = None, None, []

    # -- what they are given

    def _keep(self, fd: int) -> int:
        self._fds.append(fd)
        return fd

    def _open_logs(self, rank: int) -> tuple[int, int]:
        # The command writes into the files itself: nothing stands between that could lose a line.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        out, err = (self._keep(os.open(f"{self._directory}/{rank}.{name}", flags, 0o600)) for name in ("out", "err"))
        return out, err

    def _open_call(self) -> None:
        """The call's pickle and the place of its outcome, inherited by the sandbox under numbers it is told."""
        result = f"{self._directory}/result.part"
        call = self._keep(os.open(f"{self._directory}/call", os.O_RDONLY))
        out = self._keep(os.open(result, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
        if self._contained:
            return  # it finds them by their paths
        for fd, name in ((call, CALL_FD), (out, RESULT_FD)):
            os.set_inheritable(fd, True)
            for command in self._commands:
                command.env[name] = str(fd)

    def _stage(self, report: Callable[[str], None]) -> None:
        if not self._spec["mounts"]:
            return
        from .data.mounts import stage
        from .data.spec import Mount

        mounts = [Mount.from_dict(mount) for mount in self._spec["mounts"]]
        report("its data is being staged")
        self._staged = stage(mounts, env=self._spec["env"], project=self._spec["project"])

    def _get_image(self, report: Callable[[str], None]) -> None:
        """The virtual environment that the task runs in, if it wants one of its own."""
        if not (image := self._spec.get("environment")):
            return
        from . import environments

        def tell(*, log: str, step: str) -> None:
            self.note(f"{step}: {log.rstrip()}")

        report("its image is being built")
        place, lease = environments.ready(image, tell, self._spec["env"])
        self._keep(lease)
        self._spec["python"] = f"{place}/bin/python"
        self._spec["readable"] = [*self._spec["readable"], place]
        self._spec["env"] = {"VIRTUAL_ENV": place, **image["env"], **self._spec["env"]}

    def _claim(self, report: Callable[[str], None]) -> None:
        if not self._spec["gpus"]:
            return
        from . import gpus
        from .gpu_request import GpuRequest

        # For all nodes at once: two tasks can't each have half of what both need.
        requests = [GpuRequest(*request) for request in self._spec["gpus"]]
        wanted = [request._replace(count=request.count * self._count) for request in requests]
        claim = gpus.claim(wanted)
        if claim is None:
            report("it waits for GPUs that others use")
            claim = gpus.claim(wanted, wait=True)
        assert claim is not None
        self._gpus = claim
        for fd in claim.fds:
            os.set_inheritable(fd, True)  # they are free when the last process of the sandboxes is gone

    def _devices(self, rank: int) -> list[Gpu]:
        """Node `rank`'s share of the GPUs."""
        if self._gpus is None:
            return []
        each = len(self._gpus.gpus) // self._count
        return list(self._gpus.gpus[rank * each : (rank + 1) * each])

    def _rendezvous(self) -> int:
        """A free port for the nodes to meet at, which no other task takes meanwhile."""
        port, lock = meeting_port()
        self._keep(lock)
        return port

    def _addresses(self) -> list[str]:
        """Where the nodes are: all on this host."""
        return ["127.0.0.1"] * self._count

    def _command(self, rank: int, shared: list[Bind], port: int) -> Command:
        from . import project, taskbox
        from .sandbox import Bind

        spec = self._spec
        scratch = os.path.join(self._directory, "scratch", str(rank))
        workspace = os.path.join(scratch, "workspace")
        os.makedirs(workspace, exist_ok=True)
        binds = list(shared)
        for number, target in enumerate(spec["ephemeral"]):
            volume = os.path.join(scratch, f"volume-{number}")
            os.makedirs(volume, exist_ok=True)
            binds.append(Bind(volume, target, False))
        store = os.path.join(paths.home(), "code")
        if spec["code"]:
            project.lay_out(spec["code"], store, workspace)
        roots = []
        for number, digest in enumerate(spec["roots"], 1):
            roots.append(os.path.join(scratch, f"root-{number}"))
            os.makedirs(roots[-1])
            project.lay_out(digest, store, roots[-1])
        devices = self._devices(rank)
        room = taskbox.Room(workspace, rank, roots, binds, devices)
        return taskbox.command(spec, room, self._environment(rank, port, devices))

    def _environment(self, rank: int, port: int, devices: list[Gpu]) -> dict[str, str]:
        spec = self._spec
        env: dict[str, str] = {}
        if not self._contained:
            env = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
            # `python` is the one that submitted, with the packages it has.
            bin_dir = os.path.dirname(spec["python"])
            path = env.get("PATH") or os.defpath
            if bin_dir not in path.split(os.pathsep):
                env["PATH"] = bin_dir + os.pathsep + path
        elif os.getuid():
            env["HOME"] = "/tmp"
        addresses = self._addresses()
        address = addresses[0]
        env |= {
            "PYTHONUNBUFFERED": "1",  # lines reach the log when they are printed
            "FLOW_TASK_ID": spec["task_id"],
            "FLOW_TASK_NAME": spec["name"],
            "FLOW_NODE_RANK": str(rank),
            "FLOW_NODE_COUNT": str(self._count),
            "FLOW_NODE_IPS": ",".join(addresses),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            # What torchrun takes for its options where the command line says nothing.
            "PET_NNODES": str(self._count),
            "PET_NODE_RANK": str(rank),
            "PET_MASTER_ADDR": address,
            "PET_MASTER_PORT": str(port),
            "PET_RDZV_ENDPOINT": f"{address}:{port}",
            "PET_RDZV_ID": spec["task_id"],
        }
        if spec["call"]:
            from .settings import UPLOAD_LOCAL

            env |= {"FLOW_HOME": paths.home(), "FLOW_CACHE": paths.cache(), UPLOAD_LOCAL: "1"}
            if self._contained:
                env |= {CALL_FD: f"{self._directory}/call", RESULT_FD: f"{self._directory}/result.part"}
        if spec["volume_urls"]:
            import json

            env["FLOW_MOUNTS"] = json.dumps(spec["volume_urls"])
        if spec["gpus"] is not None:  # else an engine has given them
            env["CUDA_VISIBLE_DEVICES"] = env["NVIDIA_VISIBLE_DEVICES"] = ",".join(gpu.visible for gpu in devices)
        return {**env, **spec["env"]}


def meeting_port() -> tuple[int, int]:
    """A free port of this host, and a descriptor: while that is open no other task gets the same."""
    import fcntl
    import socket

    locks = paths.private_dir(os.path.join(paths.home(), "ports"))
    first = int.from_bytes(os.urandom(4), "little")
    for step in range(200):
        port = _PORTS[(first + step) % len(_PORTS)]
        lock = os.open(os.path.join(locks, str(port)), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("", port))
        except OSError:
            os.close(lock)
            continue
        return port, lock
    raise FlowError("no free port was found for the nodes to meet at")
