"""`volume://name/path` as an fsspec filesystem, so that pandas, pyarrow and `flow.File` read and write volumes.

In a task or worker that has the volume mounted, paths resolve to the mount; elsewhere to the volume's directory on this
host. `FLOW_MOUNTS` says what is mounted: a JSON object of source URL to target, `{"volume://models": "/models"}`. Where
it is set, the process has a filesystem of its own, and only what is mounted there can be reached.

Writing to a name that has no volume yet makes one, as mounting it does; reading does not.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

from fsspec.implementations.local import LocalFileOpener, LocalFileSystem
from fsspec.spec import AbstractFileSystem

from .. import settings
from ..errors import DataAccessDenied, DataError, DataNotFound, FlowError, VolumeError
from . import volume_db, volumes

MOUNTS = "FLOW_MOUNTS"


class VolumeFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """The project's volumes: their names (or ids) are the top level, like buckets.

    `project` is whose volumes are seen; the configured one by default. Symbolic links that lead out of a volume are
    not followed: a task may have made them.
    """

    protocol = "volume"
    root_marker = ""

    def __init__(self, project: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.project = project
        self._local = LocalFileSystem()

    @property
    def fsid(self) -> str:
        return "volume"

    # -- where things are ----------------------------------------------------------------------------------------------

    def local_path(self, path: str, *, create: bool = False, follow: bool = True) -> str:
        """The path on this machine that `path` stands for.

        `create` makes a missing volume and the parent directory. Without `follow` it is the symbolic link itself where
        the last part is one. Raises `DataNotFound` if there is no such volume, `DataAccessDenied` if the path leads
        out of it.
        """
        clean = _bare(path)
        parts = clean.split("/")
        if ".." in parts or "\0" in clean:
            raise DataAccessDenied(f"volume://{clean} has '..' in it", url=f"volume://{clean}")
        name, rest = parts[0], "/".join(part for part in parts[1:] if part not in ("", "."))
        if not name:
            raise DataError("volume:// alone is no file", url="volume://", hint="write volume://name/path")
        root, rest = self._root(name, rest, create)
        local = os.path.join(root, rest) if rest else root
        real_root = os.path.realpath(root)
        seen = os.path.realpath(local if follow or not rest else os.path.dirname(local))
        if seen != real_root and not seen.startswith(real_root + "/"):
            raise DataAccessDenied(f"volume://{clean} leads out of the volume, to {seen}", url=f"volume://{clean}")
        if create and rest:
            os.makedirs(os.path.dirname(local), exist_ok=True)
        return local

    def _root(self, name: str, rest: str, create: bool) -> tuple[str, str]:
        # As it is mounted here: the longest source that holds the path.
        whole = f"{name}/{rest}".rstrip("/")
        best, target = "", ""
        for source, where in _mounted().items():
            prefix = _bare(source)
            if (whole == prefix or whole.startswith(prefix + "/")) and len(prefix) > len(best):
                best, target = prefix, where
        if best:
            return target, whole[len(best) :].lstrip("/")
        if MOUNTS in os.environ:
            # This process has a filesystem of its own. A volume made here would be gone with it.
            raise DataNotFound(
                f"volume://{name} is not mounted here",
                url=f"volume://{name}",
                hint=f'mount it: mounts={{"/volumes/{name}": "volume://{name}"}}',
            )
        project = self.project or settings.project()
        try:
            if bucket_url := settings.volumes():
                return _copy(bucket_url, name, project, create), rest
            if create and not volumes.is_id(name):
                return volumes.find_or_create(name, project=project).path, rest
            return volumes.get(name, project).path, rest
        except VolumeError as error:
            raise DataNotFound(error.message, url=f"volume://{name}", hint=error.hint) from error
        except FlowError as error:  # no name for a volume
            raise DataError(error.message, url=f"volume://{name}", hint=error.hint) from error

    @classmethod
    def _parent(cls, path: str) -> str:
        path = _bare(path)
        return path.rsplit("/", 1)[0] if "/" in path else cls.root_marker

    # -- reading -------------------------------------------------------------------------------------------------------

    def ls(self, path: str, detail: bool = True, **_: Any) -> Any:
        clean = _bare(path)
        found: list[dict[str, Any]]
        if not clean:
            labels = {_bare(source).partition("/")[0] for source in _mounted()}
            if MOUNTS not in os.environ:
                labels = {volume.label for volume in volumes.list_volumes(self.project or settings.project())}
            found = [{"name": label, "size": 0, "type": "directory"} for label in sorted(labels)]
        else:
            local = self.local_path(clean)
            with _about(clean):
                if os.path.isdir(local):
                    listed = self._local.ls(local, detail=True)
                    found = [{**info, "name": f"{clean}/{os.path.basename(info['name'])}"} for info in listed]
                else:
                    found = [{**self._local.info(local), "name": clean}]
        return found if detail else [info["name"] for info in found]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        clean = _bare(path)
        if not clean:
            return {"name": "", "size": 0, "type": "directory"}
        with _about(clean):
            return {**self._local.info(self.local_path(clean)), "name": clean}

    def exists(self, path: str, **_: Any) -> bool:
        try:
            self.info(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def lexists(self, path: str, **_: Any) -> bool:
        try:
            return os.path.lexists(self.local_path(path, follow=False))
        except FileNotFoundError:
            return False

    def islink(self, path: str) -> bool:
        return os.path.islink(self.local_path(path, follow=False))

    def created(self, path: str) -> datetime:
        return datetime.fromtimestamp(self.info(path)["created"], tz=timezone.utc)

    def modified(self, path: str) -> datetime:
        return datetime.fromtimestamp(self.info(path)["mtime"], tz=timezone.utc)

    def ukey(self, path: str) -> str:
        info = self.info(path)
        return f"{info.get('ino')}-{info.get('mtime')}-{info['size']}"

    # -- writing -------------------------------------------------------------------------------------------------------

    def _open(self, path: str, mode: str = "rb", block_size: Any = None, autocommit: bool = True, **_: Any) -> Any:
        local = self.local_path(path, create=mode[0] in "wxa")
        with _about(path):
            return LocalFileOpener(local, mode, autocommit=autocommit, fs=self._local)

    def mkdir(self, path: str, create_parents: bool = True, **_: Any) -> None:
        if self.exists(path):
            raise FileExistsError(path)
        local = self.local_path(path, create=create_parents)
        with _about(path):
            os.makedirs(local, exist_ok=True) if create_parents else os.mkdir(local)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        if not exist_ok and self.exists(path):
            raise FileExistsError(path)
        with _about(path):
            os.makedirs(self.local_path(path, create=True), exist_ok=True)

    def rmdir(self, path: str) -> None:
        self._not_whole(path)
        with _about(path):
            os.rmdir(self.local_path(path, follow=False))

    def rm_file(self, path: str) -> None:
        self._not_whole(path)
        with _about(path):
            os.remove(self.local_path(path, follow=False))

    _rm = rm_file

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:
        for each in self.expand_path(path) if isinstance(path, list) or self._is_glob(path) else [path]:
            self._not_whole(each)
            local = self.local_path(each, follow=False)
            with _about(each):
                if os.path.isdir(local) and not os.path.islink(local):
                    if not recursive:
                        raise ValueError(f"{each} is a directory: set recursive=True")
                    shutil.rmtree(local)
                elif not isinstance(path, list) or os.path.lexists(local):  # a list names what its folders held too
                    os.remove(local)

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        source = self.local_path(path1)
        if os.path.isdir(source):
            self.makedirs(path2, exist_ok=True)
            return
        with _about(path1):
            shutil.copyfile(source, self.local_path(path2, create=True))

    def mv(self, path1: str, path2: str, recursive: bool = True, **_: Any) -> None:
        self._not_whole(path1)
        with _about(path1):
            shutil.move(self.local_path(path1, follow=False), self.local_path(path2, create=True, follow=False))

    def touch(self, path: str, truncate: bool = True, **_: Any) -> None:
        local = self.local_path(path, create=True)
        with _about(path):
            with open(local, "ab"):
                os.utime(local)
            if truncate:
                os.truncate(local, 0)

    def chmod(self, path: str, mode: int) -> None:
        with _about(path):
            os.chmod(self.local_path(path), mode)

    @staticmethod
    def _is_glob(path: str) -> bool:
        return any(character in path for character in "*?[")

    def _not_whole(self, path: str) -> None:
        clean = _bare(path)
        if "/" not in clean:
            raise DataAccessDenied(
                f"volume://{clean} is a whole volume", url=f"volume://{clean}", hint=f"flow volume rm {clean}"
            )


def _bare(path: str) -> str:
    """`name/path`, without protocol and outer slashes."""
    return str(VolumeFileSystem._strip_protocol(path))


_copies: dict[tuple[str, ...], volumes.Attachment] = {}


def _copy(bucket_url: str, name: str, project: str, create: bool) -> str:
    """This host's copy of a volume in a bucket: attached at the first use, written back when this process is gone."""
    key = (bucket_url, volume_db.root(), project, name, str(os.getpid()))
    if key not in _copies:
        _copies[key] = volumes.attach(name, project, create=create)
    return _copies[key].path


def _mounted() -> dict[str, str]:
    """What `FLOW_MOUNTS` says: source URL to target."""
    text = os.environ.get(MOUNTS)
    if not text:
        return {}
    import json

    try:
        found = json.loads(text)
        return {str(source): str(target) for source, target in found.items() if str(source).startswith("volume://")}
    except (ValueError, AttributeError):
        raise DataError(f"{MOUNTS} is no JSON object of source to target: {text[:100]!r}") from None


@contextmanager
def _about(path: str) -> Iterator[None]:
    """Errors name the URL as the user wrote it, not where it lies on this host; their types and numbers stay."""
    try:
        yield
    except FlowError:
        raise
    except OSError as error:
        url = path if "://" in path else f"volume://{path}"
        if error.errno is None:
            raise
        raise type(error)(error.errno, error.strerror or str(error), url) from error


def register() -> None:
    """Make fsspec know `volume://` where no package metadata says so, as in the runtime image."""
    import fsspec

    fsspec.register_implementation("volume", VolumeFileSystem, clobber=True)
