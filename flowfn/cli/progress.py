"""A progress bar for transfers: on a terminal only, on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .output import size

if TYPE_CHECKING:
    from flowfn_runtime.data.model import Progress

_WIDTH = 24


@contextmanager
def bar(*, quiet: bool = False) -> Iterator[Callable[[Progress], None] | None]:
    """What to pass as `progress=`; None where nobody watches."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    started = time.monotonic()

    def show(progress: Progress) -> None:
        sys.stderr.write("\r\033[K" + line(progress, time.monotonic() - started))
        sys.stderr.flush()

    try:
        yield show
    finally:
        sys.stderr.write("\r\033[K")
        sys.stderr.flush()


def line(progress: Progress, seconds: float) -> str:
    """One line for one moment of a transfer."""
    done, total = progress.done_bytes, progress.total_bytes
    share = min(1.0, done / total) if total else 0.0
    filled = int(share * _WIDTH)
    parts = [
        f"[{'#' * filled}{'.' * (_WIDTH - filled)}]" if total else "",
        size(done) + (f" of {size(total)}" if total else ""),
    ]
    if progress.total_objects and progress.total_objects > 1:
        parts.append(f"{progress.done_objects:,} of {progress.total_objects:,} objects")
    if seconds > 0:
        parts.append(f"{size(done / seconds)}/s")
    return "  ".join(part for part in parts if part)
