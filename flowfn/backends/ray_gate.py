"""Who uses Ray in this process right now. It is not shut down meanwhile: Ray would end the process, with status 1."""

from __future__ import annotations

import os
import threading


class Gate:
    """`with gate:` around what asks Ray. Raises ConnectionError while it is shut."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._users = 0
        self._shut = False

    def __enter__(self) -> None:
        with self._changed:
            if self._shut:
                raise ConnectionError("the connection to Ray is being ended")
            self._users += 1

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._users -= 1
            self._changed.notify_all()

    def shut(self, patience_s: float) -> None:
        """Let nobody in any more, and wait for those who are there."""
        with self._changed:
            self._shut = True
            self._changed.wait_for(lambda: not self._users, patience_s)

    def open(self) -> None:
        with self._changed:
            self._shut = False


gate = Gate()  # Ray has one connection in a process
os.register_at_fork(after_in_child=gate.__init__)  # type: ignore[misc]  # nobody is there
