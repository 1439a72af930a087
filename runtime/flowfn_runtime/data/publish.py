"""Putting a finished file or directory at a URL so that readers see all of it or nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil

from ..errors import DataError, DataNotFound
from . import access
from .access import Options
from .spec import redact
from .upload import upload

_PART = ".flowfn-part-"  # a copy under way, beside what it will become; locked by the process that makes it


def publish(path: str, url: str, options: Options = None) -> None:
    """Put what is at the local `path` at `url`; `path` may be used up.

    A file appears whole: by a rename, or as one object. Files of a directory appear one by one, each whole, in place
    of those of the same name; other files there stay. What tells readers that a directory is complete (`_SUCCESS`, a
    manifest, an index) comes last, and if one fails, the new ones before it are taken back.
    """
    with access.explained(url):
        local = access.local_path(url, create=True)
        if os.path.isdir(path):
            if local is not None:
                _local_tree(path, local.rstrip("/"))
            else:
                _remote_tree(path, url, options)
        elif local is not None:
            if url.endswith("/"):
                raise DataError(f"a file can't be published at {redact(url)}, which ends with '/'", url=redact(url))
            os.makedirs(os.path.dirname(local), exist_ok=True)
            _place(path, local)
        else:
            upload(path, url, options=access.effective(url, options))


# -- on this machine ---------------------------------------------------------------------------------------------------


def _place(path: str, target: str) -> None:
    """Move a file to `target` in one step."""
    if os.path.isdir(target):
        raise IsADirectoryError(errno.EISDIR, "is a directory", target)
    try:
        os.replace(path, target)
        return
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    # Another filesystem: a copy beside the target first. The kernel drops its lock if we are killed, and whoever
    # publishes there next removes it.
    folder = os.path.dirname(target)
    _sweep(folder)
    part = os.path.join(folder, _PART + os.urandom(8).hex())
    fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        try:
            shutil.copyfile(path, part)
            shutil.copystat(path, part)
            os.replace(part, target)
        except BaseException:
            os.unlink(part)
            raise
    finally:
        os.close(fd)


def _sweep(folder: str) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(_PART):
                remove_unless_locked(entry.path, entry.path)


def remove_unless_locked(lock: str, *paths: str) -> None:
    """Remove files and directories if no living process holds the lock on the file `lock`."""
    try:
        fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return  # gone, or another user's
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for path in paths:
            if os.path.isdir(path):
                shutil.rmtree(path, ignore_errors=True)
            elif os.path.lexists(path):
                os.unlink(path)
    except OSError:
        pass
    finally:
        os.close(fd)


def _local_tree(path: str, target: str) -> None:
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if not os.path.lexists(target):
        try:
            os.rename(path, target)  # all of it in one step
            return
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.ENOTEMPTY, errno.EEXIST):
                raise
    os.makedirs(target, exist_ok=True)
    new: list[str] = []
    try:
        for relative in _files(path):
            to = os.path.join(target, relative)
            os.makedirs(os.path.dirname(to), exist_ok=True)
            if not os.path.lexists(to):
                new.append(to)
            source = os.path.join(path, relative)
            if os.path.islink(source):
                link = f"{to}{_PART}{os.urandom(8).hex()}"
                os.symlink(os.readlink(source), link)
                os.replace(link, to)
            else:
                _place(source, to)
    except BaseException:
        for to in new:
            if os.path.lexists(to):
                os.unlink(to)
        raise


# -- elsewhere ---------------------------------------------------------------------------------------------------------


def _remote_tree(path: str, url: str, options: Options) -> None:
    relatives = _files(path)
    if not relatives:
        raise DataError(
            f"an empty directory can't be published at {redact(url)}: an object store has none", url=redact(url)
        )
    try:
        listing = access.source(access.join(url, ""), options).listing()
        there = {found.key[len(listing.base) :] for found in listing.objects}
    except DataNotFound:
        there = set()
    settings = access.effective(url, options)
    last = [relative for relative in relatives if _completes(relative)]
    aside = path + ".last"
    for relative in last:
        os.makedirs(os.path.dirname(os.path.join(aside, relative)), exist_ok=True)
        os.rename(os.path.join(path, relative), os.path.join(aside, relative))
    try:
        if len(last) < len(relatives):
            upload(path, url, options=settings)
        for relative in last:
            upload(os.path.join(aside, relative), access.join(url, relative), options=settings)
    except BaseException:
        _take_back([access.join(url, relative) for relative in relatives if relative not in there], options)
        raise


def _take_back(urls: list[str], options: Options) -> None:
    for url in urls:
        try:
            source = access.source(url, options)
            if (client := getattr(source, "client", None)) is not None:
                client.delete(getattr(source, "key", ""))
            else:
                fs, target = access.filesystem(url, options)
                fs.rm_file(target)
        except Exception:
            pass  # it was not there yet, or the server is gone


def _files(path: str) -> list[str]:
    """The files below `path`, relative to it; those that say that the rest is complete come last."""
    found = []
    for folder, _, names in os.walk(path):
        prefix = os.path.relpath(folder, path)
        found += [name if prefix == "." else os.path.join(prefix, name) for name in names]
    return sorted(found, key=lambda relative: (_completes(relative), relative))


def _completes(relative: str) -> bool:
    name = os.path.basename(relative).lower()
    return name in ("_success", "_metadata", "_common_metadata", ".zmetadata") or "manifest" in name or "index" in name
