"""What earlier programs found out of an engine: asking Podman takes longer than running a container.

Kept for a day, for this boot, this engine and its options. It may be out of date, so whoever relies on it looks anew
when a container doesn't start.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from typing import Any

from flowfn_runtime import paths

KEEP_S = 86400.0
_VARIABLES = ("DOCKER_", "CONTAINER", "PODMAN_", "XDG_")  # that say which engine answers, and how it is configured


class Memory:
    """A few words about one engine, in a file. Without the file, or if it can't be written, there are none."""

    def __init__(self, program: str, options: Sequence[str]) -> None:
        self._path = os.path.join(paths.cache(), "engines", f"{_digest(program, options)}.json")

    def read(self) -> dict[str, Any]:
        try:
            if time.time() - os.stat(self._path).st_mtime > KEEP_S:
                return {}
            with open(self._path, encoding="utf-8") as file:
                words: dict[str, Any] = json.load(file)
                return words
        except (OSError, ValueError):
            return {}

    def write(self, words: dict[str, Any]) -> None:
        try:
            import tempfile

            folder = paths.private_dir(os.path.dirname(self._path))
            fd, name = tempfile.mkstemp(dir=folder)
            with open(fd, "w", encoding="utf-8") as file:
                json.dump(words, file)
            os.replace(name, self._path)
        except OSError:
            pass  # a full disk: it is asked for again

    def forget(self) -> None:
        try:
            os.unlink(self._path)
        except OSError:
            pass


def _digest(program: str, options: Sequence[str]) -> str:
    try:
        status = os.stat(program)
        version = [status.st_mtime_ns, status.st_size]
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read()
    except OSError:
        version, boot = [], ""
    environ = sorted(item for item in os.environ.items() if item[0].startswith(_VARIABLES))
    known_by = [os.path.realpath(program), version, boot, list(options), os.getuid(), environ]
    return hashlib.sha256(json.dumps(known_by).encode()).hexdigest()[:32]
