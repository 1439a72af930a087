"""What a node of a task runs in: a sandbox, nothing of the kind, or a container; as the command line that starts it."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from . import paths

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .gpus import Gpu
    from .sandbox import Bind

WORKSPACE = "/workspace"
_RUN_CALL = (
    "import sys; at = int(sys.argv.pop()); sys.path.insert(at, sys.argv.pop()); "
    "from flowfn_runtime.taskcall import main; main()"
)
_IN_DIRECTORY = 'cd "$0" && exec "$@"'


class Room(NamedTuple):
    """What a node has."""

    workspace: str  # directory of this host with the project's files, the node's own
    rank: int
    roots: list[str]  # directories with further files of the project
    binds: list[Bind]  # data and volumes at their targets
    devices: list[Gpu]  # its GPUs


class Command(NamedTuple):
    """How it is started."""

    argv: list[str]
    env: dict[str, str]
    stdin: bytes = b""


def command(spec: dict[str, Any], room: Room, env: dict[str, str]) -> Command:
    """The command of a node of the task, in the box that `spec` names."""
    if isinstance(spec["box"], dict):
        from . import taskcontainer

        return taskcontainer.contained(spec, room, env, taskcontainer.shared_dirs() if spec["call"] else ())
    return _plain(spec, room, env) if spec["box"] == "plain" else _sandboxed(spec, room, env)


def _sandboxed(spec: dict[str, Any], room: Room, env: dict[str, str]) -> Command:
    from . import sandbox
    from .sandbox import Bind

    cwd = spec["working_dir"]
    binds = list(room.binds)
    hide = [paths.home(), paths.cache()]
    if spec["call"]:
        from .data import store

        # References are staged into the cache from inside, and what is too big for them goes into the store.
        binds += [Bind(path, path, False) for path in store.shared_dirs()]
        hide.remove(paths.cache())
    targets = {bind.target for bind in binds}
    workdir: str | None = room.workspace
    if inside(cwd, targets):
        # The command starts in a mount; the code is where it is by default, unless a mount is there as well.
        if WORKSPACE not in targets:
            binds.append(Bind(room.workspace, WORKSPACE, False))
        workdir = None
    argv = sandbox.command(
        _program(spec),
        binds,
        cwd=cwd,
        workdir_host=workdir,
        hide=hide,
        readable=[*spec["readable"], *room.roots],
        devices=None if room.devices or spec["gpus"] is None else (),  # None: an engine gives them
    )
    return Command(argv, sandbox.environment(env | call_path(spec, cwd, room.roots)))


def inside(path: str, targets: Iterable[str]) -> bool:
    """Whether it is one of these, or below one."""
    return any(path == target or path.startswith(target + "/") for target in targets)


def _plain(spec: dict[str, Any], room: Room, env: dict[str, str]) -> Command:
    """The files of this host, as they are: there is nothing to mount."""
    cwd = spec["working_dir"]
    if cwd == WORKSPACE or cwd.startswith(WORKSPACE + "/") or not os.path.isdir(cwd):
        cwd = os.path.normpath(os.path.join(room.workspace, os.path.relpath(cwd, WORKSPACE)))
        if cwd != room.workspace and not cwd.startswith(room.workspace + "/"):
            cwd = room.workspace
        os.makedirs(cwd, exist_ok=True)
    argv = ["/bin/sh", "-c", _IN_DIRECTORY, cwd, *_program(spec)]
    return Command(argv, env | call_path(spec, room.workspace, room.roots))


def call_path(spec: dict[str, Any], project: str, roots: list[str]) -> dict[str, str]:
    """Where a call finds modules, for its environment. `project`: where the project's files are."""
    if not spec["call"]:
        return {}
    places = [project, *roots]
    found = [
        place if isinstance(place, str) else os.path.normpath(os.path.join(places[place[0]], place[1]))
        for place in spec["sys_path"]
    ]
    return {"FLOW_CALL_PATH": json.dumps(found)}


def _program(spec: dict[str, Any]) -> list[str]:
    if spec["call"]:
        from .taskstart import path_position

        return [spec["python"], "-c", _RUN_CALL, spec["runtime"], path_position(spec["runtime"])]
    wanted: str | list[str] | None = spec["command"]
    if wanted is None:
        return ["sleep", "infinity"]
    if isinstance(wanted, list):
        return wanted
    bash = next((path for path in ("/bin/bash", "/usr/bin/bash", "/usr/local/bin/bash") if os.path.exists(path)), None)
    return [bash or "/bin/sh", "-c", wanted]
