"""Volumes that live in a bucket, for hosts that share nothing: `FLOW_VOLUMES=s3://bucket/prefix`.

```
<prefix>/<project>/ids/<id>                     what the volume is (JSON)
<prefix>/<project>/names/<name>                 the id of the volume of that name; made once, by a conditional write
<prefix>/<project>/volumes/<id>/head            which manifest is the present one; replaced by conditional writes only
<prefix>/<project>/volumes/<id>/manifests/...   its files: path, mode, time, size, and the SHA-256 of each content
<prefix>/<project>/volumes/<id>/data/...        the contents
```

Every decision about who was first is the server's: `If-None-Match` and `If-Match`; a store that ignores these is
refused. Manifests and contents have names that are used once, so that what one host clears away is never what another
has just written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ..errors import ConfigError, DataNotFound, VolumeError
from . import access
from .retry import Patience
from .spec import redact, scheme_of

if TYPE_CHECKING:
    from .model import Object
    from .sources import S3Source

_SETTLED: set[str] = set()  # stores that were seen to keep conditions


class Stale(Exception):
    """A conditional write found another object there than was expected."""


class Bucket:
    """The volumes below a URL."""

    def __init__(self, url: str) -> None:
        if scheme_of(url) not in ("s3", "s3a") or not url.partition("://")[2].strip("/"):
            raise ConfigError(f"FLOW_VOLUMES={redact(url)!r}", hint="write s3://bucket/prefix, or unset it")
        self.url = url.rstrip("/")
        self._source: S3Source = access.source(self.url + "/", None)  # type: ignore[assignment]
        self._client = self._source.client
        self._prefix = self.url.partition("://")[2].partition("/")[2]

    def key(self, project: str, *parts: str) -> str:
        """The key of something of a project's."""
        base = [self._prefix] if self._prefix else []
        return "/".join([*base, quote(project, safe=""), *parts])

    def url_of(self, key: str) -> str:
        """The URL of a key."""
        return self._client.url(key)

    # -- objects -------------------------------------------------------------------------------------------------------

    def get(self, key: str) -> tuple[bytes, str] | None:
        """An object's content and ETag; None if there is none."""

        def attempt() -> tuple[bytes, str]:
            response = self._client.get(key)
            return response.read(), response.headers.get("etag", "").strip('"')

        with access.explained(self.url_of(key)):
            try:
                return Patience(self.url).attempt(attempt)
            except DataNotFound:
                return None

    def put(self, key: str, content: bytes) -> None:
        """Write an object whose name says what is in it."""
        digest = hashlib.md5(content, usedforsecurity=False).digest()
        with access.explained(self.url_of(key)):
            Patience(self.url).attempt(lambda: self._client.put(key, content, md5=digest))

    def put_if(self, key: str, content: bytes, etag: str | None) -> str:
        """Write an object if what is there has this ETag (None: if nothing is there); the new ETag. Raises `Stale`."""
        self._settle()
        return self._put_if(key, content, etag)

    def _put_if(self, key: str, content: bytes, etag: str | None) -> str:
        condition = {"if-none-match": "*"} if etag is None else {"if-match": f'"{etag}"'}

        def attempt() -> str | None:
            response = self._client.send("PUT", key, None, {**condition, "content-type": "application/json"}, content)
            if response.status in (409, 412) or (response.status == 404 and etag is not None):
                response.read()
                return None
            if response.status != 200:
                raise self._client.error(response, key, action="write")
            response.read()
            return response.headers.get("etag", "").strip('"')

        with access.explained(self.url_of(key)):
            written = Patience(self.url).attempt(attempt)
        if written is None:
            # Was it ours, of an attempt whose answer was lost?
            if (found := self.get(key)) is None or found[0] != content:
                raise Stale
            written = found[1]
        return written

    def _settle(self) -> None:
        """Make sure that the store keeps conditions; otherwise two writers could undo each other unseen."""
        if self.url in _SETTLED:
            return
        probe = self.key(".flowfn", f"probe-{os.urandom(8).hex()}")
        try:
            self._put_if(probe, b"1", None)
            try:
                self._put_if(probe, b"2", None)
            except Stale:
                _SETTLED.add(self.url)
                return
        finally:
            self._client.delete(probe)
        raise VolumeError(
            f"volumes can't live in {redact(self.url)}: the store ignores If-None-Match",
            hint="use one that has conditional writes: Amazon S3, R2, MinIO, Ceph",
        )

    def delete(self, key: str) -> None:
        """Delete an object, if it is there."""
        with access.explained(self.url_of(key)):
            Patience(self.url).attempt(lambda: self._client.delete(key))

    def keys(self, prefix: str) -> Iterator[Object]:
        """The objects whose keys begin so."""
        token: str | None = None
        with access.explained(self.url_of(prefix)):
            while True:
                page = Patience(self.url).attempt(lambda: self._client.page(prefix, token=token))  # noqa: B023
                yield from page.objects
                token = page.token
                if token is None:
                    return

    def source(self, key: str) -> S3Source:
        """The source of an object."""
        return access.source(self.url_of(key), None)  # type: ignore[return-value]

    # -- the registry --------------------------------------------------------------------------------------------------

    def create(self, volume: Mapping[str, Any]) -> dict[str, Any] | None:
        """Register a volume; None if it was, else the one that has its name already."""
        project, name, volume_id = volume["project"], volume["name"], volume["id"]
        content = json.dumps(dict(volume)).encode()
        self.put_if(self.key(project, "ids", volume_id), content, None)
        if name is None:
            return None
        while True:
            try:
                self.put_if(self.key(project, "names", name), content, None)
                return None
            except Stale:
                if (there := self.by_name(name, project)) is not None:
                    self.delete(self.key(project, "ids", volume_id))
                    return there

    def by_name(self, name: str, project: str) -> dict[str, Any] | None:
        """The volume of this name."""
        return self._read(self.key(project, "names", name))

    def by_id(self, volume_id: str, project: str) -> dict[str, Any] | None:
        """The volume of this id."""
        return self._read(self.key(project, "ids", volume_id))

    def _read(self, key: str) -> dict[str, Any] | None:
        found = self.get(key)
        if found is None:
            return None
        try:
            record: dict[str, Any] = json.loads(found[0])
            return record
        except ValueError:
            raise VolumeError(f"{redact(self.url_of(key))} is no record of a volume") from None

    def list(self, project: str) -> list[dict[str, Any]]:
        """The project's volumes."""
        prefix = self.key(project, "ids", "")
        records = [self._read(found.key) for found in self.keys(prefix)]
        return [record for record in records if record is not None]

    def remove(self, volume: Mapping[str, Any]) -> None:
        """Delete a volume: first its name, then itself, then its files."""
        project, name, volume_id = volume["project"], volume["name"], volume["id"]
        if name is not None and (there := self.by_name(name, project)) and there["id"] == volume_id:
            self.delete(self.key(project, "names", name))
        self.delete(self.key(project, "ids", volume_id))
        prefix = self.key(project, "volumes", volume_id, "")
        self.delete(prefix + "head")
        for found in list(self.keys(prefix)):
            self.delete(found.key)
