"""A project's files as a snapshot: taken here, kept or sent under the digests of their contents, laid out there.

`snapshot(root)` says what the project is; nothing is copied yet. `keep` puts what is missing into a store of this
host; `pack` writes it as a stream for another host, leaving out what that one has, and `unpack` puts it into the store
there. `lay_out` makes a working directory of a snapshot in the store. What the project is: `projectwalk`.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from .errors import FlowError, ValidationError
from .projectwalk import walk

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator


LIMIT_BYTES = 256 * 2**20
LIMIT_FILES = 20_000
_CHUNK = 1 << 20


class Entry(NamedTuple):
    """A file, or symbolic link, of a project."""

    path: str  # relative to the root, with slashes
    digest: str  # SHA-256 of the content in hex; "" for a link
    size: int  # in bytes
    executable: bool = False
    link: str | None = None  # where a symbolic link points


class Snapshot(NamedTuple):
    """What a project's files were at one moment."""

    root: str  # where they were taken; not part of the digest
    digest: str  # of all paths, contents and modes: two equal trees have the same
    files: tuple[Entry, ...]

    def __repr__(self) -> str:
        return f"<Snapshot {self.digest[:12]} of {self.root}: {len(self.files)} files, {self.size_bytes} bytes>"

    @property
    def size_bytes(self) -> int:
        """The size of all contents."""
        return sum(entry.size for entry in self.files)

    def manifest(self) -> bytes:
        """The snapshot as bytes that `digest` is the SHA-256 of."""
        return _manifest(self.files)


def snapshot(
    root: str,
    *,
    limit_bytes: int = LIMIT_BYTES,
    limit_files: int = LIMIT_FILES,
    exclude: Collection[str] = (),
) -> Snapshot:
    """The project at `root`, without what is ignored and what lies below the absolute paths of `exclude`.

    Raises `ValidationError` if it is larger than the limits (bytes, number of files), naming what is largest, or if a
    file can't be read.
    """
    import hashlib

    root = os.path.abspath(root)
    entries: list[Entry] = []
    total = 0
    tops: dict[str, tuple[int, int]] = {}  # what lies at the top: bytes and files
    for path, status, link in walk(root, {os.path.abspath(name) for name in exclude}):
        size = 0 if link is not None else status.st_size
        total += size
        top = path.partition("/")[0]
        size_before, files_before = tops.get(top, (0, 0))
        tops[top] = size_before + size, files_before + 1
        if total > limit_bytes or len(entries) >= limit_files:
            raise _too_large(root, tops, total, limit_bytes, limit_files)
        digest = "" if link is not None else _digest(os.path.join(root, path))
        if digest is None:
            continue  # it was removed meanwhile, as editors do with files of theirs
        entries.append(Entry(path, digest, size, link is None and bool(status.st_mode & 0o100), link))
    entries.sort(key=lambda entry: entry.path)
    files = tuple(entries)
    return Snapshot(root, hashlib.sha256(_manifest(files)).hexdigest(), files)


def keep(taken: Snapshot, store: str) -> None:
    """Put into `store` what of the snapshot is not there yet. Many may do so at once."""
    manifest = os.path.join(store, "trees", taken.digest)
    if os.path.exists(manifest):
        try:
            os.utime(manifest)  # in use: what cleans up takes the oldest
        except OSError:
            pass  # a read-only home
        return
    for entry in taken.files:
        if entry.link is None and not os.path.exists(blob := _blob(store, entry.digest)):
            with open(os.path.join(taken.root, entry.path), "rb") as source:
                _put(blob, source, entry, taken.root)
    _write(manifest, taken.manifest())


