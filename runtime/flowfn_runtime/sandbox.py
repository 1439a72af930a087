"""A filesystem of a worker's or task's own: bubblewrap, and the command line that it takes.

What is inside: the host's root, read-only; the binds at their targets; `/tmp`, `/var/tmp`, `/dev/shm`, `/proc` and the
process ids of its own; the GPUs' device nodes. What is not: the flowfn home (volumes, secrets, other tasks' files),
but for its locks. Nothing is created on the host for a target that it lacks: the root is a tmpfs onto which the host's
entries are bound one by one, and so is every other directory that lacks a target ("opened" below). Opening costs
0.3 ms an entry, and more an entry with hundreds of them; targets that exist, or lie directly under `/`, cost nothing.

Read-only binds of cached data are sealed (seal.py).

This keeps tasks from each other's data and from harming the host by accident. It is no wall against hostile code: that
runs as the same user, with the same network.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from flowfn_runtime import paths, seal
from flowfn_runtime.errors import SandboxError

_OWN = ("/proc", "/dev", "/sys", "/tmp")  # made anew rather than bound
_GPU_NODES = ("nvidia", "dri", "kfd", "infiniband", "gdrdrv")  # beginnings of names in /dev


class Bind(NamedTuple):
    """A file or directory of the host that appears at `target`, an absolute path inside."""

    host_path: str
    target: str
    read_only: bool


def command(
    argv: Sequence[str],
    binds: Sequence[Bind] = (),
    *,
    cwd: str | None = None,
    workdir_host: str | None = None,
    hide: Sequence[str] | None = None,
    readable: Sequence[str] | None = None,
    devices: Sequence[str] | None = None,
    die_with_parent: bool = True,
) -> list[str]:
    """The command line that runs `argv` inside. Descriptors that it inherits (not close-on-exec) reach `argv`.

    `cwd` is the working directory inside; None: that of this process, or `/` if it is not to be seen. `workdir_host`
    is bound there, writable; without it, a `cwd` that nothing else provides is an empty directory of its own. `hide`:
    directories that are empty and private inside (default: the flowfn home). `readable`: paths that must be seen
    though they lie in a hidden or private place (default: this Python, its `sys.path` and the working directory).
    `devices`: nodes below /dev (default: all GPUs').

    `die_with_parent` kills everything inside when the *thread* that started it ends; a parent that starts sandboxes
    from short-lived threads has to say no, and kill by itself. An exit by signal N shows as exit status 128 + N.

    A target inside a writable bind is made there, if it lacks it: the only place where it can be. Raises SandboxError
    for what can't be built, such as a target whose place is taken by a file of a writable bind.
    """
    plan = _Plan(_requests(binds, cwd, workdir_host, hide, readable))
    sealed = seal.prefix(bind.host_path for bind in binds if bind.read_only)
    args = [*sealed, "bwrap", *(seal.identity() if sealed else ()), *plan.build(), "--unshare-pid", "--unshare-ipc"]
    for node in _gpu_nodes() if devices is None else devices:
        args += ["--dev-bind-try", node, node]
    if die_with_parent:
        args.append("--die-with-parent")
    start = cwd or _getcwd()
    return [*args, "--chdir", plan.inside(start) if cwd or plan.sees(start) else "/", "--", *argv]


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` as it has to be inside: temporary files in its own /tmp, and the caches that programs keep in the
    home (which is read-only) as well, unless `environ` says where."""
    caches = {
        "CUDA_CACHE_PATH": "/tmp/.nv",
        "MPLCONFIGDIR": "/tmp/.matplotlib",
        "NUMBA_CACHE_DIR": "/tmp/.numba",
        "TRITON_CACHE_DIR": "/tmp/.triton",
    }
    return {**caches, **environ, "TMPDIR": "/tmp"}


class _Request(NamedTuple):
    """One thing that has to be at `path`: the host's `source`, or an empty directory of its own if None."""

    path: str
    source: str | None
    read_only: bool = False


def _requests(
    binds: Sequence[Bind],
    cwd: str | None,
    workdir_host: str | None,
    hide: Sequence[str] | None,
    readable: Sequence[str] | None,
) -> list[_Request]:
    if hide is None:
        # Made if need be: a home that comes to be later would be seen through the host's root. The locks stay shared,
        # for functions that call functions: two workers must not be given the same GPU.
        locks = paths.private_dir(os.path.join(paths.home(), "locks"))
        hide, binds = (paths.home(),), (Bind(locks, locks, False), *binds)
    hidden = [os.path.realpath(path) for path in hide]
    private = ("/tmp", "/var/tmp", *hidden)
    requests = [_Request("/tmp", None)] + [_Request("/var/tmp", None)] * os.path.isdir("/var/tmp")
    requests += [_Request(path, None) for path in hidden if os.path.isdir(path)]
    wanted = {os.path.realpath(path) for path in (_own_paths() if readable is None else readable)}
    for path in sorted(wanted):
        # Only what would be lost; and not the private place itself, which would be private no more.
        if path not in private and any(_within(path, place) for place in private) and os.path.exists(path):
            requests.append(_Request(path, path, True))
    for bind in binds:
        target = os.path.normpath(bind.target)
        if (
            not target.startswith("/")
            or any(_within("/" + target.lstrip("/"), path) for path in ("/proc", "/dev", "/sys"))
            or target.strip("/") == ""
        ):
            raise SandboxError(f"{bind.target!r} can't be the target of a mount: it has to be a path below /")
        requests.append(_Request("/" + target.lstrip("/"), os.path.realpath(bind.host_path), bind.read_only))
    if cwd is not None:
        cwd = os.path.normpath(cwd)
        seen = os.path.isdir(cwd) and not any(_within(cwd, place) for place in private if place != cwd)
        if workdir_host is not None:
            requests.append(_Request(cwd, os.path.realpath(workdir_host)))
        elif not seen and not any(_within(cwd, request.path) for request in requests if request.source is not None):
            requests.append(_Request(cwd, None))
    # A later request for the same path wins: the user's mounts over what is there by default.
    return list({request.path: request for request in requests}.values())


class _Plan:
    """Puts the requests in an order in which every mount point exists, opening directories that lack one.

    What needs opening turns up while the plan is made, and an opened directory has to come before everything inside
    it; so the plan is made anew, until nothing new turns up.
    """

    def __init__(self, requests: Sequence[_Request]) -> None:
        self.requests = requests
        self.opened: set[str] = {"/"}  # directories made anew, with the host's entries bound one by one
        self.omitted: set[str] = set()  # entries of opened directories that a mount point takes the place of

    def build(self) -> list[str]:
        while not self._make():
            pass
        return self.args

    def _make(self) -> bool:
        self.args: list[str] = []
        self.mounts: dict[str, str | None] = {}  # path inside -> the host's path that is there; None: a tmpfs
        self.links: dict[str, str] = {}  # symbolic links made in opened directories
        self.writable: set[str] = set()
        self.made_anew: list[str] = []
        self._open("/", "/")
        self.args += ["--ro-bind", "/sys", "/sys", "--proc", "/proc", "--dev", "/dev"]
        self.mounts.update({"/sys": "/sys", "/proc": None, "/dev": None})
        self._tmpfs("/dev/shm")
        known = len(self.opened) + len(self.omitted)
        # By where they really are, the outer before the inner. A link inside a mount is followed when its turn comes.
        todo = [request._replace(path=self.inside(request.path, last=False)) for request in self.requests]
        # An opened directory that is itself no request is made anew before anything at or below its depth.
        requested = {request.path for request in todo}
        todo += [_Request(path, "", True) for path in self.opened - requested - {"/"}]
        for request in sorted(todo, key=lambda r: (r.path.count("/"), r.source != "")):
            self._place(request)
            if len(self.opened) + len(self.omitted) > known:
                return False
        for path in self.made_anew:
            self.args += ["--remount-ro", path]
        return True

    def _place(self, request: _Request) -> None:
        path = self.inside(request.path, last=False)
        source = request.source
        if source == "":  # to be opened
            source = self._host(path)
            if source is not None:
                self._open(path, source)
            return
        if source is not None and not os.path.exists(source):
            raise SandboxError(f"{source}, which should be at {request.path}, does not exist on this host")
        if not self._has_mount_point(path, directory=source is None or os.path.isdir(source)):
            return
        self._forget_below(path)
        if source is None:
            self._tmpfs(path)
        elif path in self.opened:
            self._open(path, source)
        else:
            self.args += ["--ro-bind" if request.read_only else "--bind", source, path]
            self.mounts[path] = source
            if not request.read_only:
                self.writable.add(path)

    def _has_mount_point(self, path: str, *, directory: bool) -> bool:
        """Whether something can be mounted at `path`; if not, note what has to be opened or left out for that."""
        mount = self._mount_of(path)
        if path in self.links:
            self.omitted.add(path)
            return False
        if self.mounts[mount] is None:
            return True  # in a tmpfs bubblewrap makes what is missing
        here = self._host(path)
        assert here is not None
        if os.path.lexists(here) and not os.path.islink(here) and os.path.isdir(here) == directory:
            return True
        if mount in self.writable and mount != path:
            if os.path.lexists(here):
                raise SandboxError(f"{path} can't be mounted: {here} is in its place, and of another kind")
            return True  # made in the writable bind
        parent, child = os.path.dirname(path), path
        while parent != "/" and not self._is_directory(parent):
            parent, child = os.path.dirname(parent), parent
        self.opened.add(parent)
        if parent == "/" or os.path.lexists(self._host(child) or ""):
            self.omitted.add(child)
        return False

    def _is_directory(self, path: str) -> bool:
        host = self._host(path)
        return host is None or os.path.isdir(host)

    def _open(self, path: str, source: str) -> None:
        """Make the directory anew, with the entries of the host's directory `source` in it."""
        self.args += ["--tmpfs", path]
        self._forget_below(path)
        self.made_anew.append(path)
        self.mounts[path] = None
        try:
            entries = sorted(os.scandir(source), key=lambda entry: entry.name)
        except OSError as error:
            raise SandboxError(
                f"nothing can be mounted below {path}, which lacks the target: {error.strerror}",
                hint="choose a target directly under /, such as /data",
            ) from error
        for entry in entries:
            child = os.path.join(path, entry.name)
            if child in self.omitted or (path == "/" and child in _OWN):
                continue
            if entry.is_symlink():
                self.links[child] = os.readlink(entry.path)
                self.args += ["--symlink", self.links[child], child]
            else:
                self.mounts[child] = entry.path
                self.args += ["--ro-bind-try", entry.path, child]  # "try": it may go away meanwhile

    def _tmpfs(self, path: str) -> None:
        # Only root can be other users inside, who need to write there too. Else bubblewrap's 0755 does.
        if path in ("/tmp", "/var/tmp", "/dev/shm") and os.geteuid() == 0 and _knows_perms():
            self.args += ["--perms", "1777"]
        self.args += ["--tmpfs", path]
        self.mounts[path] = None

    def _forget_below(self, path: str) -> None:
        self.mounts = {other: at for other, at in self.mounts.items() if other == path or not _within(other, path)}
        self.links = {other: to for other, to in self.links.items() if not _within(other, path)}

    def _mount_of(self, path: str) -> str:
        while path not in self.mounts:
            path = os.path.dirname(path)
        return path

    def _host(self, path: str) -> str | None:
        """The host's path of what is at `path` inside; None if it is of the sandbox's own."""
        mount = self._mount_of(path)
        source = self.mounts[mount]
        return source if source is None or mount == path else os.path.join(source, os.path.relpath(path, mount))

    def sees(self, path: str) -> bool:
        """Whether the directory is there inside."""
        host = self._host(path := self.inside(path))
        return os.path.isdir(host) if host is not None else path in self.mounts

    def inside(self, path: str, *, last: bool = True) -> str:
        """`path` with its symbolic links followed as they will be inside; `last`: also if the last name is one."""
        todo = path.split("/")[::-1]
        here = "/"
        for _ in range(4096):  # enough for any path; a loop of links ends here
            if not todo:
                return here
            name = todo.pop()
            if name in ("", "."):
                continue
            if name == "..":
                here = os.path.dirname(here)
                continue
            there = os.path.join(here, name)
            link = self._link(there) if todo or last else None
            if link is None:
                here = there
            else:
                todo += link.split("/")[::-1]
                here = "/" if link.startswith("/") else here
        raise SandboxError(f"{path}: its symbolic links lead in a circle")

    def _link(self, path: str) -> str | None:
        if path in self.links:
            return self.links[path]
        if path in self.mounts:
            return None
        host = self._host(path)
        return os.readlink(host) if host is not None and os.path.islink(host) else None


@lru_cache(maxsize=1)  # failures are not remembered: the user may mend them meanwhile
def check() -> None:
    """Raise SandboxError, with what to install or allow, unless sandboxes can be made here. Tries it for real."""
    if not sys.platform.startswith("linux"):
        raise SandboxError(
            f"mounts need a filesystem of the worker's own, which {sys.platform} does not have",
            hint="run where there is Linux: a container, an SSH host or a cluster backend",
        )
    import shutil
    import subprocess

    program = shutil.which("bwrap")
    if program is None:
        raise SandboxError("mounts need bubblewrap, and there is no bwrap on PATH", hint=_install_hint())
    if seal.usable():  # it ran bubblewrap, and more
        return
    trial = [program, "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "--unshare-pid", "--unshare-ipc", "--"]
    run = subprocess.run(
        [*trial, shutil.which("true") or sys.executable], stdin=subprocess.DEVNULL, capture_output=True
    )
    if run.returncode:
        said = run.stderr.decode(errors="replace").strip() or f"exit status {run.returncode}"
        raise SandboxError(f"bubblewrap can't make a filesystem here: {said}", hint=_permission_hint())


@lru_cache(maxsize=1)
def _knows_perms() -> bool:
    """Whether bubblewrap has `--perms`: from 0.5 on, which not every distribution in use has."""
    read, write = os.pipe()
    try:
        action = [(os.POSIX_SPAWN_DUP2, write, 1)]
        pid = os.posix_spawnp("bwrap", ["bwrap", "--version"], os.environ, file_actions=action)
    except OSError:  # there is none, which `check` says better
        os.close(read)
        return True
    finally:
        os.close(write)
    with open(read, "rb") as output:
        said = output.read()  # "bubblewrap 0.8.0"
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:  # a signal handler was faster
        pass
    major, _, minor = said.split()[-1].partition(b".") if said.split() else (b"", b"", b"")
    return not major.isdigit() or (int(major), int(minor.partition(b".")[0] or 0)) >= (0, 5)


def _install_hint() -> str:
    import shutil

    for manager, line in (
        ("apt-get", "apt-get install bubblewrap"),
        ("dnf", "dnf install bubblewrap"),
        ("yum", "yum install bubblewrap"),
        ("zypper", "zypper install bubblewrap"),
        ("pacman", "pacman -S bubblewrap"),
        ("apk", "apk add bubblewrap"),
        ("nix-env", "nix-env -iA nixpkgs.bubblewrap"),
    ):
        if shutil.which(manager):
            return line
    return "install bubblewrap with the system's package manager"


def _permission_hint() -> str:
    """Which of the usual locks on user namespaces is closed here."""
    for sysctl, closed, line in (
        ("kernel/unprivileged_userns_clone", "0", "sysctl -w kernel.unprivileged_userns_clone=1"),
        ("user/max_user_namespaces", "0", "sysctl -w user.max_user_namespaces=15000"),
        (
            "kernel/apparmor_restrict_unprivileged_userns",
            "1",
            "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, or an AppArmor profile for bwrap with `userns,`",
        ),
    ):
        try:
            with open(f"/proc/sys/{sysctl}") as file:
                if file.read().strip() == closed:
                    return f"the administrator has to allow user namespaces: {line}"
        except OSError:
            continue
    if os.path.exists("/.dockerenv") or os.path.exists("/run/.containerenv"):
        return (
            "this is a container that forbids namespaces: start it with --cap-add SYS_ADMIN --security-opt "
            "seccomp=unconfined --security-opt apparmor=unconfined, or mount the data into the container itself"
        )
    return "user namespaces have to be allowed for this user, or bwrap be setuid root"


def _own_paths() -> list[str]:
    """What this Python needs to run as it runs here: itself, its libraries, the project's modules."""
    mine = [sys.prefix, sys.base_prefix, sys.exec_prefix, os.path.dirname(sys.executable), *sys.path, _getcwd()]
    return [path for path in mine if os.path.isabs(path)]


def _getcwd() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was deleted
        return "/"


def _gpu_nodes() -> list[str]:
    return [entry.path for entry in os.scandir("/dev") if entry.name.startswith(_GPU_NODES)]


def _within(path: str, directory: str) -> bool:
    return path == directory or directory == "/" or path.startswith(directory + "/")
