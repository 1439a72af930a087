"""Any URL that fsspec knows, through its filesystem: the source of last resort, and of everything exotic."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from flowfn_runtime.data.endpoint import WireError
from flowfn_runtime.data.http1 import Asked
from flowfn_runtime.data.model import Listing, Object
from flowfn_runtime.data.retry import Patience
from flowfn_runtime.data.spec import redact, scheme_of
from flowfn_runtime.errors import DataChanged, DataError, DataNotFound, DataUnavailable

_PIECE_BYTES = 4 << 20

# Variables of a task's own environment that filesystems read from the process's: option of the filesystem by variable.
_FROM_ENV = {
    "s3": {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_SESSION_TOKEN": "token",
        "AWS_PROFILE": "profile",
        "AWS_ENDPOINT_URL": "endpoint_url",
        "AWS_ENDPOINT_URL_S3": "endpoint_url",
    },
    "gs": {"GOOGLE_APPLICATION_CREDENTIALS": "token", "GOOGLE_CLOUD_PROJECT": "project"},
    "abfs": {
        "AZURE_STORAGE_CONNECTION_STRING": "connection_string",
        "AZURE_STORAGE_ACCOUNT_NAME": "account_name",
        "AZURE_STORAGE_ACCOUNT_KEY": "account_key",
        "AZURE_STORAGE_SAS_TOKEN": "sas_token",
    },
    "hf": {"HF_TOKEN": "token", "HF_ENDPOINT": "endpoint"},
}
_WHO_ASKS = frozenset(
    {"key", "secret", "token", "profile", "password", "account_key", "sas_token", "skip_instance_cache"}
)
_NO_VERSION = frozenset({"name", "size", "type", "url", "mimetype"})
_SAME = {"s3a": "s3", "gcs": "gs", "az": "abfs", "abfss": "abfs", "adl": "abfs"}


class FsspecSource:
    """A file or directory of an fsspec filesystem."""

    ranges = True
    recipe: tuple[Any, ...] | None = None

    def __init__(self, url: str, options: Mapping[str, Any], env: Mapping[str, str]) -> None:
        from flowfn_runtime.data import access

        self.url = url
        scheme = scheme_of(url)
        known = _FROM_ENV.get(_SAME.get(scheme, scheme), {})
        chosen = {option: env[variable] for variable, option in known.items() if env.get(variable)}
        self._access = access
        self._fs, self._path = access.filesystem(url, {**chosen, **options})
        # Filesystems with a loop of their own take calls from any thread; the others keep one connection, or one file.
        self._one_at_a_time: AbstractContextManager[Any] = (
            threading.Lock() if not getattr(self._fs, "async_impl", False) else nullcontext()
        )
        self._prefix = url.partition("://")[0] + "://" if "://" in url else ""
        self.identity = f"fsspec {scheme} {_which(self._fs)}"

    def object_url(self, key: str) -> str:
        return self._prefix + key

    def close(self) -> None:
        pass  # fsspec keeps its filesystems

    def interrupt(self) -> None:
        pass  # and their connections

    def _info(self) -> Mapping[str, Any]:
        self._fs.invalidate_cache()
        info: Mapping[str, Any] = self._fs.info(self._path)
        return info

    def stat(self) -> Object:
        info = self._try(self._info)
        if info.get("type") == "directory":
            raise DataError(f"{redact(self.url)} is a directory, not an object.", url=redact(self.url))
        return self._object(self._path, info)

    def listing(self, *, hints: Sequence[str] = ()) -> Listing:
        info = self._try(self._info)
        if info.get("type") != "directory":
            base = self._path[: self._path.rfind("/") + 1]
            return Listing(self.url, base, True, (self._object(self._path, info),))
        root = self._path.rstrip("/") + "/" if self._path else ""
        found = self._try(lambda: self._fs.find(self._path, detail=True))
        objects = [
            self._object(name, entry)
            for name, entry in sorted(found.items())
            if entry.get("type") != "directory" and name.startswith(root)
        ]
        if found and not objects:
            raise DataError(f"{redact(self.url)}: the filesystem lists paths outside of it.", url=redact(self.url))
        return Listing(self.url, root, False, tuple(objects))

    def _object(self, key: str, raw: Mapping[str, Any]) -> Object:
        info = self._access.info_from(self.url, raw)
        # Only S3 promises what its ETag is; elsewhere it is a version like any other.
        version = " ".join(filter(None, (info.etag, info.version)))
        return Object(
            key=key,
            size=info.size_bytes,
            version=version or (None if info.modified else _described(raw)),
            modified=info.modified.timestamp() if info.modified else None,
        )

    def ask(self, object: Object) -> Asked | None:
        return None  # fsspec's filesystems have no such halves

    def fetch(
        self,
        object: Object,
        first: int,
        last: int | None,
        sink: Callable[[memoryview], Any],
        asked: Asked | None = None,
    ) -> Mapping[str, str]:
        end = object.size if last is None else last + 1
        try:
            with self._one_at_a_time:
                self._read(object, first, end, sink)
        except FileNotFoundError as error:
            url = redact(self.object_url(object.key))
            raise DataChanged(f"{url} was deleted after it was listed.", url=url) from error
        except Exception as error:
            raise self._meaning(error) from error
        return {}

    def _read(self, object: Object, first: int, end: int | None, sink: Callable[[memoryview], Any]) -> None:
        if end is not None and end - first <= _PIECE_BYTES:
            if end > first:
                sink(memoryview(self._fs.cat_file(object.key, start=first, end=end)))
            return
        with self._fs.open(object.key, "rb", block_size=_PIECE_BYTES, cache_type="readahead") as opened:
            opened.seek(first)
            position = first
            while end is None or position < end:
                piece = opened.read(_PIECE_BYTES if end is None else min(_PIECE_BYTES, end - position))
                if not piece:
                    break
                sink(memoryview(piece))
                position += len(piece)

    def _try(self, work: Callable[[], Any]) -> Any:
        def attempt() -> Any:
            try:
                return work()
            except Exception as error:
                raise self._meaning(error) from error

        return Patience(self.url).attempt(attempt)

    def _meaning(self, error: Exception) -> Exception:
        if isinstance(error, DataError):
            return error
        meaning = self._access.explain(error, self.url)
        if isinstance(meaning, DataUnavailable):
            return WireError(meaning.message)
        if isinstance(meaning, DataNotFound):
            meaning.hint = meaning.hint or "Check the spelling."
        return meaning


def _which(fs: Any) -> str:
    """Tells one filesystem of a kind from the others: two servers, or two archives, may have files of one name."""
    try:
        if fs.fsid:
            return str(fs.fsid)
    except (NotImplementedError, AttributeError):
        pass
    made_of = [*fs.storage_args, sorted(_lasting(fs.storage_options).items())]
    return hashlib.sha256(repr(made_of).encode("utf-8", "surrogatepass")).hexdigest()[:40]


def _lasting(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options without those that say who asks: they are renewed, and the data stays."""
    return {
        name: _lasting(value) if isinstance(value, Mapping) else value
        for name, value in options.items()
        if name not in _WHO_ASKS
    }


def _described(raw: Mapping[str, Any]) -> str | None:
    """What else a filesystem says of a file (a checksum, a blob's id, ...) where it names neither version nor time."""
    more = sorted((str(name), repr(value)) for name, value in raw.items() if name not in _NO_VERSION)
    return hashlib.sha256(repr(more).encode("utf-8", "surrogatepass")).hexdigest()[:40] if more else None
