"""What references need of the world: which version of an object is there, its bytes in a local file, and back.

The one boundary where fsspec's, botocore's and the system's errors about data become flowfn's.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from .. import settings
from ..errors import CacheFull, DataAccessDenied, DataError, DataNotFound, DataUnavailable, FlowError
from .spec import check_path, redact, scheme_of

if TYPE_CHECKING:
    from .model import Object
    from .s3 import S3
    from .sources import Source

Options = Mapping[str, Any] | None


@dataclass(frozen=True)
class Info:
    """What a source says about an object, a file or a prefix."""

    url: str
    is_dir: bool  # a directory, or a prefix of objects
    size_bytes: int | None  # of a prefix: of all its objects; None where the source doesn't say
    etag: str | None = None
    version: str | None = None  # version id or generation, where the source keeps versions
    modified: datetime | None = None
    count: int | None = None  # of a prefix: how many objects

    def difference(self, other: Info) -> str | None:
        """What `other` has that this one has not, in words; None if both are the same version."""
        for name, what in _FIELDS:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is not None and theirs is not None and mine != theirs:
                return f"its {what} was {mine}, and is {theirs}"
            if name in ("version", "etag") and mine is not None and mine == theirs:
                return None  # the source itself says that it is the same; the time may differ after a copy in place
        return None


_FIELDS = (
    ("is_dir", "being a directory"),
    ("count", "number of objects"),
    ("size_bytes", "size in bytes"),
    ("version", "version"),
    ("etag", "ETag"),
    ("modified", "time of modification"),
)


# -- where a URL is ----------------------------------------------------------------------------------------------------


def normal_url(url: str) -> str:
    """`url`, plain paths and `file://` as an absolute path."""
    scheme = scheme_of(url)
    if scheme != "file":
        return url
    bare = url.removeprefix("file://")
    check_path(bare)
    path = os.path.abspath(os.path.expanduser(bare))
    return path + "/" if bare.endswith("/") and path != "/" else path


def local_path(url: str, *, create: bool = False) -> str | None:
    """The path of this machine's filesystem that `url` stands for; None if it lies elsewhere.

    `create` makes a missing volume, and the directory in it.
    """
    scheme = scheme_of(url)
    if scheme == "file":
        return url.removeprefix("file://")
    if scheme == "volume":
        from .volumefs import VolumeFileSystem

        found: str = VolumeFileSystem().local_path(url, create=create)
        return found
    return None


def filesystem(url: str, options: Options) -> tuple[Any, str]:
    """The fsspec filesystem of `url`, with the storage options that apply to it, and the path in it."""
    import fsspec

    if scheme_of(url) == "volume":
        from .volumefs import register

        register()
    with explained(url):
        more = effective(url, options)
        if scheme_of(url) not in ("file", "volume"):
            # A listing that fsspec remembers would hide that an object has changed.
            more.setdefault("use_listings_cache", False)
        if "::" in url:
            more.setdefault("skip_instance_cache", True)  # an archive that was opened before may have been replaced
        fs, path = fsspec.core.url_to_fs(url, **more)
        return fs, path


def effective(url: str, options: Options) -> dict[str, Any]:
    """The storage options of a URL: what is configured for it, and `options` over that."""
    return {**settings.storage(url), **(options or {})}


# -- looking -----------------------------------------------------------------------------------------------------------


def look(url: str, options: Options = None) -> Info:
    """What is at `url` now. Raises `DataNotFound` and the other `DataError`s."""
    with explained(url):
        if (local := local_path(url)) is not None:
            return _stat(url, local)
        return info_of(url, source(url, options).stat())


def source(url: str, options: Options) -> Source:
    """The source of a URL that is not on this machine, with the storage options that apply to it.

    Sources of one bucket share a client and its connections: a thousand references are not a thousand handshakes.
    """
    from .sources import S3Source, open_source

    options = effective(url, options)
    if scheme_of(url) not in ("s3", "s3a"):
        return open_source(url, options)
    bucket, _, key = url.partition("://")[2].partition("/")
    identity = tuple(
        sorted((name, value) for name, value in os.environ.items() if name.startswith(("AWS_", "FSSPEC_")))
    )
    known = (os.getpid(), bucket, repr(sorted(options.items())), identity)
    client = _clients.get(known)
    if client is None:
        opened = open_source(url, options)
        assert isinstance(opened, S3Source)
        if len(_clients) >= _CLIENTS:
            _clients.clear()
        client = _clients[known] = opened.client
    return S3Source(client, key)


_CLIENTS = 64
_clients: dict[object, S3] = {}


def info_of(url: str, found: Object) -> Info:
    """What a source's description of an object says."""
    modified = datetime.fromtimestamp(found.modified, tz=timezone.utc) if found.modified is not None else None
    return Info(url, False, found.size, found.etag, found.version, modified)


