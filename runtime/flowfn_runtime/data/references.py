"""Data references: objects in arguments and results that stand for data at a URL.

`File` and `Dir` are read, `Output` (in output.py) is written. All are `os.PathLike`: whoever opens one gets a local
file. On the client a reference is pinned when it is pickled: what the worker stages is the version that the client
saw, or `DataChanged`. The worker calls `prepare()` before the function runs and `finish()` after it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from typing import IO, TYPE_CHECKING, Any, TypeVar

from ..errors import DataChanged, DataError, DataNotFound, ValidationError
from ..settings import UPLOAD_LOCAL
from . import access
from .access import Info
from .spec import is_url, public_options, redact, scheme_of

if TYPE_CHECKING:
    from .staging import Staged

R = TypeVar("R", bound="Reference")


class Reference(os.PathLike[str]):
    """What `File`, `Dir` and `Output` have in common: a URL, and the storage options for it."""

    _arrived = False  # whether it came from another process, which knows the URL

    def __init__(
        self, url: str | os.PathLike[str] | Reference, *, storage_options: Mapping[str, Any] | None = None
    ) -> None:
        if isinstance(url, Reference):
            storage_options = storage_options if storage_options is not None else url.storage_options
            url = url.url
        text = url if isinstance(url, str) else os.fspath(url)
        if not isinstance(text, str) or not text or "\0" in text:
            raise ValidationError(f"{type(self).__name__}({url!r}): give a URL or a path")
        self._url = access.normal_url(text)
        self._options = dict(storage_options) if storage_options else None
        self._lock = threading.RLock()

    @property
    def url(self) -> str:
        """The URL; of a local file its absolute path."""
        return self._url

    @property
    def storage_options(self) -> Mapping[str, Any] | None:
        """The options that were given for the source's filesystem, as fsspec names them."""
        return dict(self._options) if self._options else None

    @property
    def path(self) -> str:
        """A path of this machine's filesystem."""
        raise NotImplementedError

    def __fspath__(self) -> str:
        return self.path

    def prepare(self) -> None:
        """Get ready for the function that is about to run; the worker calls this."""

    def finish(self, ok: bool) -> None:
        """The function has run, and returned (`ok`) or raised; the worker calls this."""

    # -- identity ------------------------------------------------------------------------------------------------------

    def _identity(self) -> tuple[Any, ...]:
        options = tuple(sorted((name, repr(value)) for name, value in (self._options or {}).items()))
        return type(self), self._url, options

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Reference) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash((type(self), self._url))

    def __repr__(self) -> str:
        options = f", storage_options={public_options(self._options)!r}" if self._options else ""
        return f"{type(self).__name__}({redact(self._url)!r}{options})"

    # A copy stands for the same data, and what is staged for one is staged for the other.
    def __copy__(self: R) -> R:
        return self

    def __deepcopy__(self: R, memo: object) -> R:
        return self

    # -- pickling ------------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        """What travels."""
        return {"_url": self._url, "_options": access.effective(self._url, self._options) or None}

    def __reduce_ex__(self, protocol: Any) -> Any:
        from ..pickling import note_reference

        note_reference(self)
        return _rebuild, (type(self), self._state())

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """A pydantic field of this type takes a reference or its URL, and is written as its URL."""
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(
            lambda value: value if isinstance(value, cls) else cls(value),
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda reference: reference.url, when_used="json"
            ),
        )


def _rebuild(cls: type[Reference], state: dict[str, Any]) -> Reference:
    from ..pickling import note_reference

    reference = cls.__new__(cls)
    cls._blank(reference)  # type: ignore[attr-defined]
    reference._lock = threading.RLock()
    reference._arrived = True
    vars(reference).update(state)
    note_reference(reference)
    return reference


class _Readable(Reference):
    """A reference to data that is there: pinned to the version that was seen first, staged when its path is wanted."""

    _pin: Info | None
    _staged: Staged | None

    def __init__(
        self, url: str | os.PathLike[str] | Reference, *, storage_options: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(url, storage_options=storage_options)
        self._blank()
        if isinstance(url, type(self)):
            vars(self).update(url._state())

    def _blank(self) -> None:
        self._pin = None
        self._staged = None

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "_pin": self._pin}

    def __reduce_ex__(self, protocol: Any) -> Any:
        self._see()
        return super().__reduce_ex__(protocol)

    def _look(self) -> Info:
        return access.look(self._url, self._options)

    def _see(self) -> None:
        """Pin what is there now, unless a version is pinned already."""
        if self._pin is None and _reachable(self._url):
            try:
                self._pin = self._look()
            except DataError as error:
                # Not visible from here, or not there yet. Where it is read, it is looked for again, and missed there.
                _remember(self._url, error)

    def info(self) -> Info:
        """What the source says of it now: size, ETag or version, time of modification.

        Raises `DataNotFound`, and `DataChanged` if it is not the version that was seen before.
        """
        now = self._look()
        if self._pin is None:
            self._pin = now
        self._check(now)
        return now

    def _check(self, now: Info) -> None:
        if self._pin is not None and (difference := self._pin.difference(now)):
            raise DataChanged(
                f"{redact(self._url)} is not what it was when it was referred to: {difference}",
                url=redact(self._url),
                hint=f"make a new flow.{type(self).__name__} of it to use what is there now",
            )

    def exists(self) -> bool:
        """True if there is something at the URL now. Other errors than its absence are raised."""
        try:
            self._look()
        except DataNotFound:
            return False
        return True

    @property
    def path(self) -> str:
        """The path of the data on this machine: where it lies already, else where it is staged, now if need be."""
        with self._lock:
            if self._staged is None or not os.path.exists(self._staged.path):
                self._staged = self._stage()
            return self._staged.path

    def _stage(self) -> Staged:
        raise NotImplementedError

    def prepare(self) -> None:
        """Stage the data, so that the function finds it in place, unless that was done ahead."""
        from . import ahead

        with self._lock:
            if self._staged is None:
                self._staged = ahead.take(self)
        _ = self.path

    def finish(self, ok: bool) -> None:
        """Let the cache drop the data when it needs the room."""
        with self._lock:
            staged, self._staged = self._staged, None
        if staged is not None:
            staged.close()


class File(_Readable):
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


class Dir(_Readable):
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


# -- sources that the client can't see ---------------------------------------------------------------------------------

_RETRY_S = 60.0
_unreachable: dict[str, float] = {}  # what a source is known by -> when to try it again


def _origin(url: str) -> str:
    return url[: url.find("/", url.find("://") + 3)] if "://" in url else ""


def _reachable(url: str) -> bool:
    import time

    return time.monotonic() >= _unreachable.get(_origin(url), 0.0)


def _remember(url: str, error: DataError) -> None:
    """A server that does not answer is not asked again for every single reference, but for the first one a minute."""
    import time

    if not isinstance(error, DataNotFound) and _origin(url):
        _unreachable[_origin(url)] = time.monotonic() + _RETRY_S
