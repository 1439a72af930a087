"""Look at data and copy it, outside of the cache: what `flow data` does."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from flowfn_runtime.data import transfer
from flowfn_runtime.data.model import Listing, Object, Progress
from flowfn_runtime.data.retry import Patience
from flowfn_runtime.data.sources import S3Source, Source
from flowfn_runtime.data.tree import plan
from flowfn_runtime.errors import DataError

Tell = Callable[[Progress], None]


def children(source: Source) -> Iterator[tuple[str, Object | None]]:
    """What is directly below a URL, by name: objects, and None for what has more below it."""
    if isinstance(source, S3Source):
        yield from _s3_children(source)
        return
    seen: dict[str, Object | None] = {}
    listing = source.listing()
    for object in listing.objects:
        name, slash, _ = object.key[len(listing.base) :].partition("/")
        seen.setdefault(name + slash, None if slash else object)
    yield from seen.items()


def _s3_children(source: S3Source) -> Iterator[tuple[str, Object | None]]:
    patience, client = Patience(source.url), source.client
    prefix = source.key
    if prefix and not prefix.endswith("/"):
        if prefix + "/" not in patience.attempt(lambda: client.children(prefix)).prefixes:
            for object in source.listing().objects:
                yield object.key.rpartition("/")[2], object
            return
        prefix += "/"
    token: str | None = None
    while True:
        page = patience.attempt(lambda: client.children(prefix, token))  # noqa: B023
        token = page.token
        merged: list[tuple[str, Object | None]] = [(name, None) for name in page.prefixes]
        merged += [(object.key, object) for object in page.objects if object.key != prefix]
        for key, found in sorted(merged, key=lambda pair: pair[0]):
            yield key[len(prefix) :], found
        if token is None:
            return


def download(source: Source, path: str, *, progress: Tell | None = None) -> int:
    """Fetch what `source` stands for to `path`: one object as that file (or into it, if it is a directory), a prefix
    as that directory. Files appear when they are whole. Returns the bytes fetched."""
    listing = source.listing()
    tree = plan(listing)
    if listing.single:
        ((name, object),) = tree.files
        target = os.path.join(path, name) if os.path.isdir(path) else path
        targets = [(target, object)]
    else:
        os.makedirs(path, exist_ok=True)
        for folder in tree.directories:
            os.makedirs(os.path.join(path, folder), exist_ok=True)
        targets = [(os.path.join(path, name), object) for name, object in tree.files]
    mode = 0o666 & ~_umask()  # asked once: to ask for it is to change it for a moment
    return transfer.fetch(source, [FileJob(object, target, mode) for target, object in targets], progress=progress)


def stream(source: Source, sink: Callable[[memoryview], Any]) -> None:
    """Read the one object at a URL from its beginning to its end."""
    object = source.stat()
    patience = Patience(source.url)
    position = 0

    def counted(piece: memoryview) -> None:
        nonlocal position
        sink(piece)
        position += len(piece)
        patience.succeeded()

    if object.size == 0:
        return
    if not source.ranges or object.size is None:
        source.fetch(object, 0, None, counted)
        return
    while position < object.size:
        # After an error only the rest is asked for: what has been written can't be taken back.
        patience.attempt(lambda: source.fetch(object, position, None, counted))


def summary(listing: Listing) -> dict[str, Any]:
    """What a URL stands for, for JSON."""
    if listing.single:
        return {"url": listing.url, "type": "object", **listing.objects[0].to_dict()}
    newest = max((object.modified for object in listing.objects if object.modified), default=None)
    return {
        "url": listing.url,
        "type": "prefix",
        "objects": len(listing.objects),
        "size": listing.size,
        "modified": newest,
    }


class FileJob:
    """Fetch an object to a file of one's own choice (a `transfer.Job`)."""

    def __init__(self, object: Object, path: str, mode: int) -> None:
        self.object = object
        self.path = path
        self.mode = mode
        self._temporary = ""

    def begin(self) -> int | None:
        folder = os.path.dirname(os.path.abspath(self.path))
        try:
            fd, self._temporary = tempfile.mkstemp(prefix=".flow-", dir=folder)
        except FileNotFoundError:
            raise DataError(f"There is no directory {folder}.", url=self.path) from None
        return fd

    def complete(self, fd: int) -> None:
        if self.object.modified is not None:
            os.utime(fd, (self.object.modified, self.object.modified))
        os.fchmod(fd, self.mode)
        os.close(fd)
        os.replace(self._temporary, self.path)

    def abandon(self, fd: int) -> None:
        os.close(fd)
        os.unlink(self._temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
