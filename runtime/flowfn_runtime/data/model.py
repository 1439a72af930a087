"""The nouns of moving data: an object of a store, a listing of them, progress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple


class Object(NamedTuple):
    """One object as its store describes it."""

    key: str  # the store's own name for it, exactly
    size: int | None = None  # bytes; None: the server doesn't say
    etag: str | None = None  # without quotes
    version: str | None = None
    modified: float | None = None  # seconds since 1970, UTC

    @property
    def stamp(self) -> str:
        """What changes when the content does, as far as the store tells."""
        if self.etag or self.version:
            return f"{self.etag or ''} {self.version or ''} {self.size}"
        return f"{self.modified} {self.size}"

    @property
    def md5(self) -> str | None:
        """The content's MD5 in hex if the ETag has the form of one (that of a multipart upload has not)."""
        etag = self.etag
        return etag if etag is not None and len(etag) == 32 and not etag.strip("0123456789abcdef") else None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return self._asdict()


@dataclass(frozen=True)
class Listing:
    """What a URL stood for at one moment: either one object (`single`), or everything below a prefix.

    `objects` are sorted by key; `base` is the part of their keys that the URL stands for, so `key[len(base):]` is an
    object's path below it. Listings of one URL with the same `mark` are the same; None: who knows.
    """

    url: str
    base: str
    single: bool
    objects: Sequence[Object]
    mark: str | None = None

    @property
    def size(self) -> int:
        """Bytes altogether, as far as the store tells."""
        return sum(object.size or 0 for object in self.objects)


@dataclass(frozen=True)
class Progress:
    """How far a transfer is. Totals are None while they are unknown."""

    url: str
    done_bytes: int
    total_bytes: int | None
    done_objects: int
    total_objects: int | None


def parse_time(text: str | None) -> float | None:
    """Seconds since 1970 of an ISO 8601 time in UTC or an HTTP date; None if it is neither."""
    if not text:
        return None
    try:
        if text[4:5] == "-":
            # Python 3.10 takes neither a Z nor any number of digits after the point.
            fraction = text[19:].rstrip("Z")
            whole = datetime.fromisoformat(text[:19] + "+00:00").timestamp()
            return whole + (float("0" + fraction) if fraction.startswith(".") else 0.0)
        from email.utils import parsedate_to_datetime

        return parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError):
        return None
