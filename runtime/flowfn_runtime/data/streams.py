"""Reading and writing at a URL as a stream, checked against the version that is meant."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any

from ..errors import ValidationError
from . import access
from .access import Info, Options
from .endpoint import WireError
from .retry import Patience
from .spec import redact, scheme_of

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

    from .model import Object
    from .sources import Source

FIRST_BLOCK_BYTES = 256 << 10  # who reads a header and stops pays for no more than this
LARGEST_BLOCK_BYTES = 16 << 20

Check = Callable[[Info], None]


def open_stream(
    url: str,
    options: Options,
    mode: str = "rb",
    *,
    check: Check | None = None,
    compression: str | None = None,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
    block_size: int = LARGEST_BLOCK_BYTES,
) -> IO[Any]:
    """Open `url` for reading or writing. `check` is told the version that is there before anything is read."""
    kind = mode.replace("b", "").replace("t", "")
    if kind not in ("r", "w", "x", "a"):
        raise ValidationError(f"mode={mode!r}: a stream is opened to read (r), write (w, x) or append (a)")
    with access.explained(url):
        raw: Any
        if kind == "r":
            raw = open_bytes(url, options, check=check, block_size=block_size)
        else:
            fs, path = access.filesystem(url, options)
            if scheme_of(url) == "file":
                os.makedirs(os.path.dirname(path), exist_ok=True)
            raw = fs.open(path, kind + "b")
        if compression is not None:
            raw = decompressed(raw, url, compression, kind)
        if "b" in mode:
            return raw  # type: ignore[no-any-return]
        return io.TextIOWrapper(raw, encoding=encoding, errors=errors, newline=newline)


def open_bytes(
    url: str, options: Options, *, check: Check | None = None, block_size: int = LARGEST_BLOCK_BYTES
) -> io.BufferedReader:
    """The bytes at `url` as a binary stream that can seek.

    One version is read to the end, or `DataChanged` is raised on the way.
    """
    with access.explained(url):
        if (local := access.local_path(url)) is not None:
            if check is not None:
                check(access.look(url))
            return open(local, "rb")
        source = access.source(url, options)
        found = source.stat()
        if check is not None:
            check(access.info_of(url, found))
        return io.BufferedReader(RangeReader(source, found, block_size), FIRST_BLOCK_BYTES)


def decompressed(raw: Any, url: str, compression: str, kind: str = "r") -> Any:
    """`raw` through fsspec's codec of that name; "infer" goes by the URL's suffix."""
    from fsspec.compression import compr
    from fsspec.utils import infer_compression

    name = infer_compression(url.partition("?")[0]) if compression == "infer" else compression
    if name is None:
        return raw
    codecs: Any = compr
    codec = codecs.get(name) or _zstd(name)
    if codec is None:
        hint = "pip install zstandard" if name == "zstd" else f"known here: {', '.join(sorted(filter(None, compr)))}"
        raise ValidationError(f"no codec for compression={name!r} is installed ({redact(url)})", hint=hint)
    layered = _Layered(codec(raw, mode=kind + "b"), raw)
    return io.BufferedReader(layered, FIRST_BLOCK_BYTES) if kind == "r" else io.BufferedWriter(layered)


def _zstd(name: str) -> Any:
    if name != "zstd":
        return None
    try:
        from compression import zstd  # type: ignore[import-not-found, unused-ignore]  # Python 3.14

        return zstd.ZstdFile
    except ImportError:
        pass
    try:
        import zstandard  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return None
    return lambda raw, mode: zstandard.open(raw, mode, closefd=True)


class _Layered(io.RawIOBase):
    """A codec's stream, which closes the stream below it too."""

    def __init__(self, codec: Any, below: Any) -> None:
        self._codec, self._below = codec, below

    def readable(self) -> bool:
        return bool(self._codec.readable())

    def writable(self) -> bool:
        return bool(self._codec.writable())

    def seekable(self) -> bool:
        return bool(self._codec.seekable())

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        piece = self._codec.read(len(view))
        view[: len(piece)] = piece
        return len(piece)

    def write(self, data: Any) -> int:
        count: int = self._codec.write(data)
        return count

    def seek(self, offset: int, whence: int = 0) -> int:
        at: int = self._codec.seek(offset, whence)
        return at

    def tell(self) -> int:
        at: int = self._codec.tell()
        return at

    def close(self) -> None:
        if self.closed:
            return
        try:
            self._codec.close()
        finally:
            self._below.close()
            super().close()


