"""Adds up what the threads of a transfer did, and tells the caller now and then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from flowfn_runtime.data.model import Progress

_EVERY_S = 0.1

Tell = Callable[[Progress], None]


class Tally:
    """What has been done of `total_bytes` (None: nobody knows) and `total_objects`; `url` as it may be shown."""

    def __init__(self, url: str, total_bytes: int | None, total_objects: int, tell: Tell | None) -> None:
        self._url = url
        self._total_bytes = total_bytes
        self._total_objects = total_objects
        self._tell = tell
        self._bytes = self._objects = 0
        self._lock = threading.Lock()
        self._next = 0.0

    def add(self, bytes_: int, objects: int) -> None:
        """So much more is done."""
        if self._tell is None:
            return
        with self._lock:
            self._bytes += bytes_
            self._objects += objects
            if (now := time.monotonic()) >= self._next:
                self._next = now + _EVERY_S
                self._send()

    def finish(self) -> None:
        """All is done."""
        with self._lock:
            self._send()

    def _send(self) -> None:
        if self._tell is not None:
            self._tell(Progress(self._url, self._bytes, self._total_bytes, self._objects, self._total_objects))
