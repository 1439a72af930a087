"""Directories of the cache that are read-only as a whole, for users other than root.

A read-only bind is asked after the file is: who opens a cached file, whose mode is 0444, for writing gets EACCES rather
than EROFS. A filesystem that is read-only itself is asked first. So a directory is covered with an overlay of it that
has nowhere to write to, in a namespace of mounts around the sandbox, which then binds what it sees there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import lru_cache

from flowfn_runtime import paths

# Directories up to `--`, then the command. What can't be covered (on kernels before 5.11, say) stays as it is.
_COVER = (
    'while [ "$1" != -- ]; do mount -t overlay flowfn -o "ro,lowerdir=$1:$0" "$1" 2>/dev/null; shift; done; '
    'shift; exec "$@"'
)
_SPECIAL = frozenset(',:\\"')  # they mean something in the options of a mount


def prefix(host_paths: Iterable[str]) -> list[str]:
    """What comes before `bwrap` so that those of these paths that lie in the cache are sealed; [] if nothing does.

    The user is root in the namespace around the sandbox: `identity` says how it is the user again inside.
    """
    if os.geteuid() == 0:
        return []
    cache = os.path.realpath(paths.cache()) + "/"
    real = (path for path in map(os.path.realpath, host_paths) if path.startswith(cache))
    cached = {path if os.path.isdir(path) else os.path.dirname(path) for path in real}
    covered = sorted(path for path in cached if not _SPECIAL & set(path) and not _is_read_only(path))
    return _around(covered) if covered and usable() else []


def identity() -> list[str]:
    """Bubblewrap's arguments that make the user of the sandbox this process's, with no more rights."""
    return ["--unshare-user", "--uid", str(os.getuid()), "--gid", str(os.getgid()), "--cap-drop", "ALL"]


@lru_cache(maxsize=1)
def usable() -> bool:
    """Whether bubblewrap runs in such a namespace, which not every host allows. Tries it for real."""
    import subprocess

    if os.geteuid() == 0:
        return False
    trial = ["bwrap", *identity(), "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "--unshare-pid", "--"]
    try:
        return not subprocess.run(
            [*_around(()), *trial, "true"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ).returncode
    except OSError:  # no unshare, or a cache that can't be written to
        return False


def _around(covered: Iterable[str]) -> list[str]:
    empty = paths.private_dir(os.path.join(paths.cache(), "empty"))  # an overlay of one directory alone can't be
    return ["unshare", "-U", "-r", "-m", "sh", "-c", _COVER, empty, *covered, "--"]


def _is_read_only(path: str) -> bool:
    return bool(os.statvfs(path).f_flag & os.ST_RDONLY)  # as lazy mounts are
