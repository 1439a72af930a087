"""Where data comes from: one small interface, `Source`, over every kind of URL.

S3 and HTTP are spoken by ourselves (`s3`, `http1`), which measures fastest and shows keys and errors as they are; every
other URL goes through its fsspec filesystem. `open_source` chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from flowfn_runtime.data.credentials import environment, s3_settings
from flowfn_runtime.data.http1 import Endpoint, Pool, Response, WireError
from flowfn_runtime.data.model import Listing, Object, parse_time
from flowfn_runtime.data.retry import Patience
from flowfn_runtime.data.s3 import PAGE_KEYS, S3, Busy
from flowfn_runtime.data.s3_page import Page, Pages
from flowfn_runtime.data.spec import redact, scheme_of
from flowfn_runtime.errors import DataAccessDenied, DataChanged, DataError, DataNotFound

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

Sink = Callable[[memoryview], Any]


class Source(Protocol):
    """Data at a URL. Methods raise `DataError`s, except `fetch`, whose `WireError` says that another try may help."""

    url: str
    identity: str  # tells this store from every other one, for the cache; no credentials in it
    recipe: tuple[Any, ...] | None  # what `open_source` makes it of, in another process too
    ranges: bool  # whether `fetch` can begin elsewhere than at 0

    def listing(self, *, hints: Sequence[str] = ()) -> Listing:
        """What the URL stands for now. `hints`: keys that spread evenly over those to expect, from an older listing."""

    def stat(self) -> Object:
        """The one object at the URL."""

    def fetch(self, object: Object, first: int, last: int | None, sink: Sink) -> Mapping[str, str]:
        """Pour the bytes `first` to `last` (inclusive; None: to the end) of that version into `sink`; the headers."""

    def object_url(self, key: str) -> str:
        """The URL of an object."""

    def close(self) -> None:
        """Close idle connections."""

    def interrupt(self) -> None:
        """Break connections that are in use, as far as that can be done: a transfer is to end now."""


def open_source(url: str, options: Mapping[str, Any] | None = None, env: Mapping[str, str] | None = None) -> Source:
    """The source at `url`. `options` as fsspec names them; `env` goes over the process's environment."""
    source = _open(url, options or {}, environment(env))
    source.recipe = (url, dict(options or {}), dict(env or {}))
    return source


def _open(url: str, options: Mapping[str, Any], env: Mapping[str, str]) -> Source:
    scheme = scheme_of(url)
    if scheme in ("s3", "s3a"):
        settings = s3_settings(options, env)
        if not _proxied(settings.endpoint or "https://s3.amazonaws.com", env):
            bucket, _, key = url.partition("://")[2].partition("/")
            return S3Source(S3(bucket, settings), key)
    elif scheme in ("http", "https") and not _proxied(url, env):
        return HttpSource(url, options, env)
    # Whatever is left; and proxies, which the engines of fsspec's filesystems know how to use.
    from flowfn_runtime.data.fsspec_source import FsspecSource

    return FsspecSource(url, options, env)


def _proxied(url: str, env: Mapping[str, str]) -> bool:
    """Whether the environment wants requests to `url` to go through a proxy."""
    lower = {name.lower(): value for name, value in env.items() if name.lower().endswith("_proxy") and value}
    parts = urlsplit(url)
    if not lower.get(f"{parts.scheme}_proxy", lower.get("all_proxy")):
        return False
    from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]

    names = {name.removesuffix("_proxy"): value for name, value in lower.items()}
    return not proxy_bypass_environment(parts.netloc, names)


class S3Source:
    """`s3://bucket/key-or-prefix`."""

    ranges = True
    recipe: tuple[Any, ...] | None = None

    def __init__(self, client: S3, key: str) -> None:
        self.client = client
        self.key = key
        self.url = client.url(key)
        self.identity = f"s3 {client.endpoint} {client.bucket}"

    def object_url(self, key: str) -> str:
        return self.client.url(key)

    def close(self) -> None:
        self.client.close()

    def interrupt(self) -> None:
        self.client.interrupt()

    def fetch(self, object: Object, first: int, last: int | None, sink: Sink) -> Mapping[str, str]:
        whole = first == 0 and (last is None or object.size is None or last >= object.size - 1)
        response = self.client.get(
            object.key, first=None if whole else first, last=None if whole else last, etag=object.etag
        )
        _check_head(response, object, first, last, self.object_url(object.key))
        response.pour(sink)
        return response.headers

    def stat(self) -> Object:
        if not self.key or self.key.endswith("/"):
            listing = self.listing()
            raise DataError(f"{self.url} is a prefix of {len(listing.objects)} objects, not an object.", url=self.url)
        return Patience(self.url).attempt(lambda: self._stat())

    def _stat(self) -> Object:
        try:
            # A listing tells as much as HEAD, and its errors have a body that says what is wrong.
            page = self.client.page(self.key)
        except DataAccessDenied:
            return self.client.head(self.key)
        if page.first == self.key:
            return page.objects[0]
        raise DataNotFound(f"There is no object {self.url}.", url=self.url, hint=f"flow data ls {self.url}")

    def listing(self, *, hints: Sequence[str] = ()) -> Listing:
        patience = Patience(self.url)
        key = self.key
        if not key or key.endswith("/"):
            with _Series(self.client, key, hints, patience) as ahead:
                found = Pages([*ahead.part(None, ahead.bounds[0]), *ahead.rest()])
            if key and not found:
                raise self._nothing()
            return Listing(self.url, key, False, found, found.mark)
        folder = key + "/"
        # What was below it the last time is asked for together with what it is now.
        with _Series(self.client, folder, hints, patience) as ahead:
            try:
                page = patience.attempt(lambda: self.client.page(key))
            except DataAccessDenied as denied:
                try:
                    # Some may read an object whose bucket they may not list.
                    alone = patience.attempt(lambda: self.client.head(key))
                except DataError:
                    raise denied from None
                return Listing(self.url, _directory_of(key), True, (alone,))
            single = page.objects[0] if page.first == key else None
            # "p" may be followed by "p-1" and so on before "p/..." begins, and by "p0" after it.
            below = page.first and page.last and page.first.startswith(folder) and page.last.startswith(folder)
            pages = [page if below else page.only(lambda name: name.startswith(folder))]
            if page.token and page.last and (page.last < folder or page.last.startswith(folder)):
                pages += ahead.all_after(page.last)
        members = Pages(pages)
        if members and single and single.size:
            raise DataError(
                f"{self.url} is both an object and a prefix of others.",
                url=self.url,
                hint=f"Write {self.url}/ for everything below the prefix.",
            )
        if members:
            return Listing(self.url, folder, False, members, members.mark)
        if single:
            return Listing(self.url, _directory_of(key), True, (single,))
        raise self._nothing()

    def _nothing(self) -> DataNotFound:
        return DataNotFound(
            f"There is nothing at {self.url}: no object of that name, and none below it.",
            url=self.url,
            hint=f"Check the spelling: flow data ls s3://{self.client.bucket}/",
        )


