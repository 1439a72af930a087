"""Look at data and copy it: what `flow data` does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import Any

from flowfn_runtime.data import access, transfer
from flowfn_runtime.data.model import Listing, Object, Progress
from flowfn_runtime.data.newfile import NewFile, new_mode
from flowfn_runtime.data.retry import Patience
from flowfn_runtime.data.sources import S3Source, Source, open_source
from flowfn_runtime.data.spec import is_url, scheme_of
from flowfn_runtime.data.tree import plan
from flowfn_runtime.data.upload import upload
from flowfn_runtime.errors import DataError, ValidationError

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


def copy(
    source_url: str, target_url: str, *, options: Callable[[str], Mapping[str, Any]], progress: Tell | None = None
) -> int:
    """Copy a file or directory to another place, at most one of them a path of this machine; the bytes copied.

    `options`: the storage options of a URL. Between two stores the data goes by way of the host's cache.
    """
    if not source_url or not target_url or not (is_url(source_url) or is_url(target_url)):
        raise ValidationError("Neither of the two is a URL.", hint="For local copies there is cp.")
    name = os.path.basename(source_url.rstrip("/"))
    path = access.local_path(source_url)
    if path is not None:
        if not os.path.isdir(path):
            target_url += name if target_url.endswith("/") else ""
        elif not any(names for *_, names in os.walk(path, followlinks=True)):
            raise DataError(f"There are no files in {source_url}.", url=source_url)
        return upload(path, target_url, options=options(target_url), progress=progress)
    with closing(open_source(source_url, options(source_url))) as source:
        if scheme_of(target_url) == "file":
            return download(source, target_url.removeprefix("file://"), progress=progress)
        from flowfn_runtime.data.cache import Cache

        with Cache().stage(source, progress=progress) as staged:
            target_url += name if target_url.endswith("/") and staged.single else ""
            return upload(staged.path, target_url, options=options(target_url), progress=progress)


def download(source: Source, path: str, *, progress: Tell | None = None) -> int:
    """Fetch what `source` stands for to `path`: one object as that file (or into it, if it is a directory or ends in a
    slash), a prefix as that directory. Files appear when they are whole. Returns the bytes fetched."""
    listing = source.listing()
    tree = plan(listing)
    with access.explained(path):
        if listing.single:
            ((name, object),) = tree.files
            if path.endswith("/"):
                os.makedirs(path, exist_ok=True)
            targets = [(os.path.join(path, name) if os.path.isdir(path) else path, object)]
        else:
            if os.path.lexists(path) and not os.path.isdir(path):
                raise DataError(f"{path} is a file, and {listing.url} a directory.", url=path)
            for folder in ("", *tree.directories):
                os.makedirs(os.path.join(path, folder), exist_ok=True)
            targets = [(os.path.join(path, name), object) for name, object in tree.files]
        mode = new_mode()
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
        self._file: NewFile | None = None

    def begin(self) -> int | None:
        self._file = NewFile(self.path)
        return self._file.fd

    def complete(self, fd: int) -> None:
        assert self._file is not None
        try:
            if self.object.modified is not None:
                os.utime(fd, (self.object.modified, self.object.modified))
            os.fchmod(fd, self.mode)
            self._file.commit()
        finally:
            self._file.drop()

    def abandon(self, fd: int) -> None:
        assert self._file is not None
        self._file.drop()
