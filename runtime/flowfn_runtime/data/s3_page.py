"""What S3 answers to a listing: pages of XML, taken apart only as far as somebody looks at them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, overload
from urllib.parse import unquote_plus

from flowfn_runtime.data.model import Object, parse_time

_PREFIXES = re.compile(r"<CommonPrefixes>(.*?)</CommonPrefixes>", re.DOTALL)
# An entry, and what most servers begin it with.
_ENTRY = re.compile(
    r"<Contents>(\s*(?:<Key>([^<]*)</Key>\s*<LastModified>([^<]*)</LastModified>\s*"
    r"<ETag>(?:&quot;|&#34;|\")?([^<&\"]*)(?:&quot;|&#34;|\")?</ETag>\s*(?:<Checksum\w+>[^<]*</Checksum\w+>\s*)*"
    r"<Size>(\d+)</Size>)?.*?)</Contents>",
    re.DOTALL,
)


class Page:
    """One page of keys in order. `token` is that of the next page, None at the end."""

    def __init__(self, body: bytes) -> None:
        self._text = body.decode()
        self._start = self._text.find("<Contents>")
        self._end = self._text.rfind("</Contents>") + len("</Contents>") if self._start >= 0 else -1

    @cached_property
    def objects(self) -> list[Object]:
        decode = self._decode
        found = []
        for entry, key, modified, etag, size in _ENTRY.findall(self._text):
            if not key or "&" in key:  # in another order, or with what only `tag` understands
                key, size, etag = tag(entry, "Key"), tag(entry, "Size") or 0, tag(entry, "ETag")
                modified = tag(entry, "LastModified")
            found.append(Object(decode(key), int(size), etag.strip('"') or None, None, parse_time(modified)))
        return found

    @cached_property
    def token(self) -> str | None:
        around = self._around
        return (tag(around, "NextContinuationToken") or None) if tag(around, "IsTruncated") == "true" else None

    @cached_property
    def first(self) -> str | None:
        """The first key; None on an empty page."""
        return self._decode(tag(self._text[self._start : self._end], "Key")) if self._start >= 0 else None

    @cached_property
    def last(self) -> str | None:
        """The last key; None on an empty page."""
        if self._start < 0:
            return None
        return self._decode(tag(self._text[self._text.rindex("<Contents>", 0, self._end) : self._end], "Key"))

    @cached_property
    def mark(self) -> str | None:
        """Pages with the same mark list the same versions of the same keys. None: nothing is known."""
        return hashlib.sha256(self._text[self._start : self._end].encode()).hexdigest() if self._start >= 0 else ""

    @property
    def prefixes(self) -> list[str]:
        """Where keys were grouped: the prefixes."""
        return [self._decode(tag(entry.group(1), "Prefix")) for entry in _PREFIXES.finditer(self._text)]

    @cached_property
    def _around(self) -> str:
        return self._text if self._start < 0 else self._text[: self._start] + self._text[self._end :]

    @cached_property
    def _decode(self) -> Callable[[str], str]:
        return unquote_plus if tag(self._around, "EncodingType") == "url" else str

    def only(self, wanted: Callable[[str], bool]) -> Page:
        """The part of the page whose keys are wanted."""
        return _Part([object for object in self.objects if wanted(object.key)])


class _Part(Page):
    token = None
    mark = None

    def __init__(self, objects: list[Object]) -> None:
        self.objects = objects
        self.first = objects[0].key if objects else None
        self.last = objects[-1].key if objects else None


class Pages(Sequence[Object]):
    """The objects of several pages. They are made when somebody looks at one."""

    def __init__(self, pages: Sequence[Page]) -> None:
        self.pages = pages

    @cached_property
    def _objects(self) -> list[Object]:
        return [object for page in self.pages for object in page.objects]

    @property
    def mark(self) -> str | None:
        """See `Page.mark`."""
        marks = [page.mark for page in self.pages]
        return None if None in marks else hashlib.sha256("".join(map(str, marks)).encode()).hexdigest()

    def __bool__(self) -> bool:
        return any(page.first is not None for page in self.pages)

    def __len__(self) -> int:
        return len(self._objects)

    def __iter__(self) -> Iterator[Object]:
        return iter(self._objects)

    @overload
    def __getitem__(self, index: int) -> Object: ...
    @overload
    def __getitem__(self, index: slice) -> list[Object]: ...
    def __getitem__(self, index: Any) -> Any:
        return self._objects[index]


def tag(text: str, name: str) -> str:
    """What the first element of this name holds; "" if there is none."""
    start = text.find(f"<{name}>")
    end = text.find(f"</{name}>", start)
    content = text[start + len(name) + 2 : end] if 0 <= start < end else ""
    if "&" not in content:
        return content
    import html

    return html.unescape(content.replace("&quot;", '"'))
