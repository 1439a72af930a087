"""When a failed call is tried again, and how long it waits before that. Pure."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

from flowfn_runtime.errors import ValidationError


@dataclass(frozen=True)
class Retries:
    """When to try a failed call again, and how long to wait before that.

    The n-th retry waits `initial_delay * backoff ** (n - 1)` seconds, at most `max_delay`, of which a random part, up
    to the fraction `jitter`, is taken off, so that calls that failed together don't come back together. `on` names
    the exceptions that are worth another try; losing a worker has a budget of its own and does not count here.
    """

    max_retries: int
    initial_delay: float = field(default=1.0, kw_only=True)  # seconds
    backoff: float = field(default=2.0, kw_only=True)
    max_delay: float = field(default=60.0, kw_only=True)  # seconds
    jitter: float = field(default=0.5, kw_only=True)  # 0: none, 1: any wait from 0 to the full delay
    on: tuple[type[BaseException], ...] = field(default=(Exception,), kw_only=True)

    def __post_init__(self) -> None:
        on: Any = self.on  # one type or a list of them is welcome too
        object.__setattr__(self, "on", (on,) if isinstance(on, type) else tuple(on) if isinstance(on, list) else on)
        if isinstance(self.max_retries, bool) or not isinstance(self.max_retries, int) or self.max_retries < 0:
            raise _wrong("max_retries", self.max_retries, "a whole number, 0 or more")
        for name, least, most, accepted in (
            ("initial_delay", 0, 1e7, "seconds, 0 or more"),
            ("backoff", 1, 1e6, "a factor, 1 or more"),
            ("max_delay", 0, 1e7, "seconds, 0 or more"),
            ("jitter", 0, 1, "a fraction from 0 to 1"),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
                raise _wrong(name, value, accepted)
        if not (isinstance(self.on, tuple) and self.on and all(map(_is_exception_type, self.on))):
            raise _wrong("on", self.on, "exception types, such as on=(ConnectionError, TimeoutError)")

    def delay(self, attempt: int, seed: object = "") -> float:
        """Seconds to wait after failure number `attempt` (the first is 1). `seed`, such as the call's id, decides
        the jitter: the same arguments give the same delay."""
        if self.initial_delay == 0:
            return 0.0
        try:
            full = min(self.max_delay, self.initial_delay * float(self.backoff) ** max(0, attempt - 1))
        except OverflowError:
            full = self.max_delay
        return full * (1 - self.jitter * zlib.crc32(f"{attempt}:{seed}".encode()) / 2**32)

    def should_retry(self, attempt: int, error: BaseException) -> bool:
        """Whether failure number `attempt` (the first is 1), with `error`, is to be tried again."""
        return attempt <= self.max_retries and isinstance(error, self.on)


def parse_retries(value: object, *, option: str = "retries") -> Retries | None:
    """How to retry: a number of retries with the usual delays, or `Retries`. None and 0: not at all."""
    if value is None or (value == 0 and type(value) is int):
        return None
    if isinstance(value, Retries):
        return value if value.max_retries else None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _wrong(option, value, "a number of retries (0 or more) or flow.Retries(...)")
    return Retries(value)


def _wrong(option: str, value: object, accepted: str) -> ValidationError:
    return ValidationError(f"{option}={value!r} is not accepted; accepted: {accepted}")


def _is_exception_type(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, BaseException)
