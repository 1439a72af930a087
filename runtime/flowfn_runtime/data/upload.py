"""Write local files to a URL: many at once, large ones in parts side by side. Nothing appears that is not whole."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flowfn_runtime.data import access
from flowfn_runtime.data.endpoint import FileSlice, WireError
from flowfn_runtime.data.newfile import NewFile, new_mode
from flowfn_runtime.data.retry import Patience
from flowfn_runtime.data.sources import S3Source, open_source
from flowfn_runtime.data.spec import redact, scheme_of
from flowfn_runtime.data.tally import Tally, Tell
from flowfn_runtime.errors import DataError, DataNotFound

if TYPE_CHECKING:
    from concurrent.futures import Future

_WHOLE_BYTES = 16 << 20
_PART_BYTES = 16 << 20
_MOST_PARTS = 10_000  # S3's own limit
_THREADS = 8
# How long a server may take to hear that an upload in parts is given up.
_FAREWELL_S = 3


def upload(
    path: str,
    url: str,
    *,
    options: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    progress: Tell | None = None,
) -> int:
    """Write the file `path` to `url`, or all files below the directory `path` to names below `url`; the bytes written.

    `url` names the object itself (for a directory: the prefix). Symbolic links are followed. Raises `DataError`s.
    """
    files = _files(path)
    target = url.rstrip("/") if os.path.isdir(path) else url
    pairs = [(file, f"{target}/{name}" if name else target) for file, name in files]
    total = sum(os.stat(file).st_size for file, _ in pairs)
    tally = Tally(redact(url), total, len(pairs), progress)
    if scheme_of(url) in ("file", "volume"):
        _copy_here(pairs, tally)
    elif isinstance(source := open_source(url, options, env), S3Source):
        try:
            keys = [(file, address.partition("://")[2].partition("/")[2]) for file, address in pairs]
            if any(not key or key.endswith("/") for _, key in keys):
                raise DataError(f"{url} names no object.", url=url, hint="Write the name too: s3://bucket/name.")
            _S3Upload(source, tally).run(keys)
        finally:
            source.close()
    else:
        filesystem, _ = access.filesystem(url, options)
        for file, address in pairs:
            with access.explained(address):
                name = filesystem._strip_protocol(address)
                filesystem.makedirs(filesystem._parent(name), exist_ok=True)
                filesystem.put_file(file, name)
            tally.add(os.stat(file).st_size, 1)
    tally.finish()
    return total


def _copy_here(pairs: Sequence[tuple[str, str]], tally: Tally) -> None:
    """To a filesystem or volume of this machine."""
    mode = new_mode()
    for file, address in pairs:
        with access.explained(address):
            path = access.local_path(address, create=True)
            assert path is not None
            if os.path.isdir(path) and len(pairs) == 1:
                path = os.path.join(path, os.path.basename(file))
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
            new = NewFile(path)
            try:
                with open(file, "rb") as source, open(new.fd, "wb", closefd=False) as target:
                    shutil.copyfileobj(source, target, _WHOLE_BYTES)
                status = os.stat(file)
                os.fchmod(new.fd, mode | (status.st_mode & mode >> 2 & 0o111))
                os.utime(new.fd, ns=(status.st_atime_ns, status.st_mtime_ns))
                new.commit()
            finally:
                new.drop()
        tally.add(status.st_size, 1)


def _files(path: str) -> list[tuple[str, str]]:
    """The files to upload, each with its name below the target ("" for a single file)."""
    if not os.path.exists(path):
        raise DataNotFound(f"There is no {path} here.", url=path)
    if not os.path.isdir(path):
        return [(path, "")]
    found = []
    for folder, _, names in os.walk(path, followlinks=True):
        below = os.path.relpath(folder, path).replace(os.sep, "/")
        prefix = "" if below == "." else below + "/"
        found += [(os.path.join(folder, name), prefix + name) for name in names]
    return sorted(found)


class _S3Upload:
    """Several threads work through the files, and through the parts of those that have parts."""

    def __init__(self, source: S3Source, tally: Tally) -> None:
        self.client = source.client
        self.tally = tally
        self.patience = Patience(source.url)

    def run(self, files: Sequence[tuple[str, str]]) -> None:
        from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

        sizes = [os.stat(file).st_size for file, _ in files]
        # Handed out one by one by the iterator itself: thousands of futures would cost as much as the requests.
        small = iter([(*pair, size) for pair, size in zip(files, sizes, strict=True) if size <= _WHOLE_BYTES])

        def put_small() -> None:
            for file, key, size in small:
                if self.patience.stopped.is_set():
                    return
                self._put(file, key, size)

        with ThreadPoolExecutor(_THREADS, thread_name_prefix="flowfn-upload") as pool:
            work = [pool.submit(put_small) for _ in range(min(_THREADS, len(files)))]
            try:
                for (file, key), size in zip(files, sizes, strict=True):
                    if size > _WHOLE_BYTES:
                        self._put_parts(pool, file, key)
                for future in wait(work, return_when=FIRST_EXCEPTION).done:
                    future.result()
            except BaseException:
                self._stop(work)
                raise

    def _stop(self, work: Sequence[Future[Any]]) -> None:
        """End what is under way: now, and not when the server answers."""
        from concurrent.futures import wait

        self.patience.stopped.set()
        for future in work:
            future.cancel()
        while wait(work, timeout=0.1).not_done:
            self.client.interrupt()  # and again, since one may just have been connecting

    def _put(self, file: str, key: str, size: int) -> None:
        content = _content(file, size)
        digest = hashlib.md5(content, usedforsecurity=False).digest()
        self.patience.attempt(lambda: self.client.put(key, content, md5=digest))
        self.tally.add(len(content), 1)

    def _put_parts(self, pool: Any, file: str, key: str) -> None:
        with open(file, "rb", buffering=0) as opened:
            size = os.fstat(opened.fileno()).st_size
            part = max(_PART_BYTES, -(-size // _MOST_PARTS))
            upload = self.patience.attempt(lambda: self.client.start_multipart(key))

            def put(number: int) -> str:
                start = (number - 1) * part
                body = FileSlice(opened.fileno(), start, min(part, size - start))
                etag = self.patience.attempt(lambda: self.client.put_part(key, upload, number, body))
                self.tally.add(len(body), 0)
                return etag

            futures = [pool.submit(put, number) for number in range(1, -(-size // part) + 1)]
            try:
                etags = [future.result() for future in futures]
                self.patience.attempt(lambda: self.client.complete_multipart(key, upload, etags))
            except BaseException:
                self._stop(futures)
                # What went wrong is not to wait for the server, nor to be hidden by what it says to this.
                farewell = threading.Thread(target=self._give_up, args=(key, upload), daemon=True)
                farewell.start()
                farewell.join(_FAREWELL_S)
                raise
            self.tally.add(0, 1)

    def _give_up(self, key: str, upload: str) -> None:
        try:
            self.client.abort_multipart(key, upload)
        except (OSError, WireError):
            pass  # the bucket's lifecycle rules drop parts that nobody came back for


def _content(file: str, size: int) -> bytes:
    """The bytes of a file that is expected to have `size`: in few calls, after each of which a thread has to wait for
    the interpreter."""
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        pieces = [os.read(fd, size + 1)]
        if len(pieces[0]) != size:  # a read that stopped early, or a file that was written to meanwhile
            while piece := os.read(fd, _WHOLE_BYTES):
                pieces.append(piece)
        return b"".join(pieces)
    finally:
        os.close(fd)