class _Series:
    """Pages of the keys with `prefix`: each names the next one, so hints let several series of them run side by side.

    Whatever the hints are worth, the series together cover every key exactly once.
    """

    def __init__(self, client: S3, prefix: str, hints: Sequence[str], patience: Patience) -> None:
        self.client = client
        self.prefix = prefix
        self.patience = patience
        self.bounds: list[str | None] = [*sorted({hint for hint in hints if hint.startswith(prefix)}), None]
        self._later: list[Future[list[Page]]] = []
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> _Series:
        if len(self.bounds) > 1:
            from concurrent.futures import ThreadPoolExecutor

            self._pool = ThreadPoolExecutor(min(len(self.bounds) - 1, 16))
            self._later = [self._pool.submit(self.part, *ends) for ends in pairwise(self.bounds)]
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def part(self, after: str | None, through: str | None) -> list[Page]:
        """The pages of the keys from the one `after` to the one `through`, which is the last."""
        found: list[Page] = []
        token: str | None = None
        while True:
            page = self.patience.attempt(lambda: self.client.page(self.prefix, after=after, token=token))  # noqa: B023
            if through is not None and page.last is not None and page.last >= through:
                found.append(page if page.last == through else page.only(lambda key: key <= through))
                return found
            found.append(page)
            token = page.token
            if token is None:
                return found

    def rest(self) -> list[Page]:
        """What comes after the first of the bounds."""
        return [page for series in self._later for page in series.result()]

    def all_after(self, after: str) -> list[Page]:
        """What comes after a key that lies before the first of the bounds, on it, or beyond it."""
        first = self.bounds[0]
        if first is None or first > after:
            return self.part(after, first) + self.rest()
        if first == after:
            return self.rest()
        return [
            page if page.first and page.first > after else page.only(lambda key: key > after) for page in self.rest()
        ]


def page_hints(objects: Sequence[Object]) -> list[str]:
    """Keys of an older listing at which the pages of the next one may begin."""
    return [object.key for object in objects[PAGE_KEYS - 1 : -1 : PAGE_KEYS]]


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

    def fetch(self, object: Object, first: int, last: int | None, sink: Sink) -> Mapping[str, str]:
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
        _check_head(response, object, first, last, redact(self.url))
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


def _check_head(response: Response, object: Object, first: int, last: int | None, url: str) -> None:
    """Refuse a body that is not of the listed version, or not as long, before a byte of it is written."""
    headers = response.headers
    version = headers.get("etag", "").strip('"')
    known = (object.etag or "").strip('"')
    if version and known and version != known:
        response.discard()
        raise DataChanged(
            f"{url} is not the version that was listed: its ETag is {version}, it was {known}.", url=url, hint=_AGAIN
        )
    if not known and object.modified is not None:
        modified = parse_time(headers.get("last-modified"))
        if modified is not None and int(modified) != int(object.modified):  # the header has whole seconds
            response.discard()
            raise DataChanged(f"{url} is not the version that was listed: it was written to.", url=url, hint=_AGAIN)
    if object.size is None or response.length is None:
        return
    end = object.size - 1 if last is None else min(last, object.size - 1)
    if response.length == end - first + 1:
        return
    total = headers.get("content-range", "").rpartition("/")[2]
    response.discard()
    # With the version known to be right (or no word of it, so who answered?) it is the transfer that is wrong.
    if not known and (response.status == 200 or (total.isdigit() and int(total) != object.size)):
        raise DataChanged(
            f"{url} has {total or response.length} bytes, not the {object.size} that were listed.", url=url, hint=_AGAIN
        )
    raise WireError(f"{url}: {response.length} bytes came for a range of {end - first + 1}")


_AGAIN = "Run again: a new listing decides."


def _directory_of(key: str) -> str:
    return key[: key.rfind("/") + 1]
