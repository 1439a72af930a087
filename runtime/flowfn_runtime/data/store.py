"""The store: payloads by the SHA-256 of their content, at any fsspec URL.

`FLOW_STORE` says where, `FLOW_HOME/store` otherwise. The same bytes are kept once, and moved there once. What is loaded
is compared with its digest first: a payload may be a pickle, and a pickle is code.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

from .. import paths, settings
from ..errors import DataChanged, DataError
from . import access, streams
from .publish import publish
from .references import Dir, File
from .spec import redact, scheme_of
from .staging import sha256_of


def root() -> str:
    """The URL (or path) that the store is at."""
    return access.normal_url(settings.store() or os.path.join(paths.home(), "store")).rstrip("/")


def shared_dirs() -> list[str]:
    """The directories of this host that whoever stages or stores has to share: the cache, and a store that is local."""
    store = access.local_path(root()) if scheme_of(root()) == "file" else None
    return [paths.private_dir(path) for path in (paths.cache(), store) if path is not None]


def url_of(digest: str) -> str:
    """Where the content of this digest is kept."""
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise DataError(f"{digest!r} is no SHA-256 digest")
    return f"{root()}/sha256/{digest[:2]}/{digest}"


def upload(path: str | os.PathLike[str], *, name: str | None = None) -> Any:
    """Put a local file or directory into the store, and return a reference to it, a `File` or a `Dir`, that is valid
    wherever the store can be reached.

    Uploading the same bytes again moves none. `name` is what the staged file is called, the file's own by default. Of a
    directory, all files below it are kept with their paths; permissions and empty directories are not.
    """
    text = os.fspath(path)
    with access.explained(text):
        if os.path.isdir(text):
            from . import store_trees

            if name is not None:
                raise DataError(f"{text} is a directory, which is given no name", url=text)
            digest, url = store_trees.put(text, root())
            return Dir._of(url, digest)
        digest = sha256_of(text)
        url = url_of(digest)
        size = os.path.getsize(text)
        if not _there(url, size):
            _put(text, url)
    return File._of(url, None, name=name or os.path.basename(text), digest=digest)


def put(data: Any) -> str:
    """Keep bytes (or any flat buffer); return their digest."""
    digest = hashlib.sha256(data).hexdigest()
    url = url_of(digest)
    if not _there(url, len(data)):
        import tempfile

        with tempfile.NamedTemporaryFile(dir=paths.private_dir(os.path.join(paths.cache(), "store"))) as temporary:
            temporary.write(data)
            temporary.flush()
            _put(temporary.name, url)
    return digest


def get(digest: str) -> bytes:
    """The bytes of this digest. Raises `DataNotFound`, and `DataChanged` if what is kept there has another digest."""
    url = url_of(digest)
    with streams.open_bytes(url, None) as opened:
        data = opened.read()
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise DataChanged(
            f"{redact(url)} is damaged: its content has the SHA-256 {found}", url=redact(url), hint="make it again"
        )
    return data


def _there(url: str, size: int) -> bool:
    try:
        return access.look(url).size_bytes == size
    except DataError as error:
        if isinstance(error, FileNotFoundError):
            return False
        raise


def _put(path: str, url: str) -> None:
    local = access.local_path(url)
    if local is None:
        publish(path, url)
        return
    import shutil

    folder = paths.private_dir(os.path.dirname(local))
    temporary = os.path.join(folder, f".part-{os.urandom(8).hex()}")
    try:
        shutil.copyfile(path, temporary)
        os.chmod(temporary, 0o400)
        os.replace(temporary, local)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
