"""S3's wire protocol, as far as moving data needs it: signed requests, listings, ranged reads, uploads, and its errors.

Keys go to the server exactly as they are listed (`a//b`, `a/../b`, a slash at the end), which general-purpose stores
that take keys for paths can't do. Every error of the server's becomes one of ours here, with what to do about it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import quote, urlsplit

from flowfn_runtime.data.connection import Response
from flowfn_runtime.data.credentials import Keys, S3Settings
from flowfn_runtime.data.endpoint import Body, Endpoint
from flowfn_runtime.data.http1 import Asked, Pool
from flowfn_runtime.data.model import Object, parse_time
from flowfn_runtime.data.s3_errors import Busy, Refusal, meaning
from flowfn_runtime.data.s3_page import Page, tag
from flowfn_runtime.errors import DataError

_EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
_SAFE = "-._~"
PAGE_KEYS = 1000
_MALFORMED = "AuthorizationHeaderMalformed"


class Signer:
    """HMAC-SHA256 with one key, of at most 64 bytes.

    The library's own takes as long as all the rest of a request's making.
    """

    def __init__(self, key: bytes) -> None:
        padded = key.ljust(64, b"\0")
        self._inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in padded))
        self._outer = hashlib.sha256(bytes(byte ^ 0x5C for byte in padded))

    def digest(self, text: bytes) -> bytes:
        """The digest of `text`."""
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(text)
        outer.update(inner.digest())
        return outer.digest()


class S3:
    """A client for one bucket. Safe to share among threads: each has connections of its own."""

    def __init__(self, bucket: str, settings: S3Settings) -> None:
        self.bucket = bucket
        self._lock = threading.Lock()
        self._settings = settings
        self._address(settings)

    def _address(self, settings: S3Settings) -> None:
        with self._lock:
            self._settings = settings
            base = settings.endpoint or f"https://s3.{settings.region}.amazonaws.com"
            parts = urlsplit(base if "://" in base else f"https://{base}")
            host, prefix = parts.hostname or "", parts.path.rstrip("/")
            # A bucket with a dot in its name fits no wildcard certificate.
            if settings.path_style or "." in self.bucket or not _is_dns(self.bucket):
                prefix += "/" + quote(self.bucket, safe=_SAFE)
            else:
                host = f"{self.bucket}.{host}"
            self._endpoint = Endpoint(parts.scheme, host, parts.port, ca_file=settings.ca_file)
            self._pool = Pool(self._endpoint)
            self._prefix = prefix
            self._signing_key: tuple[tuple[str, str, str], Signer] | None = None

    @property
    def endpoint(self) -> str:
        """The service's URL, as far as it tells this store from another."""
        return self._settings.endpoint or "aws"

    def url(self, key: str = "") -> str:
        return f"s3://{self.bucket}/{key}"

    # -- requests ------------------------------------------------------------------------------------------------------

    def send(
        self,
        method: str,
        key: str,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: Body = None,
    ) -> Response:
        """Send one signed request. The answer has whatever status the server gave; raises `WireError`."""
        return self._ask(method, key, query, headers, body).answer()

    def _ask(
        self,
        method: str,
        key: str,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: Body = None,
    ) -> Asked:
        settings = self._settings
        path = f"{self._prefix}/{quote(key, safe='/' + _SAFE)}"
        query_text = "&".join(
            f"{quote(name, safe=_SAFE)}={quote(value, safe=_SAFE)}" for name, value in sorted((query or {}).items())
        )
        sent = {"host": self._endpoint.authority, **(headers or {})}
        if settings.requester_pays:
            sent["x-amz-request-payer"] = "requester"
        if settings.keys is not None:
            self._sign(sent, settings.keys(), settings.region, method, path, query_text, body)
        if body is not None or method in ("PUT", "POST"):
            sent["content-length"] = str(len(body) if body is not None else 0)
        lines = [f"{method} {path}{'?' + query_text if query_text else ''} HTTP/1.1"]
        lines.extend(f"{name}: {value}" for name, value in sent.items())
        return self._pool.ask(method, ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"), body)

    def close(self) -> None:
        """Close idle connections."""
        self._pool.close()

    def interrupt(self) -> None:
        """Break all connections."""
        self._pool.interrupt()

    def _sign(
        self,
        headers: dict[str, str],
        keys: Keys,
        region: str,
        method: str,
        path: str,
        query: str,
        body: Body,
    ) -> None:
        """AWS Signature Version 4. Bodies are not hashed: their integrity is checked by length and checksum."""
        now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        digest = _EMPTY_SHA256 if body is None or not len(body) else "UNSIGNED-PAYLOAD"
        headers["x-amz-date"] = now
        headers["x-amz-content-sha256"] = digest
        if keys.token:
            headers["x-amz-security-token"] = keys.token
        names = sorted(name for name in headers if name == "host" or name.startswith("x-amz-"))
        listed = ";".join(names)
        canonical = "\n".join((method, path, query, *(f"{name}:{headers[name]}" for name in names), "", listed, digest))
        day = now[:8]
        scope = f"{day}/{region}/s3/aws4_request"
        text = f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
        cached = self._signing_key
        if cached is None or cached[0] != (keys.secret, day, region):
            derived = b"AWS4" + keys.secret.encode()
            for part in (day, region, "s3", "aws4_request"):
                derived = hmac.digest(derived, part.encode(), "sha256")
            cached = self._signing_key = ((keys.secret, day, region), Signer(derived))
        signature = cached[1].digest(text.encode()).hex()
        headers["authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={keys.access}/{scope}, SignedHeaders={listed}, Signature={signature}"
        )

    # -- what the server holds -----------------------------------------------------------------------------------------

    def page(
        self, prefix: str, *, after: str | None = None, token: str | None = None, delimiter: str | None = None
    ) -> Page:
        """One page of keys with `prefix`, in order; with a `delimiter` only those that don't have it further on."""
        query = {"list-type": "2", "prefix": prefix, "max-keys": str(PAGE_KEYS), "encoding-type": "url"}
        if delimiter:
            query["delimiter"] = delimiter
        if token:
            query["continuation-token"] = token
        elif after:
            query["start-after"] = after
        response = self.send("GET", "", query)
        if response.status != 200:
            raise self.error(response, prefix, action="list")
        return Page(response.read())

    def head(self, key: str) -> Object:
        """What the server says of one object. Raises `DataNotFound` if there is none."""
        response = self.send("HEAD", key)
        if response.status != 200:
            raise self.error(response, key, action="read")
        response.read()
        return object_of(key, response.headers)

    def ask(self, key: str, *, first: int | None = None, last: int | None = None, etag: str | None = None) -> Asked:
        """Send the request of `get`, without waiting for its answer."""
        headers: dict[str, str] = {}
        if first is not None:
            headers["range"] = f"bytes={first}-{last if last is not None else ''}"
        if etag:
            headers["if-match"] = f'"{etag}"'
        return self._ask("GET", key, None, headers)

    def get(
        self,
        key: str,
        *,
        first: int | None = None,
        last: int | None = None,
        etag: str | None = None,
        asked: Asked | None = None,
    ) -> Response:
        """Begin to read an object, or its bytes `first` to `last` (inclusive); only of the version `etag`, if given.

        `asked`: the request, if it was sent before.
        """
        response = (asked or self.ask(key, first=first, last=last, etag=etag)).answer()
        if response.status not in (200, 206):
            raise self.error(response, key, action="read", pinned=etag is not None)
        # Some servers answer a range with status 200; what counts is which bytes they say it is.
        if first is not None and not response.headers.get("content-range", "").startswith(f"bytes {first}-"):
            response.discard()  # a server that ignores ranges would send the whole object for each of them
            raise DataError(f"{self.url(key)}: the server ignores byte ranges.", url=self.url(key))
        return response

    def children(self, prefix: str, token: str | None = None) -> Page:
        """One page of what is directly below `prefix`: objects, and longer prefixes."""
        query = {"list-type": "2", "prefix": prefix, "delimiter": "/", "encoding-type": "url"}
        if token:
            query["continuation-token"] = token
        response = self.send("GET", "", query)
        if response.status != 200:
            raise self.error(response, prefix, action="list")
        return Page(response.read())

    # -- writing -------------------------------------------------------------------------------------------------------

    def put(self, key: str, body: Body, *, md5: bytes | None = None) -> str:
        """Write an object at once; its ETag. With `md5` the server refuses what it did not receive as it was sent."""
        headers = {"content-type": "application/octet-stream"}
        if md5 is not None:
            import base64

            headers["content-md5"] = base64.b64encode(md5).decode()
        response = self.send("PUT", key, None, headers, body if body is not None else b"")
        return self._written(response, key)

    def start_multipart(self, key: str) -> str:
        """Begin an upload in parts; its id."""
        response = self.send("POST", key, {"uploads": ""}, {"content-type": "application/octet-stream"}, b"")
        if response.status != 200:
            raise self.error(response, key, action="write")
        return tag(response.read().decode(), "UploadId")

    def put_part(self, key: str, upload: str, number: int, body: Body) -> str:
        """Write part `number` (from 1); its ETag."""
        return self._written(self.send("PUT", key, {"partNumber": str(number), "uploadId": upload}, None, body), key)

    def complete_multipart(self, key: str, upload: str, etags: Sequence[str]) -> str:
        """Make the object of its parts; its ETag."""
        parts = "".join(
            f'<Part><PartNumber>{number}</PartNumber><ETag>"{etag}"</ETag></Part>'
            for number, etag in enumerate(etags, 1)
        )
        body = f"<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>".encode()
        response = self.send("POST", key, {"uploadId": upload}, {"content-type": "application/xml"}, body)
        if response.status != 200:
            raise self.error(response, key, action="write")
        text = response.read().decode()
        if code := tag(text, "Code"):  # an error that came after the server had said 200
            raise Busy(f"{self.url(key)}: the server answers {code}")
        return tag(text, "ETag").replace("&quot;", "").strip('"')

    def abort_multipart(self, key: str, upload: str) -> None:
        """Give up an upload; its parts are dropped."""
        self.send("DELETE", key, {"uploadId": upload}).read()

    def delete(self, key: str) -> None:
        """Delete an object; it is no error if there is none."""
        response = self.send("DELETE", key)
        if response.status not in (200, 204, 404):
            raise self.error(response, key, action="delete")
        response.read()

    def _written(self, response: Response, key: str) -> str:
        if response.status != 200:
            raise self.error(response, key, action="write")
        response.read()
        return response.headers.get("etag", "").strip('"')

    # -- errors --------------------------------------------------------------------------------------------------------

    def error(self, response: Response, key: str, *, action: str, pinned: bool = False) -> Exception:
        """The error that an answer with a failing status means; a `WireError` if another try may help."""
        text = response.read().decode("utf-8", "replace")
        code, message = tag(text, "Code"), tag(text, "Message")
        status, url, where = response.status, self.url(key), self._where()
        if self._follow_region(response, text, code):
            return Busy(f"the bucket is in {self._settings.region}")
        return meaning(
            Refusal(status, code, message, url, where, self.bucket, self._settings.region, self._settings.keys is None),
            action=action,
            pinned=pinned,
        )

    def _follow_region(self, response: Response, text: str, code: str) -> bool:
        """Go to the region that the server names, if it names another one than was used. True if it did."""
        if response.status not in (301, 307, 400, 403) or (self._settings.endpoint and code != _MALFORMED):
            return False
        region = response.headers.get("x-amz-bucket-region") or tag(text, "Region")
        if not region or region == self._settings.region:
            return False
        self._address(replace(self._settings, region=region))
        return True

    def _where(self) -> str:
        return self._settings.endpoint or f"Amazon S3 ({self._settings.region})"


def object_of(key: str, headers: Mapping[str, Any]) -> Object:
    return Object(
        key=key,
        size=int(headers.get("content-length", 0)),
        etag=str(headers.get("etag", "")).strip('"') or None,
        version=headers.get("x-amz-version-id") or None,
        modified=parse_time(headers.get("last-modified")),
    )


def _is_dns(bucket: str) -> bool:
    return re.fullmatch(r"[a-z0-9][a-z0-9\-]{1,61}[a-z0-9]", bucket) is not None