def info_from(url: str, raw: Mapping[str, Any]) -> Info:
    """`Info` from what an fsspec filesystem says, whatever it calls it."""
    etag = _first(raw, "ETag", "etag", "e_tag", "md5Hash", "sha256")
    version = _first(raw, "VersionId", "version_id", "versionId", "generation")
    size = raw.get("size")
    return Info(
        url,
        raw.get("type") == "directory",
        int(size) if size is not None else None,
        str(etag).strip('"') if etag else None,
        str(version) if version and version != "null" else None,
        _time(_first(raw, "LastModified", "last_modified", "updated", "mtime", "modified")),
    )


def _first(raw: Mapping[str, Any], *names: str) -> Any:
    return next((raw[name] for name in names if raw.get(name) is not None), None)


def _time(value: Any) -> datetime | None:
    if isinstance(value, datetime):
        return value if value.tzinfo else value.replace(tzinfo=timezone.utc)
    if isinstance(value, (int, float)):
        return datetime.fromtimestamp(value, tz=timezone.utc)
    if isinstance(value, str):
        try:
            return _time(datetime.fromisoformat(value.replace("Z", "+00:00")))
        except ValueError:
            return None
    return None


def _stat(url: str, path: str) -> Info:
    stat = os.stat(path)
    modified = datetime.fromtimestamp(stat.st_mtime, tz=timezone.utc)
    if os.path.isdir(path):
        return Info(url, True, None, None, None, modified)
    return Info(url, False, stat.st_size, local_etag(stat), None, modified)


def local_etag(stat: os.stat_result) -> str:
    """What stands for the version of a local file; the same for a copy that keeps the time, as on another host."""
    return f"{stat.st_mtime_ns:x}"


def join(url: str, relative: str) -> str:
    """The URL of `relative` below `url`."""
    return url.rstrip("/") + "/" + relative


# -- errors ------------------------------------------------------------------------------------------------------------


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn whatever goes wrong with `url` into a `DataError` that names it."""
    try:
        yield
    except FlowError:
        raise
    except Exception as error:
        raise explain(error, url) from error


def explain(error: Exception, url: str) -> DataError:
    """The `DataError` that `error`, met while reading or writing `url`, means."""
    shown, text = redact(url), str(error) or type(error).__name__
    number = getattr(error, "errno", None)
    if number == errno.EROFS:
        return DataError(
            f"{shown} can't be written from here: it is read-only",
            url=shown,
            hint="a function or task with mounts= has a filesystem of its own: write to a bucket, or mount a volume",
        )
    if isinstance(error, FileNotFoundError):
        here = scheme_of(url) == "file"
        return DataNotFound(
            f"there is no {shown}{' on this machine' if here else ''}",
            url=shown,
            hint="check its spelling; files of another machine go along with flow.upload, through a store (FLOW_STORE) "
            "that both reach"
            if here
            else "check its spelling, and the endpoint or region",
        )
    if isinstance(error, PermissionError) or type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        return DataAccessDenied(
            f"no access to {shown}: {text}", url=shown, hint="check the credentials that are in use for it"
        )
    if number in (errno.ENOSPC, errno.EDQUOT):
        return CacheFull(f"the disk is full, while handling {shown}: {text}", url=shown)
    if isinstance(error, (ConnectionError, TimeoutError)) or "connect" in text.lower() or "timed out" in text.lower():
        return DataUnavailable(f"the server of {shown} does not answer: {text}", url=shown)
    if isinstance(error, ImportError):
        package = re.search(r"nstall \W?([\w-]+)", text)
        hint = f"pip install {package.group(1)}" if package else None
        return DataError(f"{shown} needs a package that is not installed: {text}", url=shown, hint=hint)
    if isinstance(error, ValueError) and text.startswith("Protocol not known"):
        return _unknown_scheme(shown)
    return DataError(f"{shown}: {type(error).__name__}: {text}", url=shown)


def _unknown_scheme(url: str) -> DataError:
    from difflib import get_close_matches

    from fsspec import available_protocols

    scheme = scheme_of(url)
    near = get_close_matches(scheme, available_protocols(), 1)
    hint = f"did you mean {near[0]}://?" if near else "install the package that gives fsspec this filesystem"
    return DataError(f"{url}: fsspec knows no {scheme}://", url=url, hint=hint)
