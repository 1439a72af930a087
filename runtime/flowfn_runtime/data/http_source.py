"""`http://` and `https://`: one file at a URL."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from flowfn_runtime.data.answer import check_head
from flowfn_runtime.data.connection import Response
from flowfn_runtime.data.endpoint import Endpoint
from flowfn_runtime.data.http1 import Asked, Pool
from flowfn_runtime.data.model import Listing, Object, parse_time
from flowfn_runtime.data.retry import Patience
from flowfn_runtime.data.s3_errors import Busy
from flowfn_runtime.data.spec import redact
from flowfn_runtime.errors import DataAccessDenied, DataChanged, DataError, DataNotFound

Sink = Callable[[memoryview], Any]


class HttpSource:
    """`http://` and `https://`: one file. Redirects are followed once, when it is looked at."""

    recipe: tuple[Any, ...] | None = None

    def __init__(self, url: str, options: Mapping[str, Any], env: Mapping[str, str]) -> None:
        self.url = url
        self.identity = f"http {url}"
        self.ranges = True  # until `stat` finds out otherwise
        client = dict(options.get("client_kwargs") or {})
        self._headers = {
            str(name).lower(): str(value)
            for name, value in {**(options.get("headers") or {}), **(client.get("headers") or {})}.items()
        }
        self._ca_file = env.get("SSL_CERT_FILE")
        self._go_to(url)

    def object_url(self, key: str) -> str:
        return self.url

    def close(self) -> None:
        self._pool.close()

    def interrupt(self) -> None:
        self._pool.interrupt()

    def _go_to(self, url: str) -> None:
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            raise DataError(f"{redact(url)} has no valid port.", url=redact(url)) from None
        if not parts.hostname:
            raise DataError(f"{redact(url)} names no server.", url=redact(url), hint="Write http://server/path.")
        self._endpoint = Endpoint(parts.scheme, parts.hostname or "", port, ca_file=self._ca_file)
        self._target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._pool = Pool(self._endpoint)
        if parts.username is not None:
            import base64
            from urllib.parse import unquote

            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
            self._headers["authorization"] = "Basic " + base64.b64encode(pair).decode()

    def _send(self, method: str, headers: Mapping[str, str]) -> Response:
        sent = {"host": self._endpoint.authority, "accept": "*/*", "user-agent": "flowfn", **self._headers, **headers}
        lines = [f"{method} {self._target} HTTP/1.1", *(f"{name}: {value}" for name, value in sent.items())]
        return self._pool.request(method, ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace"))

    def stat(self) -> Object:
        return Patience(self.url).attempt(self._stat)

    def _stat(self) -> Object:
        from urllib.parse import urljoin

        current = self.url
        for _ in range(10):
            # Not HEAD: a signed URL is often good for GET alone. One byte also shows whether ranges work.
            response = self._send("GET", {"range": "bytes=0-0"})
            if response.status in (301, 302, 303, 307, 308) and "location" in response.headers:
                response.discard()
                self._pool.close()
                target = urljoin(current, response.headers["location"])
                if urlsplit(target).netloc != urlsplit(current).netloc:
                    self._headers.pop("authorization", None)  # credentials are for the host they were given for
                current = target
                self._go_to(current)
                continue
            return self._described(response)
        raise DataError(f"{redact(self.url)} redirects in a circle.", url=redact(self.url))

    def _described(self, response: Response) -> Object:
        headers = response.headers
        size: int | None = None
        if response.status == 206 and "/" in (span := headers.get("content-range", "")):
            total = span.rpartition("/")[2]
            size = int(total) if total.isdigit() else None
            response.read()
        elif response.status == 416 and headers.get("content-range", "").endswith("*/0"):
            size = 0  # no byte 0 in an empty file
            response.read()
        elif response.status == 200:
            size = response.length
            response.discard()  # without taking the body
            self.ranges = False
        else:
            raise self._error(response)
        return Object(
            key="",
            size=size,
            etag=headers.get("etag"),  # opaque, with its quotes: never taken for a digest
            modified=parse_time(headers.get("last-modified")),
        )

    def listing(self, *, hints: Sequence[str] = ()) -> Listing:
        import posixpath
        from urllib.parse import unquote

        found = self.stat()
        name = unquote(posixpath.basename(urlsplit(self.url).path.rstrip("/"))) or "index"
        return Listing(self.url, "", True, (found._replace(key=name),))

    def ask(self, object: Object) -> Asked | None:
        return None  # there is but one object

    def fetch(
        self, object: Object, first: int, last: int | None, sink: Sink, asked: Asked | None = None
    ) -> Mapping[str, str]:
        whole = first == 0 and (last is None or object.size is None or last >= object.size - 1)
        headers = {} if whole else {"range": f"bytes={first}-{'' if last is None else last}"}
        if object.etag and not object.etag.startswith("W/"):
            headers["if-match"] = object.etag
        response = self._send("GET", headers)
        if response.status == 200 and not whole:
            response.discard()
            raise DataError(f"{redact(self.url)}: the server ignores byte ranges.", url=redact(self.url))
        if response.status != (200 if whole else 206):
            raise self._error(response)
        check_head(response, object, first, last, redact(self.url))
        response.pour(sink)
        return response.headers

    def _error(self, response: Response) -> Exception:
        status, url = response.status, redact(self.url)
        response.read()
        if status >= 500 or status == 429:
            return Busy(f"{url}: the server answers {status}")
        if status in (404, 410):
            return DataNotFound(f"There is nothing at {url} ({status}).", url=url, hint="Check the spelling.")
        if status in (401, 403, 407):
            return DataAccessDenied(
                f"The server denies access to {url} ({status}).",
                url=url,
                hint="Give credentials: storage_options={'headers': {'Authorization': ...}}; signed URLs expire.",
            )
        if status in (412, 416):
            return DataChanged(f"{url} is not the version that was seen before.", url=url)
        return DataError(f"{url}: the server answers {status}.", url=url)
