"""`partitions`: parts of files whose records are whole, as the inputs of a map.

Nothing is read to make the parts of a text file: they are plain byte ranges, and where the records in one begin and end
is found out by who reads it. A record belongs to the part in which it begins.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import IO, Any

from ..errors import DataChanged, DataError, ValidationError
from . import access, streams
from .access import Info
from .globs import files
from .references import File
from .spec import redact

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}
_PACKED = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2", ".xz": "xz"}
_SCAN_BYTES = 64 << 10


@dataclass(frozen=True)
class Partition:
    """A part of a file: whole records, which are read when it is opened. Picklable; nothing is staged for it."""

    url: str
    start: int  # bytes; where it begins nominally: its first record begins there or after
    end: int | None  # bytes, exclusive; None: to the end
    boundary: bytes | None = b"\n"  # what ends a record; None: exactly these bytes
    compression: str | None = None  # of the whole file, by fsspec's name; undone on opening
    row_groups: tuple[int, int] | None = None  # of a Parquet file: first and last (exclusive)
    storage_options: Mapping[str, Any] | None = field(default=None, repr=False, hash=False)
    pin: Info | None = field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        rows = f", row groups {self.row_groups[0]}-{self.row_groups[1] - 1}" if self.row_groups else ""
        return f"Partition({redact(self.url)!r}, {self.start}-{'' if self.end is None else self.end}{rows})"

    def __reduce__(self) -> Any:
        state = dict(self.__dict__)
        state["storage_options"] = access.effective(self.url, self.storage_options) or None
        return _rebuild, (state,)

    @property
    def file(self) -> File:
        """The whole file."""
        return File._of(self.url, self.storage_options, pin=self.pin)

    def open(self, mode: str = "rb", *, encoding: str | None = None, newline: str | None = None) -> IO[Any]:
        """The part's bytes (decompressed, if the file is compressed) as a stream; `mode` is "rb" or "rt".

        Raises `DataChanged` if the file is not the one that was listed.
        """
        if mode not in ("r", "rb", "rt"):
            raise ValidationError(f"mode={mode!r}: a partition is opened with 'rb' or 'rt'")
        if self.row_groups is not None:
            raise DataError(f"{self!r} is not made of bytes", url=redact(self.url), hint="read it with .table()")
        with access.explained(self.url):
            raw: Any = streams.open_bytes(self.url, self.storage_options, check=self._check)
            if self.compression is not None:
                raw = streams.decompressed(raw, self.url, self.compression)
            elif (self.start, self.end) != (0, None):
                raw = self._cut(raw)
            return raw if mode == "rb" else io.TextIOWrapper(raw, encoding=encoding, newline=newline)

    def read(self) -> bytes:
        """All its bytes."""
        with self.open() as stream:
            data: bytes = stream.read()
            return data

    def __iter__(self) -> Iterator[bytes]:
        """Its records, each with the boundary at its end, as a file's lines are."""
        with self.open() as stream:
            if self.boundary in (b"\n", None):
                yield from stream
            else:
                yield from _records(stream, self.boundary or b"\n")

    def table(self, columns: list[str] | None = None) -> Any:
        """The row groups of a Parquet file as a `pyarrow.Table`; `columns` limits what is read."""
        if self.row_groups is None:
            raise DataError(f"{self!r} is not of a Parquet file", url=redact(self.url))
        with access.explained(self.url), self._whole() as stream:
            return _parquet(stream, self.url).read_row_groups(list(range(*self.row_groups)), columns=columns)

    def _whole(self) -> IO[Any]:
        return streams.open_stream(self.url, self.storage_options, check=self._check)

    def _check(self, now: Info) -> None:
        if self.pin is not None and (difference := self.pin.difference(now)):
            raise DataChanged(f"{redact(self.url)} is not what it was when it was listed: {difference}", url=self.url)

    def _cut(self, whole: Any) -> Any:
        size: int = whole.seek(0, 2)
        end = size if self.end is None else min(self.end, size)
        start = self.start
        if self.boundary is not None:
            # The beginning last: what was fetched to find it is read first.
            end = align(whole, end, size, self.boundary)
            start = align(whole, start, size, self.boundary)
        if isinstance(getattr(whole, "raw", None), streams.RangeReader):
            whole.raw.expect(max(end - start, 0))
        return io.BufferedReader(streams.Window(whole, start, max(start, end)), streams.FIRST_BLOCK_BYTES)