class Window(io.RawIOBase):
    """A part of a stream that can seek, from `start` to `end` (exclusive), as a file of its own; it owns the stream."""

    def __init__(self, whole: Any, start: int, end: int) -> None:
        self._whole = whole
        self._start, self._end = start, end
        whole.seek(start)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count: int = self._whole.readinto(view[: max(self._end - self._whole.tell(), 0)])
        return count

    def seek(self, offset: int, whence: int = 0) -> int:
        base = (self._start, self._whole.tell(), self._end)[whence]
        self._whole.seek(max(base + offset, self._start))
        return self.tell()

    def tell(self) -> int:
        at: int = self._whole.tell()
        return at - self._start

    def close(self) -> None:
        self._whole.close()
        super().close()


class RangeReader(io.RawIOBase):
    """A remote object as a file: blocks are fetched when they are read.

    Who reads on gets larger and larger blocks, the next one while the last is consumed; who jumps begins again with
    small ones.
    """

    def __init__(self, source: Source, found: Object, largest: int) -> None:
        self._source = source
        self._found = found
        self._end = found.size  # None: the server doesn't say
        self._position = 0
        self._block = bytearray()
        self._block_at = 0
        self._next = FIRST_BLOCK_BYTES
        self._largest = largest
        self._patience = Patience(source.url)
        self._threads: ThreadPoolExecutor | None = None
        self._ahead: tuple[int, Future[bytearray]] | None = None  # where the block begins that is on its way

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence == 2 and self._end is None:
            raise io.UnsupportedOperation(f"the size of {redact(self._source.url)} is not known")
        base = (0, self._position, self._end)[whence]
        self._position = max((base or 0) + offset, 0)
        return self.tell()

    def tell(self) -> int:
        return self._position

    def expect(self, size: int) -> None:
        """Say that so many bytes will be read from here on."""
        self._next = max(min(size, self._largest), FIRST_BLOCK_BYTES)

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        if not view or (self._end is not None and self._position >= self._end):
            return 0
        offset = self._position - self._block_at
        if not 0 <= offset < len(self._block):
            self._advance(len(view))
            offset = 0
        piece = memoryview(self._block)[offset : offset + len(view)]
        view[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    def readall(self) -> bytes:
        pieces = bytearray()
        while self._end is None or self._position < self._end:
            left = self._largest if self._end is None else min(self._end - self._position, self._largest)
            buffer = bytearray(left)
            if not (count := self.readinto(buffer)):
                break
            pieces += memoryview(buffer)[:count]
        return bytes(pieces)

    def close(self) -> None:
        if self._threads is not None:
            self._patience.stopped.set()
            self._threads.shutdown(cancel_futures=True)
            self._threads = None
        self._block = bytearray()
        super().close()

    def _advance(self, wanted: int) -> None:
        """Make the block the one that begins at the position."""
        position, ahead = self._position, self._ahead
        goes_on = position == self._block_at + len(self._block)
        self._ahead = None
        if ahead is not None and ahead[0] == position:
            block = ahead[1].result()
        else:
            if not goes_on:
                self._next = FIRST_BLOCK_BYTES
            block = self._fetch(position, max(self._next, wanted))
        self._block, self._block_at = block, position
        self._next = min(4 * self._next, self._largest)
        after = position + len(block)
        if goes_on and block and self._end is not None and after < self._end:
            if self._threads is None:
                from concurrent.futures import ThreadPoolExecutor

                self._threads = ThreadPoolExecutor(1, thread_name_prefix="flowfn-read-ahead")
            self._ahead = after, self._threads.submit(self._fetch, after, self._next)

    def _fetch(self, first: int, size: int) -> bytearray:
        last = None if self._end is None else min(first + size, self._end) - 1
        block = bytearray()

        def attempt() -> None:
            block.clear()
            self._source.fetch(self._found, first, last, block.extend)
            if last is not None and len(block) != last + 1 - first:
                raise WireError(f"{len(block)} of {last + 1 - first} bytes came")

        self._patience.attempt(attempt)
        if last is None:
            self._end = first + len(block)  # the rest came, so now we know
        return block
