"""What references have in common: a URL and its options, the version that was seen, and how one travels.

A server that can't be seen from here is asked for a version now and then only, not for every reference.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import DataChanged, DataError, DataNotFound, ValidationError
from . import access
from .access import Info
from .spec import public_options, redact

if TYPE_CHECKING:
    from pathlib import Path

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


class Readable(Reference):
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

    def resolve(self) -> Path:
        """The path as a `pathlib.Path`. numpy asks every `os.PathLike` for it: `numpy.load(ref, mmap_mode="r")`."""
        from pathlib import Path

        return Path(self.path).resolve()

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
