"""Directories of volumes: how much is in them, and removing them for good."""

from __future__ import annotations

import os


def usage_bytes(path: str) -> int:
    """The disk space that the files below `path` take, in bytes, as `du` counts it. Hard links count once."""
    seen: set[tuple[int, int]] = set()
    total = 0
    pending = [path]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    stat = entry.stat(follow_symlinks=False)
                    is_dir = entry.is_dir(follow_symlinks=False)
                    if stat.st_nlink > 1 and not is_dir:
                        if (stat.st_dev, stat.st_ino) in seen:
                            continue
                        seen.add((stat.st_dev, stat.st_ino))
                    total += stat.st_blocks * 512
                    if is_dir:
                        pending.append(entry.path)
        except (FileNotFoundError, PermissionError):
            continue  # deleted while we counted, or the volume's user hid it from us
    return total


def remove_tree(path: str) -> bool:
    """Remove a directory, also where a directory in it can't be written to; True if it is gone."""
    import shutil

    shutil.rmtree(path, ignore_errors=True)
    if not os.path.lexists(path):
        return True
    try:
        _unlock(path)
        shutil.rmtree(path)
    except FileNotFoundError:
        pass  # another process removes it too
    except OSError as error:
        import logging

        logging.getLogger("flowfn").warning(
            "files of a deleted volume can't be removed, and stay at %s: %s", path, error
        )
    return not os.path.lexists(path)


def _unlock(folder: str) -> None:
    os.chmod(folder, 0o700)
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                _unlock(entry.path)
