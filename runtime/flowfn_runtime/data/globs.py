"""`files`: what matches a glob at any URL, listed as it is consumed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from typing import Any

from ..errors import DataNotFound
from . import access
from .access import Info
from .references import File
from .spec import redact, scheme_of

_MAGIC = re.compile(r"[*?\[]")


def files(url: str, *, storage_options: Mapping[str, Any] | None = None) -> Iterator[File]:
    """The files that match `url`, one after another in order of their names, listed while they are consumed.

    In `url`, `*` and `?` stand for characters of one name, `[abc]` for one of them, `**` for any number of directories.
    A URL without them is a file, or everything below it if it ends with `/`. Each file is pinned to the version that
    the listing shows. Raises `DataNotFound` at the end if nothing matched.
    """
    url = access.normal_url(os.fspath(url))
    base, pattern = split(url)
    found = False
    if not pattern:
        yield File(url, storage_options=storage_options)
        return
    matches = translate(pattern).fullmatch
    for relative, info in _below(base, pattern, storage_options):
        if matches(relative):
            found = True
            yield File._of(info.url, storage_options, pin=info)
    if not found:
        raise DataNotFound(
            f"nothing matches {redact(url)}", url=redact(url), hint="check the pattern and its directory"
        )


def split(url: str) -> tuple[str, str]:
    """The directory below which a glob's matches lie, ending with a slash, and the pattern of their paths in it."""
    if url.endswith("/"):
        return url, "**"
    scheme, separator, rest = url.partition("://") if "://" in url else ("", "", url)
    magic = _MAGIC.search(rest)
    # In a URL of the web, a question mark begins the query.
    if magic is None or scheme in ("http", "https"):
        return url, ""
    cut = rest.rfind("/", 0, magic.start()) + 1
    return scheme + separator + rest[:cut], rest[cut:]


def translate(pattern: str) -> re.Pattern[str]:
    """The regular expression of a glob."""
    out = ""
    position = 0
    while position < len(pattern):
        rest = pattern[position:]
        if rest.startswith("**/") and (not out or out.endswith("/")):
            out += "(?:.*/)?"
            position += 3
        elif rest.startswith("**"):
            out += ".*"
            position += 2
        elif rest[0] == "*":
            out += "[^/]*"
            position += 1
        elif rest[0] == "?":
            out += "[^/]"
            position += 1
        elif rest[0] == "[" and (end := rest.find("]", 2)) > 0:
            inner = rest[1:end].replace("\\", "\\\\")
            inner = "^" + inner[1:] if inner[0] == "!" else "\\" + inner if inner[0] == "^" else inner
            out += f"(?!/)[{inner}]"
            position += end + 1
        else:
            out += re.escape(rest[0])
            position += 1
    return re.compile(out, re.DOTALL)


def _below(base: str, pattern: str, options: Mapping[str, Any] | None) -> Iterator[tuple[str, Info]]:
    """Files below a directory, by their paths in it: all that match, and more where that costs nothing."""
    with access.explained(base):
        if (local := access.local_path(base)) is not None:
            yield from _walk(base, local, "", pattern.split("/"))
            return
        source = access.source(base, options)
        if scheme_of(base) in ("s3", "s3a"):
            magic = _MAGIC.search(pattern)
            listed = _pages(source, pattern[: magic.start()] if magic else "", deep="/" in pattern or "**" in pattern)
            prefix = base.partition("://")[2].partition("/")[2]
        else:
            listing = source.listing()
            listed, prefix = iter(listing.objects), listing.base
        for found in listed:
            relative = found.key[len(prefix) :]
            if relative and not relative.endswith("/"):
                yield relative, access.info_of(source.object_url(found.key), found)


def _pages(source: Any, beginning: str, *, deep: bool) -> Iterator[Any]:
    from .retry import Patience

    patience = Patience(source.url)
    token: str | None = None
    while True:
        page = patience.attempt(
            lambda: source.client.page(source.key + beginning, token=token, delimiter=None if deep else "/")  # noqa: B023
        )
        yield from page.objects
        token = page.token
        if token is None:
            return


def _walk(base: str, folder: str, prefix: str, levels: list[str]) -> Iterator[tuple[str, Info]]:
    """`levels` are the names still to be matched; from `**` on, any. Only named levels lead through symbolic links."""
    anywhere = "**" in levels[0]
    matches = translate(levels[0]).fullmatch
    try:
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name + ("/" if entry.is_dir() else ""))
    except FileNotFoundError:
        return
    for entry in listed:
        relative = prefix + entry.name
        if entry.is_dir(follow_symlinks=not anywhere):
            if anywhere:
                yield from _walk(base, entry.path, relative + "/", levels)
            elif len(levels) > 1 and matches(entry.name):
                yield from _walk(base, entry.path, relative + "/", levels[1:])
        elif entry.is_file():
            stat = entry.stat()
            modified = datetime.fromtimestamp(stat.st_mtime, tz=timezone.utc)
            etag = access.local_etag(stat)
            yield relative, Info(access.join(base, relative), False, stat.st_size, etag, None, modified)
