"""Data references: objects in arguments and results that stand for data at a URL.

`File` and `Dir` are read, `Output` (in output.py) is written. All are `os.PathLike`: whoever opens one gets a local
file. On the client a reference is pinned when it is pickled: what the worker stages is the version that the client
saw, or `DataChanged`. The worker calls `prepare()` before the function runs and `finish()` after it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import IO, TYPE_CHECKING, Any

from ..errors import DataNotFound
from ..settings import UPLOAD_LOCAL
from . import access
from .access import Info
from .reference import Readable, Reference
from .spec import is_url, scheme_of

if TYPE_CHECKING:
    from .staging import Staged


class File(Readable):
    """One object or file.

    Wherever Python takes a path, it is the path of a local file with the data: `open(ref)`, `pandas.read_csv(ref)`,
    `torch.load(ref)`. As an argument of a call it is staged before the function starts; `open()` reads it without.

    `url` is any fsspec URL, a path, or a reference; `storage_options` go to the source's filesystem.
    """

    _name: str | None  # the name of the staged file, where the URL's last part is none
    _digest: str | None  # SHA-256 of the content, where it is known

    def _blank(self) -> None:
        super()._blank()
        self._name = self._digest = None

    @classmethod
    def _of(
        cls,
        url: str,
        options: Mapping[str, Any] | None,
        *,
        pin: Info | None = None,
        name: str | None = None,
        digest: str | None = None,
    ) -> File:
        made = cls(url, storage_options=options)
        made._pin, made._name, made._digest = pin, name, digest
        return made

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "_name": self._name, "_digest": self._digest}

    def __reduce_ex__(self, protocol: Any) -> Any:
        if os.environ.get(UPLOAD_LOCAL) and not self._arrived and scheme_of(self._url) == "file" and not self._digest:
            from . import store

            return store.upload(self.path).__reduce_ex__(protocol)
        return super().__reduce_ex__(protocol)

    @property
    def name(self) -> str:
        """The file's name: the last part of the URL, or what it was called when it was uploaded."""
        return self._name or os.path.basename(self._url.partition("?")[0].rstrip("/"))

    def open(self, mode: str = "rb", **options: Any) -> IO[Any]:
        """Open the data at the URL as a stream, without staging it: what is not read is not fetched.

        `mode` and the options (`encoding=`, `compression=`, `block_size=`) are those of `fsspec.open`. Opened for
        writing, what is there afterwards is a new version, whose writer this is. Raises `DataNotFound`, `DataChanged`.
        """
        from .streams import open_stream

        reading = "r" in mode and "+" not in mode
        if not reading:
            self._pin = None
        return open_stream(self._url, self._options, mode, check=self._check if reading else None, **options)

    def _stage(self) -> Staged:
        from . import staging

        try:
            return staging.file(self._url, self._options, name=self._name, digest=self._digest, check=self._check)
        except DataNotFound as error:
            if self._arrived and scheme_of(self._url) == "file":
                error.hint = "it is a path of the host that sent it; flow.upload(path) makes a reference for every host"
            raise


class Dir(Readable):
    """A directory, or all objects below a prefix.

    Wherever Python takes a path, it is the path of a local, read-only directory with the data (of a directory or volume
    of this machine: that itself). As an argument of a call it is staged before the function starts.
    """

    _digest: str | None  # of all that is in it, where that is known

    def _blank(self) -> None:
        super()._blank()
        self._digest = None

    @classmethod
    def _of(cls, url: str, digest: str) -> Dir:
        made = cls(url)
        made._digest = digest
        return made

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "_digest": self._digest}

    def __reduce_ex__(self, protocol: Any) -> Any:
        if os.environ.get(UPLOAD_LOCAL) and not self._arrived and scheme_of(self._url) == "file" and not self._digest:
            from . import store

            return store.upload(self.path).__reduce_ex__(protocol)
        return super().__reduce_ex__(protocol)

    def _look(self) -> Info:
        from . import staging

        return staging.look_dir(self._url, self._options)

    def _see(self) -> None:
        # What lies on this machine or in a volume is used in place, as it is at the time.
        if scheme_of(self._url) not in ("file", "volume"):
            super()._see()

    def _stage(self) -> Staged:
        from . import staging

        staged = staging.directory(self._url, self._options, check=self._check)
        if self._digest is not None:
            from . import store_trees

            with access.explained(self._url):
                store_trees.verify(staged.path, self._digest, self._url)
        return staged

    def __truediv__(self, relative: str) -> File:
        """The file of that path below this directory."""
        return File(access.join(self._url, relative), storage_options=self._options)

    def files(self, pattern: str = "**") -> Iterator[File]:
        """The files below it whose path relative to it matches the glob `pattern`, one after another."""
        from .globs import files

        return files(access.join(self._url, pattern), storage_options=self._options)


class StagedPath(str):
    """The path of staged data, a `str`, which knows the `url` that it was staged from."""

    url: str
    _reference: Reference  # keeps what is staged in the cache for as long as the path is in use

    @classmethod
    def of(cls, reference: Reference) -> StagedPath:
        """The path of `reference`, staged now if need be."""
        made = cls(reference.path)
        made.url = reference.url
        made._reference = reference
        return made

    def __reduce__(self) -> Any:
        # Where it is unpickled it names what is staged there.
        return StagedPath.of, (self._reference,)


def staged_path(url: str, *, storage_options: Mapping[str, Any] | None = None) -> StagedPath:
    """Stage what is at `url`, an object or all objects below a prefix, and return its local path."""
    if not is_url(url):
        return StagedPath.of(File(url))
    options = storage_options
    is_dir = url.endswith("/")
    if not is_dir:
        with access.explained(url):
            if access.local_path(url) is not None:
                is_dir = access.look(url).is_dir
            else:
                is_dir = not access.source(url, options).listing().single
    return StagedPath.of(Dir(url, storage_options=options) if is_dir else File(url, storage_options=options))
