"""Where data comes from: one small interface, `Source`, over every kind of URL.

S3 and HTTP are spoken by ourselves (`s3`, `http1`), which measures fastest and shows keys and errors as they are; every
other URL goes through its fsspec filesystem. `open_source` chooses.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol
from urllib.parse import urlsplit

from flowfn_runtime.data.answer import check_head
from flowfn_runtime.data.credentials import environment, s3_settings
from flowfn_runtime.data.http1 import Asked
from flowfn_runtime.data.model import Listing, Object
from flowfn_runtime.data.retry import Patience
from flowfn_runtime.data.s3 import PAGE_KEYS, S3
from flowfn_runtime.data.s3_errors import parent
from flowfn_runtime.data.s3_page import Page, Pages
from flowfn_runtime.data.spec import check_path, scheme_of
from flowfn_runtime.errors import DataAccessDenied, DataError, DataNotFound, ValidationError

# Series of pages that are asked for side by side.
_MOST_SERIES = 16

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

    def ask(self, object: Object) -> Asked | None:
        """Send the request for a whole object; `fetch` takes the answer. None where that can't be done."""

    def fetch(
        self, object: Object, first: int, last: int | None, sink: Sink, asked: Asked | None = None
    ) -> Mapping[str, str]:
        """Pour the bytes `first` to `last` (inclusive; None: to the end) of that version into `sink`; the headers.

        `asked`: what `ask` gave, for all of it.
        """

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
    if not url:
        raise ValidationError("The URL is empty.", hint="Is a variable unset?")
    if scheme == "file":
        check_path(url)
    if scheme in ("s3", "s3a"):
        if not url.partition("://")[2].partition("/")[0]:
            raise DataError(f"{url} names no bucket.", url=url, hint="Write s3://bucket/prefix.")
        settings = s3_settings(options, env)
        if not _proxied(settings.endpoint or "https://s3.amazonaws.com", env):
            bucket, _, key = url.partition("://")[2].partition("/")
            return S3Source(S3(bucket, settings), key)
    elif scheme in ("http", "https") and not _proxied(url, env):
        from flowfn_runtime.data.http_source import HttpSource

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

    def ask(self, object: Object) -> Asked | None:
        return self.client.ask(object.key, etag=object.etag)

    def fetch(
        self, object: Object, first: int, last: int | None, sink: Sink, asked: Asked | None = None
    ) -> Mapping[str, str]:
        whole = first == 0 and (last is None or object.size is None or last >= object.size - 1)
        response = self.client.get(
            object.key, first=None if whole else first, last=None if whole else last, etag=object.etag, asked=asked
        )
        check_head(response, object, first, last, self.object_url(object.key))
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
        raise DataNotFound(f"There is no object {self.url}.", url=self.url, hint=f"flow data ls {parent(self.url)}")

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
        # Handed out one by one by the iterator itself. (A pool of threads takes as long to import as a page to come.)
        self._waiting: Iterator[tuple[int, tuple[str | None, str | None]]] = enumerate(pairwise(self.bounds))
        self._later: dict[int, list[Page]] = {}
        self._failure: BaseException | None = None
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> _Series:
        for _ in range(min(len(self.bounds) - 1, _MOST_SERIES)):
            thread = threading.Thread(target=self._work, name="flowfn-listing", daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        self._waiting = iter(())
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        try:
            while (task := next(self._waiting, None)) is not None:
                number, ends = task
                self._later[number] = self.part(*ends)
        except BaseException as error:
            self._failure, self._waiting = error, iter(())

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
        for thread in self._threads:
            thread.join()
        if self._failure is not None:
            raise self._failure
        return [page for _, series in sorted(self._later.items()) for page in series]

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


def _directory_of(key: str) -> str:
    return key[: key.rfind("/") + 1]
