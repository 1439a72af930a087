"""Directories in the store, by the digest of all that is in them.

```
<store>/trees/<2>/<digest>/data/...   the files
<store>/trees/<2>/<digest>/manifest   their paths and digests; written last: where it is, the rest is
```

Only files count, with their paths and content: no object store keeps empty directories or permissions. Symbolic links
are followed.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

from .. import paths
from ..errors import DataChanged, DataError
from . import access
from .spec import redact
from .staging import sha256_of
from .upload import upload

Contents = dict[str, str]  # path relative to the directory -> SHA-256


def contents(path: str) -> Contents:
    """The files below a directory and their digests. Raises `DataError` for what is neither a file nor a directory."""
    found: list[str] = []
    for folder, _, names in os.walk(path, followlinks=True):
        found += [os.path.relpath(os.path.join(folder, name), path) for name in names]
    for relative in found:
        if not os.path.isfile(os.path.join(path, relative)):
            raise DataError(f"{os.path.join(path, relative)} is no file, and has no place in the store", url=path)
    with ThreadPoolExecutor(8) as pool:
        digests = pool.map(lambda relative: sha256_of(os.path.join(path, relative)), found)
        return dict(sorted(zip((relative.replace(os.sep, "/") for relative in found), digests, strict=True)))


def digest_of(files: Contents) -> str:
    """What a directory with these files is called."""
    return hashlib.sha256(_manifest(files)).hexdigest()


def _manifest(files: Contents) -> bytes:
    return json.dumps(files, sort_keys=True).encode("utf-8", "surrogatepass")


def put(path: str, root: str) -> tuple[str, str]:
    """Keep a directory in the store at `root`; its digest, and the URL of its files. Moves nothing that is there."""
    files = contents(path)
    if not files:
        raise DataError(f"{path} has no files in it: an object store keeps no empty directories", url=path)
    digest = digest_of(files)
    base = f"{root}/trees/{digest[:2]}/{digest}"
    if not _complete(base):
        local = access.local_path(base)
        (_put_local if local is not None else _put_remote)(path, local or base, _manifest(files))
    return digest, f"{base}/data"


def _complete(base: str) -> bool:
    try:
        access.look(f"{base}/manifest")
    except DataError as error:
        if isinstance(error, FileNotFoundError):
            return False
        raise
    return True


def _put_local(path: str, base: str, manifest: bytes) -> None:
    import shutil

    parent = paths.private_dir(os.path.dirname(base))
    temporary = os.path.join(parent, f".part-{os.urandom(8).hex()}")
    try:
        shutil.copytree(path, os.path.join(temporary, "data"), copy_function=shutil.copyfile)
        for folder, _, names in os.walk(temporary):
            for name in names:
                os.chmod(os.path.join(folder, name), 0o400)
        with open(os.path.join(temporary, "manifest"), "wb") as file:
            file.write(manifest)
        try:
            os.rename(temporary, base)
        except OSError:
            if not _complete(base):  # somebody took the manifest away, not another upload that was faster
                shutil.rmtree(base)
                os.rename(temporary, base)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put_remote(path: str, base: str, manifest: bytes) -> None:
    import tempfile

    options = access.effective(base, None)
    upload(path, f"{base}/data", options=options)
    with tempfile.NamedTemporaryFile() as file:
        file.write(manifest)
        file.flush()
        upload(file.name, f"{base}/manifest", options=options)


def verify(path: str, digest: str, url: str) -> None:
    """Compare a directory with its digest, once as long as its files stay as they are. Raises `DataChanged`."""
    marks = hashlib.sha256()
    for folder, folders, names in os.walk(path):
        folders.sort()
        for name in sorted(names):
            stat = os.stat(os.path.join(folder, name))
            marks.update(
                f"{folder}/{name} {stat.st_ino} {stat.st_mtime_ns} {stat.st_size}\n".encode("utf-8", "replace")
            )
    seen = os.path.join(
        paths.private_dir(os.path.join(paths.cache(), "content", digest[:2], digest)), f"seen-{marks.hexdigest()[:40]}"
    )
    if os.path.exists(seen):
        return
    found = digest_of(contents(path))
    if found != digest:
        raise DataChanged(
            f"{redact(url)} is damaged: what is in it has the digest {found}, not {digest}",
            url=redact(url),
            hint="upload it again",
        )
    os.close(os.open(seen, os.O_CREAT | os.O_CLOEXEC | os.O_WRONLY, 0o600))
