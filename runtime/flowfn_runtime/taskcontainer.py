"""A node of a task in a container: the command line, and who ends the container when the supervisor is gone.

The client says in `box` how its engine is called: `engine`, the words that begin each of its command lines; `run`, the
options of every container; `image`; `call`, the program that runs a call; `docker`; `publish`, whether ports have to
be.
"""

from __future__ import annotations

import itertools
import os
import shlex
import signal
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import paths, proctree

if TYPE_CHECKING:
    from .taskbox import Command, Room

ANSWER_S = 60.0  # how long the engine may take to answer
# The first process of a container gets no signal that it does not ask for. This shell hands SIGTERM on to all others.
# Its standard input says which variables they have, so that they are in no command line and no record of the engine.
_FIRST = """eval "$(cat)"; exec 0</dev/null
trap 'kill -TERM -1' TERM INT HUP
"$@" &
while wait $!; status=$?; kill -0 $! 2>/dev/null; do :; done
[ ! -e %s ] || cat /sys/fs/cgroup/memory.events /sys/fs/cgroup/memory/memory.oom_control >%s 2>/dev/null
exit $status
"""
_MEMORY = "/run/flowfn-memory"  # a file of the host in a container with a limit: what the kernel says of it at the end
_SHELL = 'command -v bash >/dev/null && exec bash -c "$0"; exec sh -c "$0"'
# Removes the task's containers when its standard input ends: when the supervisor says so, or is no more.
_GUARD = 'trap "" TERM HUP INT; read -r _; exec "$@" >/dev/null 2>&1'


def bind(source: str, target: str, read_only: bool) -> str:
    """An option of `run`: a file or directory of the host in the container."""
    fields = ["type=bind", f"source={source}", f"target={target}", *(["readonly"] if read_only else [])]
    quoted = ('"' + field.replace('"', '""') + '"' if "," in field or '"' in field else field for field in fields)
    return f"--mount={','.join(quoted)}"


def gpu_options(uuids: Sequence[str], docker: bool) -> list[str]:
    """Options of `run` that hand these devices to the container: Docker's own, or CDI's names."""
    if not uuids:
        return []
    if docker:
        return ["--gpus", f'"device={",".join(uuids)}"']
    return [f"--device=nvidia.com/gpu={uuid}" for uuid in uuids]


def name_of(spec: Mapping[str, Any], rank: int) -> str:
    """The name of a node's container."""
    return f"flowfn-{spec['id']}-{rank}"


def contained(spec: dict[str, Any], room: Room, env: dict[str, str], shared: Sequence[str]) -> Command:
    """The command of a node. `shared`: directories of this host that a call sees."""
    from .sandbox import Bind
    from .taskbox import WORKSPACE, Command, call_path, inside

    box, cwd, name = spec["box"], spec["working_dir"], name_of(spec, room.rank)
    binds = list(room.binds)
    if not inside(cwd, [each.target for each in binds]):
        binds.append(Bind(room.workspace, cwd, False))
    elif WORKSPACE not in {each.target for each in binds}:
        binds.append(Bind(room.workspace, WORKSPACE, False))
    binds += [Bind(root, root, True) for root in room.roots]
    binds += [Bind(path, path, False) for path in shared]
    words = [*box["engine"], "run", f"--name={name}", f"--hostname={name}", *box["run"], f"--workdir={cwd}"]
    words += [f"--label=flowfn.task={spec['task_id']}"]
    words += [bind(each.host_path, each.target, each.read_only) for each in binds]
    words += gpu_options([gpu.uuid for gpu in room.devices if not gpu.declared], box["docker"])
    if box["publish"]:
        words += [f"--publish=127.0.0.1:{port}:{port}" for port in spec["ports"]]
    if spec["memory_bytes"]:
        words += [f"--memory={spec['memory_bytes']}b", f"--memory-swap={spec['memory_bytes']}b"]
        words.append(bind(_memory_file(room.workspace), _MEMORY, False))
    if spec["cpus"]:
        from . import limits

        words.append(f"--cpus={min(spec['cpus'], os.cpu_count() or 1):g}")
        env = limits.thread_env(spec["cpus"]) | env
    env = env | call_path(spec, cwd, room.roots)
    argv = [*words, "--entrypoint=/bin/sh", box["image"], "-c", _FIRST % (_MEMORY, _MEMORY), "flowfn", *_program(spec)]
    return Command(argv, dict(os.environ), _script(env))


def _program(spec: dict[str, Any]) -> list[str]:
    if spec["call"]:
        call: list[str] = spec["box"]["call"]
        return call
    wanted: str | list[str] | None = spec["command"]
    if wanted is None:
        return ["sleep", "infinity"]
    return wanted if isinstance(wanted, list) else ["/bin/sh", "-c", _SHELL, wanted]


def _script(env: Mapping[str, str]) -> bytes:
    """What makes a shell set these variables."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in env.items()).encode()


def _memory_file(workspace: str) -> str:
    path = f"{workspace}.memory"
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))
    return path


class Guard(proctree.Guard):
    """Sees to it that the task's containers are removed, whatever becomes of this process."""

    def __init__(self, spec: dict[str, Any], directory: str) -> None:
        self._directory = directory
        self._engine: list[str] = spec["box"]["engine"]
        self._names = [name_of(spec, rank) for rank in range(spec["nodes"])]
        super().__init__(_GUARD, "flowfn-guard", *self._engine, "rm", "--force", *self._names)

    def out_of_memory(self) -> bool:
        """Whether one of them was ended by its memory limit."""
        for rank in range(len(self._names)):
            with open(os.path.join(self._directory, "scratch", str(rank), "workspace.memory")) as file:
                words = file.read().split()
            if int(dict(itertools.pairwise(words)).get("oom_kill", 0)):
                return True
        return "true" in self._ask("inspect", "--format={{.State.OOMKilled}}", *self._names)

    def kill(self) -> None:
        """End what runs in them, now."""
        self._ask("kill", f"--signal={signal.SIGKILL.value}", *self._names)

    def remove(self) -> None:
        """Make room for another attempt."""
        self._ask("rm", "--force", *self._names)

    def _ask(self, *words: str) -> str:
        # Not subprocess.run: the supervisor reaps all children itself, wherever they come from.
        read, write = os.pipe()
        null = os.open(os.devnull, os.O_RDWR)
        actions = [(os.POSIX_SPAWN_DUP2, fd, target) for fd, target in ((null, 0), (write, 1), (null, 2))]
        argv = [*self._engine, *words]
        try:
            pid = os.posix_spawnp(argv[0], argv, os.environ, file_actions=actions)
        finally:
            os.close(write)
            os.close(null)
        with open(read, encoding="utf-8", errors="replace") as output:
            said = output.read()
        try:
            os.waitpid(pid, 0)
        except ChildProcessError:
            pass
        return said


def shared_dirs() -> list[str]:
    """What a call sees of this host: flowfn's home, cache and store."""
    from .data import store

    return list(dict.fromkeys([paths.home(), *store.shared_dirs()]))
