"""Make the mounts of a worker or a task ready on this host: stage what is remote, attach volumes, say what to bind."""

from __future__ import annotations

import os
import posixpath
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import unquote

from flowfn_runtime.data.model import Progress
from flowfn_runtime.data.spec import SYSTEM, Mount, conceals, is_url, redact, within
from flowfn_runtime.errors import DataNotFound, ValidationError
from flowfn_runtime.sandbox import Bind


@dataclass
class Staged:
    """Mounts that are ready. What they need stays as long as a process has one of `lease_fds` open.

    The descriptors are inheritable: the sandbox that is started with them keeps snapshots from being evicted, volumes
    from being deleted and lazy mounts alive, until its last process ends. `fetched_bytes` is what had to be downloaded.
    """

    binds: tuple[Bind, ...] = ()
    lease_fds: tuple[int, ...] = field(default=(), repr=False)
    fetched_bytes: int = 0
    keepers: tuple[str, ...] = ()

    def environ(self) -> dict[str, str]:
        """What processes that have the mounts need in their environment."""
        from flowfn_runtime.data import volume_commit

        return {volume_commit.VARIABLE: ":".join(self.keepers)} if self.keepers else {}

    def commit(self) -> None:
        """Write back what changed in volumes that live in a bucket. Raises `VolumeConflict`, and other errors."""
        if self.keepers:
            from flowfn_runtime.data import volume_commit

            for keeper in self.keepers:
                volume_commit.ask(keeper)

    def close(self) -> None:
        """Let go in this process. Safe to call twice."""
        fds, self.lease_fds = self.lease_fds, ()
        for fd in fds:
            os.close(fd)

    def __enter__(self) -> Staged:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def stage(
    mounts: Sequence[Mount],
    *,
    env: Mapping[str, str] | None = None,
    project: str = "default",
    progress: Callable[[Progress], None] | None = None,
) -> Staged:
    """Get `mounts` ready on this host; the caller binds the result's `binds` and closes it when they are not needed.

    `env` holds the credentials that count, over this process's own. A directory or prefix appears at its target; a
    single file appears there itself if the target has its name or its suffix (`/models/net.pt`), else inside of it.
    Raises `DataError`s, `VolumeError`s, and `ValidationError` for targets that this host can't have.
    """
    staged = Staged()
    try:
        for mount in mounts:
            check_host(mount)
        for mount in mounts:
            inner = [other.target for other in mounts if other is not mount and within(other.target, mount.target)]
            points = [posixpath.relpath(target, mount.target) for target in inner]
            _stage(mount, points, staged, env, project, progress)
    except BaseException:
        staged.close()
        raise
    return staged


def check_host(mount: Mount) -> None:
    """Refuse a target that on this host, with its symbolic links, is the system's or the runtime's."""
    real = os.path.realpath(mount.target)
    for system in SYSTEM:
        if within(real, system) or within(system, real):
            raise ValidationError(
                f"The mount target {mount.target} is restricted: on this host it is {real}, and would hide {system}.",
                hint="Choose another one, such as /data or /mnt/train.",
            )
    runtime = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for place in (mount.target, real):
        if hidden := conceals(place, map(os.path.realpath, (sys.prefix, sys.base_prefix, runtime))):
            raise ValidationError(
                f"The mount target {mount.target} is restricted: it would hide {hidden}, which the runtime needs.",
                hint="Choose another one, such as /data or /mnt/train.",
            )


def _stage(
    mount: Mount,
    points: list[str],
    staged: Staged,
    env: Mapping[str, str] | None,
    project: str,
    progress: Callable[[Progress], None] | None,
) -> None:
    if mount.scheme == "volume":
        _attach(mount, staged, project)
    elif mount.scheme == "file":
        path = unquote(mount.source.partition("://")[2]) if is_url(mount.source) else mount.source
        if not os.path.exists(path):
            raise DataNotFound(f"There is no {path} on this host, to be mounted at {mount.target}.", url=mount.source)
        _bind(mount, path, staged)
    else:
        from flowfn_runtime.data.sources import open_source

        source = open_source(mount.source, mount.storage_options, env)
        if mount.mode == "lazy":
            from flowfn_runtime.data import lazy

            served = lazy.serve(source, mount_points=points)
            staged.lease_fds += (served.lease_fd,)
            _bind(mount, served.path, staged)
            return
        from flowfn_runtime.data.cache import Cache

        try:
            snapshot = Cache().stage(source, mount_points=points, progress=progress)
        finally:
            source.close()
        staged.lease_fds += (snapshot.lease_fd,)
        staged.fetched_bytes += snapshot.fetched_bytes
        _bind(mount, snapshot.path, staged)


def _bind(mount: Mount, path: str, staged: Staged) -> None:
    target = mount.target
    if os.path.isfile(path) and not _is_name_for(target, path):
        target = posixpath.join(target, os.path.basename(path))
    staged.binds += (Bind(path, target, bool(mount.read_only)),)


def _is_name_for(target: str, path: str) -> bool:
    """Whether `target` means the file itself, not a directory to put it in."""
    name, suffix = os.path.basename(path), posixpath.splitext(path)[1]
    return posixpath.basename(target) == name or (suffix != "" and posixpath.splitext(target)[1] == suffix)


def _attach(mount: Mount, staged: Staged, project: str) -> None:
    from flowfn_runtime.data import volumes

    name, _, inside = mount.source.partition("://")[2].partition("/")
    properties = {
        option: value
        for option, value in (mount.storage_options or {}).items()
        if option in ("size_gb", "interface", "region")
    }
    attachment = volumes.attach(name, project, **properties)
    staged.lease_fds += (attachment.fd,)
    if attachment.keeper and attachment.keeper not in staged.keepers:
        staged.keepers += (attachment.keeper,)
        staged.binds += (Bind(attachment.keeper, attachment.keeper, False),)
    path = os.path.normpath(os.path.join(attachment.path, inside.strip("/")))
    if not within(path, attachment.path):
        raise ValidationError(f"The mount at {mount.target}: {redact(mount.source)} leads out of the volume.")
    if inside.strip("/") and not os.path.exists(path):
        if mount.read_only:
            raise DataNotFound(f"There is no {mount.source}, to be mounted at {mount.target}.", url=mount.source)
        os.makedirs(path)
    _bind(mount, path, staged)
