"""Which file of a directory tree each key of a listing becomes. Pure.

Keys are arbitrary strings and paths are not; what can't be a path is refused by name, so that no key makes a file
outside of the tree and none is left out in silence.
"""

from __future__ import annotations

from dataclasses import dataclass

from flowfn_runtime.data.model import Listing, Object
from flowfn_runtime.data.spec import redact
from flowfn_runtime.errors import DataError

_NAME_BYTES = 255


@dataclass(frozen=True)
class Tree:
    """Directories (parents first) and files, both relative to the tree's root."""

    directories: tuple[str, ...]
    files: tuple[tuple[str, Object], ...]


def plan(listing: Listing) -> Tree:
    """The tree that a listing stands for.

    A key that ends in a slash and has no content is a directory, and so is an empty object whose key is also a prefix
    of others (both are how tools mark directories). Raises `DataError` naming the keys that can't be paths.
    """
    files: dict[str, Object] = {}
    directories: dict[str, None] = {}
    bad: list[str] = []
    base = len(listing.base)
    for object in listing.objects:
        path = object.key[base:]
        if not path and not object.size:
            continue  # the marker of the prefix itself
        marker = path.endswith("/") and not object.size
        if marker:
            path = path[:-1]
        if not _is_path(path):
            bad.append(object.key)
            continue
        if marker:
            directories[path] = None
        else:
            files[path] = object
    if bad:
        raise DataError(
            f"{redact(listing.url)} has {_count(len(bad), 'key')} that can't be file names: {_some(bad)}.",
            url=redact(listing.url),
            hint="Empty, '.' and '..' between slashes, a slash at the end and names over 255 bytes have no place in a "
            "directory: choose a prefix without them, or read such objects with flow.File(url).open().",
        )
    for path in [*files, *directories]:
        while (path := path.rpartition("/")[0]) and path not in directories:
            directories[path] = None
    both = [path for path in directories if path in files]
    if clash := [listing.base + path for path in both if files[path].size]:
        raise DataError(
            f"{redact(listing.url)} has {_count(len(clash), 'key')} that are objects and prefixes of others at once: "
            f"{_some(clash)}.",
            url=redact(listing.url),
            hint="A directory can't hold a file and a directory of one name: mount the prefix below it, or rename.",
        )
    for path in both:
        del files[path]
    return Tree(tuple(sorted(directories)), tuple(files.items()))


def _is_path(path: str) -> bool:
    if not path or "\0" in path:
        return False
    short = path.isascii() and len(path) <= _NAME_BYTES
    if short and "//" not in path and "/." not in path and path[0] not in "/." and path[-1] != "/":
        return True  # nearly every key: spare it the rest
    try:
        return all(name not in ("", ".", "..") and len(name.encode()) <= _NAME_BYTES for name in path.split("/"))
    except UnicodeEncodeError:
        return False


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _some(keys: list[str]) -> str:
    return ", ".join(repr(key) for key in keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
