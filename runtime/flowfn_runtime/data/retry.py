"""Trying again, with patience that grows; the one place that decides when to give up."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from flowfn_runtime.data.endpoint import Unreachable, WireError
from flowfn_runtime.data.spec import redact, scheme_of
from flowfn_runtime.errors import CallCancelled, ConfigError, DataUnavailable

T = TypeVar("T")

_FIRST_DELAY_S = 0.05
_LONGEST_DELAY_S = 5.0


def patience_s() -> float:
    """How long a server may fail before we give up, in seconds: `FLOW_DATA_PATIENCE`, else 60."""
    text = os.environ.get("FLOW_DATA_PATIENCE") or "60"
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"FLOW_DATA_PATIENCE is {text!r}.", hint="Write a number of seconds.") from None


class Patience:
    """Shared by the threads of one transfer: as long as any of them gets on, none gives up.

    `first_contact_s` bounds the wait for a server that has not answered once: a wrong endpoint is reported soon.
    """

    def __init__(self, url: str, *, first_contact_s: float = 3.0) -> None:
        self.url = url
        self.stopped = threading.Event()
        self._limit = patience_s()
        self._first_contact = min(first_contact_s, self._limit)
        self._last_success = time.monotonic()
        self._contact = False

    def succeeded(self) -> None:
        """Something arrived."""
        self._contact = True
        self._last_success = time.monotonic()

    def attempt(self, work: Callable[[], T]) -> T:
        """`work()`, tried again after each `WireError`. Raises `DataUnavailable` when patience ends."""
        delay = _FIRST_DELAY_S
        while True:
            try:
                result = work()
            except WireError as error:
                if not isinstance(error, Unreachable):
                    self._contact = True
                waited = time.monotonic() - self._last_success
                limit = self._limit if self._contact else self._first_contact
                if waited + delay > limit:
                    raise DataUnavailable(
                        f"{redact(self.url)} can't be reached: {error} (tried for {waited:.0f} s).",
                        url=self.url,
                        hint=self._remedy(error),
                    ) from error
                import random  # not before it is needed: it takes as long as half of this package

                # A random part keeps many clients from coming back at the same moment.
                if self.stopped.wait(delay * random.uniform(0.5, 1.0)):
                    raise CallCancelled("The transfer was stopped.") from None
                delay = min(2 * delay, _LONGEST_DELAY_S)
            else:
                self.succeeded()
                return result

    def _remedy(self, error: WireError) -> str:
        if not isinstance(error, Unreachable):
            return "Try again later; FLOW_DATA_PATIENCE (seconds) makes us more patient."
        if scheme_of(self.url) in ("http", "https"):
            return "Is the server up, and the URL right?"
        return "Is the server up, and the endpoint right (AWS_ENDPOINT_URL_S3 or endpoint_url=)?"
