"""What the peers are asked to run: in a module of its own, so that each of them can send it by name."""

from __future__ import annotations

import os
from typing import Any


def noop(value: Any = None) -> None:
    return None


def echo(value: Any) -> Any:
    return value


def pid_after(value: Any) -> int:
    """Touch the array, at both ends, and say who did."""
    assert value[0] == value[-1]
    return os.getpid()