def _rebuild(state: dict[str, Any]) -> Partition:
    return Partition(**state)


def align(stream: Any, position: int, size: int, boundary: bytes) -> int:
    """The first place at or after `position` where a record may begin: after a boundary, or an end of the file."""
    if position <= 0 or position >= size:
        return min(max(position, 0), size)
    at = max(position - len(boundary), 0)
    stream.seek(at)
    kept = b""
    while piece := stream.read(_SCAN_BYTES):
        window = kept + piece
        found: int = window.find(boundary)
        if found >= 0:
            return at + found + len(boundary)
        kept = window[len(window) - len(boundary) + 1 :] if len(boundary) > 1 else b""
        at += len(window) - len(kept)
    return size


def _records(stream: IO[bytes], boundary: bytes) -> Iterator[bytes]:
    kept = b""
    while piece := stream.read(1 << 20):
        *whole, kept = (kept + piece).split(boundary)
        for record in whole:
            yield record + boundary
    if kept:
        yield kept


def partitions(
    url: str | os.PathLike[str],
    *,
    size: int | str = "64MiB",
    boundary: bytes | None = b"\n",
    storage_options: Mapping[str, Any] | None = None,
) -> Iterator[Partition]:
    """Parts of about `size` of the file at `url`, or of all files that match it as a glob (see `files`).

    - Text, and whatever has records that end with `boundary`: parts hold whole records. With `boundary=None` they are
      exactly `size` bytes, as for records of a fixed length.
    - Parquet (`.parquet`): row groups, read with `part.table()`. Needs pyarrow.
    - Compressed files (`.gz`, `.zst`, `.bz2`, `.xz`): each is one part, decompressed when it is opened.

    `size` is in bytes, or text such as `"64MiB"`. Parts come while the listing goes on, in order; together they are
    every byte (or row group) exactly once.
    """
    step = parse_size(size)
    if boundary is not None and not boundary:
        raise ValidationError("boundary=b'' ends no record", hint="boundary=None makes parts of exactly `size` bytes")
    return _parts(os.fspath(url), step, boundary, storage_options)


def _parts(
    url: str, step: int, boundary: bytes | None, storage_options: Mapping[str, Any] | None
) -> Iterator[Partition]:
    for found in files(url, storage_options=storage_options):
        found._see()
        pin = found._pin if found._pin is not None else found.info()
        whole = Partition(found.url, 0, None, boundary, None, None, storage_options, pin)
        suffix = os.path.splitext(found.name)[1].lower()
        if suffix == ".parquet":
            yield from _row_groups(whole, step)
        elif suffix in _PACKED:
            yield replace(whole, compression=_PACKED[suffix])
        elif pin.size_bytes is None or pin.size_bytes <= step:
            if pin.size_bytes != 0:
                yield whole
        else:
            for start in range(0, pin.size_bytes, step):
                end = start + step
                yield replace(whole, start=start, end=end if end < pin.size_bytes else None)


def _row_groups(whole: Partition, step: int) -> Iterator[Partition]:
    with access.explained(whole.url), whole._whole() as stream:
        metadata = _parquet(stream, whole.url).metadata
        sizes = []
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            sizes.append(sum(group.column(c).total_compressed_size for c in range(group.num_columns)))
    first, held = 0, 0
    for number, group_bytes in enumerate(sizes):
        if number > first and held + group_bytes > step:
            yield replace(whole, row_groups=(first, number))
            first, held = number, 0
        held += group_bytes
    if first < len(sizes):
        yield replace(whole, row_groups=(first, len(sizes)))


def _parquet(stream: Any, url: str) -> Any:
    try:
        from pyarrow import parquet
    except ImportError:
        raise DataError(
            f"reading the row groups of {redact(url)} needs pyarrow", url=redact(url), hint="pip install pyarrow"
        ) from None
    return parquet.ParquetFile(stream)


def parse_size(size: int | str) -> int:
    """Bytes of 67108864 or "64MiB". Raises `ValidationError`."""
    if isinstance(size, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?)b?\s*", size, re.IGNORECASE)):
        number = int(float(match[1]) * _UNITS.get(match[2].lower(), 0))
    else:
        number = size if isinstance(size, int) and not isinstance(size, bool) else 0
    if number < 1:
        raise ValidationError(f"size={size!r}", hint='give a number of bytes, or a text such as "64MiB" or "1GB"')
    return number