@contextmanager
def guarded(store: str, *, cleaning: bool = False) -> Iterator[None]:
    """Held while something is kept and until it is known who needs it; with `cleaning`, while nobody else does that."""
    import fcntl

    try:
        os.makedirs(store, mode=0o700, exist_ok=True)
        fd = os.open(os.path.join(store, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _no_room(error, store) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if cleaning else fcntl.LOCK_SH)
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def clean(store: str, needed: Collection[str]) -> int:
    """Remove the snapshots that are not `needed`, and contents that no other has; returns the bytes that are free now.

    The caller holds `guarded(store, cleaning=True)`.
    """
    trees = os.path.join(store, "trees")
    used: set[str] = set()
    for digest in os.listdir(trees) if os.path.isdir(trees) else ():
        path = os.path.join(trees, digest)
        if digest in needed:
            with open(path, "rb") as file:
                used.update(entry.digest for entry in _entries(file.read()))
        else:
            os.unlink(path)
    freed = 0
    blobs = os.path.join(store, "blobs")
    for start in os.listdir(blobs) if os.path.isdir(blobs) else ():
        for rest in os.listdir(os.path.join(blobs, start)):
            if start + rest not in used:
                path = os.path.join(blobs, start, rest)
                freed += os.path.getsize(path)
                os.unlink(path)
    return freed


def missing(manifest: bytes, store: str) -> list[str]:
    """The digests of those contents of a snapshot that `store` lacks."""
    digests = {entry.digest for entry in _entries(manifest) if entry.link is None}
    return sorted(digest for digest in digests if not os.path.exists(_blob(store, digest)))


def pack(taken: Snapshot, out: IO[bytes], *, skip: Collection[str] = (), manifest: bool = True) -> None:
    """Write the snapshot as a stream, a tar of its manifest (unless told) and contents without those of `skip`."""
    import io
    import tarfile

    with tarfile.open(fileobj=out, mode="w|") as archive:
        if manifest:
            words = taken.manifest()
            info = tarfile.TarInfo("manifest")
            info.size = len(words)
            archive.addfile(info, io.BytesIO(words))
        sent = set(skip)
        for entry in taken.files:
            if entry.link is None and entry.digest not in sent:
                sent.add(entry.digest)
                info = tarfile.TarInfo(entry.digest)
                info.size = entry.size
                with open(os.path.join(taken.root, entry.path), "rb") as source:
                    archive.addfile(info, source)


def unpack(source: IO[bytes], store: str, manifest: bytes | None = None) -> str:
    """Put a packed snapshot into `store`; return its digest. What doesn't have the digest it claims is refused.

    `manifest`: that of a snapshot that was packed without.
    """
    import hashlib
    import tarfile

    with tarfile.open(fileobj=source, mode="r|") as archive:
        if manifest is None:
            head = archive.next()
            stream = head and archive.extractfile(head)
            if not head or not stream or head.name != "manifest":
                raise FlowError("what was received is no packed project")
            manifest = stream.read()
        wanted = {entry.digest: entry for entry in _entries(manifest) if entry.link is None}
        for member in archive:
            stream = archive.extractfile(member)
            if stream is not None and member.name in wanted:
                _put(_blob(store, member.name), stream, wanted[member.name], "the stream")
    if lacking := missing(manifest, store):
        raise FlowError(f"{len(lacking)} files of the packed project are missing")
    digest = hashlib.sha256(manifest).hexdigest()
    _write(os.path.join(store, "trees", digest), manifest)
    return digest


def lay_out(digest: str, store: str, target: str) -> None:
    """Make the existing directory `target` a copy of a snapshot in `store`: files of its own, free to be changed."""
    with open(os.path.join(store, "trees", digest), "rb") as file:
        manifest = file.read()
    made: set[str] = set()
    for entry in _entries(manifest):
        path = os.path.join(target, entry.path)
        parent = os.path.dirname(path)
        if parent not in made:
            os.makedirs(parent, exist_ok=True)
            made.add(parent)
        if entry.link is not None:
            os.symlink(entry.link, path)
        else:
            _copy(_blob(store, entry.digest), path, 0o755 if entry.executable else 0o644)


def _too_large(
    root: str, tops: dict[str, tuple[int, int]], total: int, limit_bytes: int, limit_files: int
) -> ValidationError:
    which = 0 if total > limit_bytes else 1
    name, (size, files) = max(tops.items(), key=lambda item: item[1][which])
    how = f"more than {limit_files} files" if which else f"more than {limit_bytes / 2**20:.0f} MiB"
    much = f"has most, {files}" if which else f"is the largest, {size / 2**20:.1f} MiB"
    return ValidationError(
        f"the project {root} is too large to go along: {how} (of what was seen, {name} {much})",
        hint=f"Add {name} to .flowignore, set code_root= to a smaller directory, or upload_code=False; "
        "data belongs into mounts= or a volume.",
    )


# -- the store ---------------------------------------------------------------------------------------------------------


def _manifest(files: tuple[Entry, ...]) -> bytes:
    import json

    rows = [[entry.path, entry.digest, entry.size, entry.executable, entry.link] for entry in files]
    return json.dumps(rows, separators=(",", ":")).encode("utf-8", "surrogateescape")


def _entries(manifest: bytes) -> list[Entry]:
    import json

    entries = [Entry(*row) for row in json.loads(manifest)]
    for entry in entries:
        parts = entry.path.split("/")
        if entry.path.startswith("/") or ".." in parts or "" in parts or not _is_digest(entry):
            raise FlowError(f"a packed project names {entry.path!r}, which is no path inside of it")
    return entries


def _is_digest(entry: Entry) -> bool:
    return entry.link is not None or (len(entry.digest) == 64 and set(entry.digest) <= set("0123456789abcdef"))


def _digest(path: str) -> str | None:
    import hashlib

    digest = hashlib.sha256()
    try:
        with open(path, "rb", buffering=0) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValidationError(
            f"{path} can't be read, so the project can't go along: {error.strerror}",
            hint="Name it in .flowignore, or set code_root= to another directory.",
        ) from None
    return digest.hexdigest()


def _blob(store: str, digest: str) -> str:
    return os.path.join(store, "blobs", digest[:2], digest[2:])


def _put(path: str, source: IO[bytes], entry: Entry, origin: str) -> None:
    """Store a content under its digest, if it has that."""
    import hashlib

    temporary = _temporary(path)
    digest = hashlib.sha256()
    try:
        with open(temporary, "xb") as out:
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                out.write(chunk)
        if digest.hexdigest() != entry.digest:
            raise ValidationError(f"{entry.path} of {origin} changed while it was read", hint="Try again.")
        os.replace(temporary, path)
    except BaseException as error:
        _drop(temporary)
        if isinstance(error, OSError):
            raise _no_room(error, path) from error
        raise


def _write(path: str, content: bytes) -> None:
    temporary = _temporary(path)
    try:
        with open(temporary, "xb") as out:
            out.write(content)
        os.replace(temporary, path)
    except OSError as error:
        _drop(temporary)
        raise _no_room(error, path) from error


def _temporary(path: str) -> str:
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    except OSError as error:
        raise _no_room(error, path) from error
    return f"{path}.{os.getpid()}-{os.urandom(4).hex()}"


def _drop(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass


def _no_room(error: OSError, path: str) -> FlowError:
    import errno

    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FlowError(f"the disk of {path} is full", hint="Free some space there, or set FLOW_HOME elsewhere.")
    return FlowError(f"{path} can't be written: {error.strerror}", hint="Set FLOW_HOME to a directory of yours.")


def _copy(source: str, target: str, mode: int) -> None:
    with open(source, "rb", buffering=0) as inp:
        out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            while True:
                try:
                    moved: Any = os.copy_file_range(inp.fileno(), out, 1 << 30)
                except OSError:  # not between these two filesystems
                    moved = os.sendfile(out, inp.fileno(), None, 1 << 30)
                if not moved:
                    return
        finally:
            os.close(out)
